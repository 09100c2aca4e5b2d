"""How long tests wait for what must come."""

PATIENCE = 60.0
"""Seconds, so many that only a fault takes them, on a busy machine too; what must not be waited for is set far beyond."""
