"""Engines, and the process they run in. Knows nothing of databases; torch is imported only below here."""
