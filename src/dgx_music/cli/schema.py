"""What ``dgx-music db`` does to a database."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from pathlib import Path
from shlex import quote

from dgx_music.cli.opening import exists
from dgx_music.cli.options import given
from dgx_music.cli.output import confirm, size, tell
from dgx_music.config import load_settings
from dgx_music.errors import (
    ArtifactError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
    InvalidRequestError,
    is_newer,
)
from dgx_music.storage import Database, count_generations
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from dgx_music.storage.connection.sqlite import back_up, is_ours
from dgx_music.storage.connection.urls import server_address

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""Errors that say nothing against the file's name."""


def migrate(database_url: str | None) -> None:
    """Create the database if it is not there, and bring its tables to this version."""
    asyncio.run(_migrate(database_url))


def reset(database_url: str | None, *, is_agreed: bool) -> None:
    """Delete everything in the database, once a person or ``--yes`` has agreed."""
    asyncio.run(_reset(database_url, is_agreed=is_agreed))


def read_revision(database_url: str | None) -> str | None:
    """Return the revision that the database is at; ``None`` if it has no tables of ours."""
    return asyncio.run(_read_revision(database_url))


def copy(database_url: str | None, file: str) -> None:
    """Copy a SQLite database into a new file.

    Raises ``InvalidRequestError`` for a PostgreSQL database, with the command that copies it.
    """
    database = _database(database_url)
    if database.path is None:
        url = server_address(database.url._replace(password=None))
        command = f"pg_dump --format=custom --file={quote(file)} {quote(str(url))}"
        raise InvalidRequestError("FILE", "is for SQLite", f"run `{command}`")
    _back_up(database, database.path, Path(file))
    tell(f"The database {database} is copied into {file} ({size(Path(file).stat().st_size)}).")


def _database(database_url: str | None) -> Database:
    return Database.from_settings(load_settings(**given(database_url=database_url)))


def _back_up(database: Database, source: Path, target: Path) -> None:
    if not source.exists():
        raise DatabaseUnavailableError(str(database), "there is no such file")
    try:
        if not is_ours(source):
            raise DatabaseUnavailableError(str(database), "it holds no tables of dgx-music")
        back_up(source, target)
    except FileExistsError:
        raise InvalidRequestError("FILE", f"{target} exists", "name a new file") from None
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise ArtifactError(
                f"FILE {target} cannot be written ({error.strerror}); name another place.",
            ) from None
        raise InvalidRequestError(
            "FILE",
            f"cannot be written ({error.strerror})",
            "name another place",
        ) from None
    except sqlite3.Error as error:
        raise DatabaseUnavailableError(
            str(database),
            f"it could not be copied ({error})",
        ) from error


async def _migrate(database_url: str | None) -> None:
    database = _database(database_url)
    try:
        before = await _revision_of(database)
        await database.migrate()
    finally:
        await database.dispose()
    if before == SCHEMA_REVISION:
        tell(f"The database {database} is at revision {SCHEMA_REVISION} already.")
    else:
        tell(
            f"The database {database} is now at revision {SCHEMA_REVISION} (was: {before or 'none'})."
        )


async def _reset(database_url: str | None, *, is_agreed: bool) -> None:
    database = _database(database_url)
    try:
        confirm(f"Delete {await _contents(database)} from {database}?", is_agreed=is_agreed)
        await database.reset()
    finally:
        await database.dispose()
    tell(f"The database {database} is empty, at revision {SCHEMA_REVISION}.")


async def _contents(database: Database) -> str:
    found = await _revision_of(database)
    if found is None:
        return "nothing"
    if is_newer(found, SCHEMA_REVISION):
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)
    async with database.session(read_only=True) as session:
        count = await count_generations(session)
    return "1 generation" if count == 1 else f"all {count:,} generations"


async def _read_revision(database_url: str | None) -> str | None:
    database = _database(database_url)
    try:
        return await _revision_of(database)
    finally:
        await database.dispose()


async def _revision_of(database: Database) -> str | None:
    """Return the revision without creating a database by looking."""
    return await database.revision() if exists(database) else None
