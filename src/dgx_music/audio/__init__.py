"""Audio as arrays and as files: samples, encoding, clips. Knows nothing of queues or models."""
