"""``dgx-music db``: the database's own life. And how every other command opens it."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, Yes, given
from dgx_music.cli.output import print_json, print_line, size, tell
from dgx_music.config import load_settings
from dgx_music.errors import (
    ArtifactError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
    GenerationNotFoundError,
    InvalidRequestError,
    is_newer,
    remedy_for,
)
from dgx_music.storage import Database, Generation, close_db, count_generations, get_generation, init_db
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from dgx_music.storage.connection.sqlite import back_up, is_ours
from dgx_music.storage.connection.urls import file_of, normalise_url, server_address
from dgx_music.storage.repository import find_generation_ids
from dgx_music.text import plain
from dgx_music.validation import check_name

app = typer.Typer(help="Create, migrate, empty or look at the database.", no_args_is_help=True)

_SHORTEST_PREFIX = 8
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What goes wrong where a file's name is fine."""


@app.command()
def init(database_url: DatabaseUrl = None) -> None:
    """Create the database and its tables."""
    asyncio.run(_migrate(database_url))


@app.command()
def migrate(database_url: DatabaseUrl = None) -> None:
    """Bring the tables to this version; what is in them stays."""
    asyncio.run(_migrate(database_url))


@app.command()
def reset(database_url: DatabaseUrl = None, yes: Yes = False) -> None:
    """Delete everything in the database.

    Its tables are created anew, empty; audio files stay where they are. On a terminal it asks first; elsewhere it needs --yes.
    """
    asyncio.run(_reset(database_url, is_agreed=yes))


@app.command()
def current(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Print the revision that the database is at."""
    found = asyncio.run(_read_revision(database_url))
    if as_json:
        print_json({"revision": found, "head": SCHEMA_REVISION, "is_at_head": found == SCHEMA_REVISION})
        return
    print_line(f"{found or 'none'}{' (head)' if found == SCHEMA_REVISION else ''}")
    if found != SCHEMA_REVISION:
        tell(f"This version needs {SCHEMA_REVISION}; {remedy_for(found, SCHEMA_REVISION)}.")


@app.command()
def backup(
    file: Annotated[str, typer.Argument(metavar="FILE", help="The new file.", show_default=False)],
    database_url: DatabaseUrl = None,
) -> None:
    """Copy a SQLite database into a new file, whoever is using it.

    Copy the output folder afterwards, and prune nothing meanwhile: every file that the copy names is in it then.
    """
    if not file.strip():
        raise InvalidRequestError("FILE", "is empty", "name a new file")
    database = _database(database_url)
    if database.path is None:
        url = server_address(database.url._replace(password=None))
        command = f"pg_dump --format=custom --file={quote(file)} {quote(str(url))}"
        raise InvalidRequestError("FILE", "is for SQLite", f"run `{command}`")
    _back_up(database, database.path, Path(file))
    tell(f"The database {database} is copied into {file} ({size(Path(file).stat().st_size)}).")


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
            raise ArtifactError(f"FILE {target} cannot be written ({error.strerror}); name another place.") from None
        raise InvalidRequestError("FILE", f"cannot be written ({error.strerror})", "name another place") from None
    except sqlite3.Error as error:
        raise DatabaseUnavailableError(str(database), f"it could not be copied ({error})") from error


@asynccontextmanager
async def opened(database_url: str | None) -> AsyncIterator[Database]:
    """Give the default database of one command; an embedded one is created, which is told, and migrated."""
    url = load_settings(**given(database_url=database_url)).database_url
    path = file_of(normalise_url(url))
    is_new = path is not None and not path.exists()
    database = await init_db(url)
    if is_new:
        tell(f"Created the database {database}.")
    try:
        yield database
    finally:
        await close_db()


def exists(database: Database) -> bool:
    """Return False where the database is a file that is not there yet."""
    return database.path is None or database.path.exists()


async def find_generation(database: Database, wanted: str) -> Generation:
    """Return the generation with this id, or the only one whose id starts so."""
    start = check_name("ID", wanted).lower()
    async with database.session(read_only=True) as session:
        generation = await get_generation(session, start)
        if generation is None and len(start) >= _SHORTEST_PREFIX:
            ids = await find_generation_ids(session, start)
            if len(ids) > 1:
                raise InvalidRequestError("ID", f"{wanted!r} fits more than one generation", "give more of it")
            generation = await get_generation(session, ids[0]) if ids else None
    if generation is None:
        raise GenerationNotFoundError(wanted)
    return generation


def confirm(question: str, *, is_agreed: bool) -> None:
    """Return once a person, or ``--yes``, has agreed; raises ``typer.Exit`` where not, and where nobody can be asked.

    What comes through a pipe is nobody's answer.
    """
    if is_agreed:
        return
    if not sys.stdin.isatty():
        raise InvalidRequestError("--yes", "is missing and there is no terminal to ask on", "add it to go ahead")
    if not typer.confirm(plain(question), err=True):
        tell("Nothing was changed.")
        raise typer.Exit(1)


def _database(database_url: str | None) -> Database:
    return Database.from_settings(load_settings(**given(database_url=database_url)))


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
        tell(f"The database {database} is now at revision {SCHEMA_REVISION} (was: {before or 'none'}).")


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
