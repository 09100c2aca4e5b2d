"""Engines, and the process that they run in.

Knows nothing of databases. Only ``musicgen`` imports torch.
"""
