"""Audio as arrays and as files: what it is read from and written to. Knows nothing of queues or models."""
