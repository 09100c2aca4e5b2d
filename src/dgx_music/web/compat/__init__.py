"""The routes that clients of hosted services call: Replicate's, ElevenLabs' and vLLM-Omni's.

Each one is enqueued, limited and refused as everywhere in the API; only names and shapes differ.
"""
