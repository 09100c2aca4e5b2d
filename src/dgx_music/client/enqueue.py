"""Enqueue: one generation, many, or one from code without an event loop. Never imports torch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import anyio.to_thread
from typing_extensions import Unpack

from dgx_music.client.alike import check_alike
from dgx_music.client.requests import (
    CheckedRequests,
    Plan,
    RequestOptions,
    plan,
    plan_numbered,
    read_clips,
    takes_options,
)
from dgx_music.client.room import queue_limits
from dgx_music.client.transactions import transact
from dgx_music.config import load_settings
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.models import Generation
from dgx_music.storage.new_rows import keys_of
from dgx_music.storage.room import inserting
from dgx_music.storage.schema import dialect_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    Insert = Callable[[AsyncSession], Coroutine[Any, Any, list[Generation]]]


@takes_options
async def enqueue(
    prompt: str,
    *,
    session: AsyncSession | None = None,
    **options: Unpack[RequestOptions],
) -> Generation:
    """Add one generation to the queue and return its row.

    An empty prompt asks for unconditional music. With the caller's ``session`` the row is part of
    the caller's transaction: workers see it after the commit, and it is gone after a rollback.
    Without one it is committed at once. With ``variations`` the takes are a batch, and the first
    one is returned: its ``batch_id`` leads to the others. To get all of them, call ``enqueue_many``
    with a list of one prompt.

    Raises ``InvalidRequestError`` before anything is stored, ``IdempotencyConflictError`` if the
    key belongs to a different request, and ``QueueFullError`` if ``DGX_MUSIC_MAX_PENDING`` or
    ``DGX_MUSIC_MAX_PENDING_PER_TENANT`` is set and that many wait; a repeat of a stored request is
    never refused. On SQLite the limits are exact. On PostgreSQL, transactions that run at the same
    moment do not see each other's rows: together they can pass a limit by the rows of all of them
    but one. Requests of one process share its one transaction at a time, and pass no limit alone;
    but those with clips or more than 1,000 rows have one each, and so have those with keys while
    one of them waits for another producer with its key.
    """
    checked = await read_clips_beside([plan(prompt, cast("Mapping[str, Any]", options))])
    return (await store(checked.in_batch_if_many(), session=session))[0]


@takes_options
async def enqueue_many(
    requests: Iterable[str | Mapping[str, Any]],
    *,
    batch: str | None = None,
    session: AsyncSession | None = None,
    **options: Unpack[RequestOptions],
) -> list[Generation]:
    """Add many generations in one transaction, all or none; return their rows in the same order.

    Each request is a prompt, or a mapping with ``prompt`` and any of the options below. The options
    given as keywords apply to each request that does not have its own. An ``InvalidRequestError``
    names the request by its place, from 1.

    The new rows are a batch, also a single one; ``batch`` is its name. A row that exists under its
    idempotency key stays in the batch that it is in.
    """
    if isinstance(requests, str | bytes | Mapping) or not isinstance(requests, Iterable):
        remedy = "send a list of prompts, or call enqueue for one"
        raise InvalidRequestError("requests", "are not a list", remedy)
    checked = await check_many([*requests], cast("Mapping[str, Any]", options))
    return await store(checked.in_batch(batch), session=session)


@takes_options
def enqueue_sync(prompt: str, **options: Unpack[RequestOptions]) -> Generation:
    """Add one generation from code without an event loop, and return its row.

    It uses a connection of its own. Raises ``RuntimeError`` inside an event loop (await ``enqueue``
    there), and what ``enqueue`` raises.
    """
    if _is_in_event_loop():
        raise RuntimeError(
            "enqueue_sync would block the event loop that runs here; await enqueue(...) instead."
        )
    checked = read_clips([plan(prompt, cast("Mapping[str, Any]", options))])
    return asyncio.run(_store_alone(checked.in_batch_if_many()))


async def store(
    checked: CheckedRequests, *, session: AsyncSession | None = None
) -> list[Generation]:
    """Add the generations of requests in one transaction, all or none, and return their rows."""
    limits = queue_limits()
    if session is None:
        # ends in storage/insertion.py: insert_generations
        return await (await ensure_database()).insert(checked.rows, checked.clips, limits)
    insert = inserting(checked.rows, checked.clips, limits)
    if keys_of(checked.rows) and (len(checked.rows) > 1 or checked.rows[0]["batch_id"]):
        insert = partial(_all_or_none, insert)
    return await transact(session, partial(_insert_and_add, insert))


async def _insert_and_add(insert: Insert, session: AsyncSession) -> list[Generation]:
    """Insert in the caller's session, which has the objects then as if it had read them."""
    made = await insert(session)
    session.add_all(made)
    return made


async def _all_or_none(insert: Insert, session: AsyncSession) -> list[Generation]:
    """Insert in the caller's transaction, which may go on after a conflict of keys.

    On PostgreSQL a key may turn out to be another producer's only when the other rows are there.
    """
    if dialect_of(session) != "postgresql":
        return await insert(session)
    connection = await session.connection()  # the session's own savepoints look like its commits
    async with connection.begin_nested():
        return await insert(session)


async def _store_alone(checked: CheckedRequests) -> Generation:
    database = Database.from_settings(load_settings())
    try:
        await database.prepare()
        return (await database.insert(checked.rows, checked.clips, queue_limits()))[0]
    finally:
        await database.dispose()


async def check_many(requests: Sequence[object], options: Mapping[str, Any]) -> CheckedRequests:
    """Return the checked requests: each a prompt, or a mapping with one and options of its own.

    Raises ``InvalidRequestError`` that names the first refused one by its place, from 1.
    """
    if (alike := check_alike(requests, options)) is not None:
        return alike
    plans = [plan_numbered(number, each, options) for number, each in enumerate(requests, 1)]
    return await read_clips_beside(plans)


async def read_clips_beside(plans: Sequence[Plan]) -> CheckedRequests:
    """Read clips in a thread; without any, the thread would only take time."""
    read = partial(read_clips, plans)
    return await anyio.to_thread.run_sync(read) if any(plan.sources for plan in plans) else read()


def _is_in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
