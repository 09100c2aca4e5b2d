"""The schema of this version, and the table that holds the revision of a database."""

from __future__ import annotations

SCHEMA_REVISION = "0010"
"""The newest migration; a constant, so that start-up need not import Alembic."""

VERSION_TABLE = "dgx_music_alembic_version"
"""A name of ours, so that our tables can live in a database that has its own migrations."""
