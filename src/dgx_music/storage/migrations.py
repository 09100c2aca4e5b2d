"""Alembic inside the library; imported only for a migration: it takes half a second."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def folder() -> Path:
    """Return the folder of the migrations: the wheel's copy, else the source tree's."""
    package = Path(__file__).parents[1]
    shipped = package / "_migrations"
    return shipped if shipped.is_dir() else package.parents[1] / "migrations"


def config(connection: Connection | None = None) -> Config:
    """Return Alembic's configuration; if a connection is given, it runs in its transaction."""
    result = Config()
    result.set_main_option("script_location", str(folder()).replace("%", "%%"))
    result.set_main_option("path_separator", "os")
    result.attributes["connection"] = connection
    return result


def head() -> str | None:
    """Return the newest revision."""
    return ScriptDirectory.from_config(config()).get_current_head()


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Migrate up, inside the connection's transaction: all of it or nothing."""
    command.upgrade(config(connection), revision)


def downgrade(connection: Connection, revision: str) -> None:
    """Migrate down, inside the connection's transaction."""
    command.downgrade(config(connection), revision)
