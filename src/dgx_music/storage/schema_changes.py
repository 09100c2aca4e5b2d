"""Changes of the schema: make, migrate, drop it; each in one transaction of the caller."""

from __future__ import annotations

import time

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from dgx_music.errors import DatabaseNotMigratedError, DatabaseUnavailableError, is_newer
from dgx_music.storage.connection.postgres_errors import is_locked
from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE
from dgx_music.storage.connection.urls import shown
from dgx_music.storage.models import Base

_MIGRATION_LOCK = 0x6467_786D
"""An advisory lock's number ("dgxm"): of two migrations at once the second waits for the first."""
_LOCK_SECONDS = 5.0
"""How long a migration waits for a table that others use: later users wait behind it."""


def read_revision(connection: Connection) -> str | None:
    """Return the schema's revision; ``None`` if our tables are not there."""
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    query = f"SELECT version_num FROM {VERSION_TABLE}"  # noqa: S608 - a constant
    version: str | None = connection.scalar(text(query))
    return version


def upgrade(connection: Connection) -> None:
    """Migrate to this version's schema.

    Raises ``DatabaseNotMigratedError`` if it is a newer version's, ``DatabaseUnavailableError`` if
    it cannot be ours.
    """
    from dgx_music.storage import migrations

    if connection.dialect.name == "postgresql":
        take_turn(connection)
        _check_encoding(connection)
    _check_ours(connection)
    migrations.upgrade(connection)


def _check_encoding(connection: Connection) -> None:
    """Raise unless the encoding is UTF-8: no other one holds every prompt and every JSON text."""
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != "UTF8":
        remedy = "create it with: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        why = f"its encoding is {encoding}; {remedy}"
        raise DatabaseUnavailableError(shown(connection.engine.url), why)


def recreate(connection: Connection) -> None:
    """Drop all our tables and make them anew, empty."""
    _drop(connection)
    upgrade(connection)


def take_turn(connection: Connection) -> None:
    """Wait for the end of another migration, however long; from then on wait briefly for tables."""
    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_SECONDS * 1000:.0f}"))


def _drop(connection: Connection) -> None:
    if _check_ours(connection):
        from dgx_music.storage import migrations

        if connection.dialect.name == "postgresql":
            take_turn(connection)
            _lock_all(connection)
        migrations.downgrade(connection, "base")
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))


def _lock_all(connection: Connection) -> None:
    """Lock all our tables without a deadlock: wait for a table only while no other is locked.

    If one is locked by others, begin again with that one.
    """
    tables = sorted(set(Base.metadata.tables) & set(inspect(connection).get_table_names()))
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        savepoint = connection.begin_nested()
        try:
            for table in tables:
                wait = "" if table == tables[0] else " NOWAIT"
                connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE{wait}"))
            savepoint.commit()
            return
        except DBAPIError as error:
            savepoint.rollback()
            if not is_locked(error) or time.monotonic() > deadline:
                raise
            tables.remove(table)
            tables.insert(0, table)


def _check_ours(connection: Connection) -> bool:
    """Return whether our tables are there.

    Raises if a newer version made them, or if tables of somebody else have their names.
    """
    found = read_revision(connection)
    if is_newer(found, SCHEMA_REVISION):
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)
    is_ours = found is not None
    foreign = set(Base.metadata.tables) & set(inspect(connection).get_table_names())
    if foreign and not is_ours:
        why = f"its table {min(foreign)} is not ours"
        raise DatabaseUnavailableError(shown(connection.engine.url), why)
    return is_ours
