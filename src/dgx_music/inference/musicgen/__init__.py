"""MusicGen: the only place that imports torch."""
