"""Which schema this version works with, and the table in which the database says which one it has."""

from __future__ import annotations

SCHEMA_REVISION = "0004"
"""The newest migration; a test keeps it equal to Alembic's head, so that start-up need not import Alembic."""

VERSION_TABLE = "dgx_music_alembic_version"
"""Our own, so that our tables can live inside a database that has migrations of its own."""
