"""How a command opens its database, and finds a generation in it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from dgx_music.cli.options import given
from dgx_music.cli.output import distance, is_bounded, tell
from dgx_music.config import load_settings
from dgx_music.errors import BatchNotFoundError, GenerationNotFoundError, InvalidRequestError
from dgx_music.storage import Database, Generation, close_db, get_generation, init_db
from dgx_music.storage.batch_progress import read_batches
from dgx_music.storage.batches import find_named_batches
from dgx_music.storage.connection.urls import file_of, normalise_url
from dgx_music.storage.repository import count_end_characters, find_batch_ids, find_generation_ids
from dgx_music.validation import check_name

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_SHORTEST_END = 4
"""How many last characters of an id are shown at least; a shorter part must be in no other id."""
_MOST_NAMED = 3
_MOST_SHORTENED = 1_000


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
    """Return the generation with this id, or the one that this part of an id means.

    Raises ``GenerationNotFoundError``, or ``InvalidRequestError`` if the part fits several.
    """
    part = check_name("ID", wanted).lower()
    async with database.session(read_only=True) as session:
        generation = await get_generation(session, part)
        if generation is None:
            found = the_one_meant(wanted, await find_generation_ids(session, part))
            generation = await get_generation(session, found) if found else None
    if generation is None:
        raise GenerationNotFoundError(wanted)
    return generation


async def find_batch_id(database: Database, wanted: str) -> str:
    """Return the id of the batch with this id or name, or that this part of an id means.

    Raises ``BatchNotFoundError``, or ``InvalidRequestError`` if it fits several.
    """
    found = await look_for_batch(database, wanted, "--batch")
    if found is None:
        raise BatchNotFoundError(wanted)
    return found


async def look_for_batch(database: Database, wanted: str, field: str) -> str | None:
    """Return the id of the batch that this id, name, or part of an id means; ``None`` if none.

    Raises ``InvalidRequestError`` if there are several.
    """
    name = check_name(field, wanted)
    async with database.session(read_only=True) as session:
        ids = await find_named_batches(session, name)
        if len(ids) > 1:
            raise await _several_named(session, name, ids, field)
        if not ids:
            ids = await find_batch_ids(session, name.lower())
    return the_one_meant(name, ids, field)


async def find_generation_or_batch(database: Database, wanted: str) -> Generation | str:
    """Return the generation that this means, or else the id of the batch that it means.

    A whole id or a batch's name means more than a part of an id. Of several batches of that name it
    is the newest, and that is said. Raises what ``find_generation`` raises.
    """
    name = check_name("ID", wanted)
    async with database.session(read_only=True) as session:
        generation = await get_generation(session, name.lower())
        batch_ids = [] if generation else await find_named_batches(session, name)
    if len(batch_ids) > 1:
        tell(f"Several batches are called {name!r}; this is the newest, {batch_ids[0]}.")
    if whole := generation or next(iter(batch_ids), None):
        return whole
    try:
        return await find_generation(database, wanted)
    except GenerationNotFoundError:
        batch_id = await look_for_batch(database, wanted, "ID")
        if batch_id is None:
            raise GenerationNotFoundError(wanted, nor_batch=True) from None
        return batch_id


async def _several_named(
    session: AsyncSession, name: str, ids: Sequence[str], field: str
) -> InvalidRequestError:
    """Return the error that names the newest of these batches, their ages, and how far they are."""
    several = "; ".join(
        f"{each.id}: {distance(each.created_at)}, {each.finished:,} of {each.total:,}"
        for each in await read_batches(session, ids[:_MOST_NAMED])
    )
    more = "; …" if len(ids) > _MOST_NAMED else ""
    problem = f"{name!r} fits more than one"
    return InvalidRequestError(field, problem, f"give one of the ids ({several}{more})")


async def id_characters(session: AsyncSession, rows: Sequence[Generation]) -> int | None:
    """Return how many last characters of their ids mean these rows; ``None``: show the whole ids.

    Programs get whole ids.
    """
    if not rows or len(rows) > _MOST_SHORTENED or not is_bounded():
        return None
    return await count_end_characters(session, [row.id for row in rows], _SHORTEST_END)


def the_one_meant(part: str, ids: Sequence[str], field: str = "ID") -> str | None:
    """Return the one id that ends with this part, else the one that starts with it, or holds it.

    A part of few characters must be in no other id at all: it may be a slip of the finger. ``None``
    if there is none. Raises ``InvalidRequestError`` if there are several.
    """
    low = part.lower()
    ends, starts = (
        [each for each in ids if is_so(each, low)] for is_so in (str.endswith, str.startswith)
    )
    fitting = ends or starts or ids if len(part) >= _SHORTEST_END else ids
    if len(fitting) > 1:
        several = ", ".join(fitting[:_MOST_NAMED]) + (", …" if len(fitting) > _MOST_NAMED else "")
        problem = f"{part!r} fits more than one"
        is_part = all(low in each for each in fitting)
        remedy = "give more of it" if is_part else "give one of the ids"
        raise InvalidRequestError(field, problem, f"{remedy} ({several})")
    return fitting[0] if fitting else None
