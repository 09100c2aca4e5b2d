"""How a command opens its database, and finds a generation in it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dgx_music.cli.options import given
from dgx_music.cli.output import tell
from dgx_music.config import load_settings
from dgx_music.errors import GenerationNotFoundError, InvalidRequestError
from dgx_music.storage import Database, Generation, close_db, get_generation, init_db
from dgx_music.storage.connection.urls import file_of, normalise_url
from dgx_music.storage.repository import find_generation_ids
from dgx_music.validation import check_name

_SHORTEST_PREFIX = 8


@asynccontextmanager
async def opened(database_url: str | None) -> AsyncIterator[Database]:
    """Give the default database of one command; a SQLite file is created and migrated."""
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
    """Return False if the database is a file that is not there yet."""
    return database.path is None or database.path.exists()


async def find_generation(database: Database, wanted: str) -> Generation:
    """Return the generation with this id, or the only one whose id starts with this text.

    Raises ``GenerationNotFoundError``, or ``InvalidRequestError`` if several ids start so.
    """
    start = check_name("ID", wanted).lower()
    async with database.session(read_only=True) as session:
        generation = await get_generation(session, start)
        if generation is None and len(start) >= _SHORTEST_PREFIX:
            ids = await find_generation_ids(session, start)
            if len(ids) > 1:
                raise InvalidRequestError(
                    "ID",
                    f"{wanted!r} fits more than one generation",
                    "give more of it",
                )
            generation = await get_generation(session, ids[0]) if ids else None
    if generation is None:
        raise GenerationNotFoundError(wanted)
    return generation
