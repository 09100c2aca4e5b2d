"""The first transition of a row's life: into the queue, in the caller's own transaction.

One call keeps the clips, adds the batches, counts the prompts, and inserts the generations. A
repeated idempotency key inserts nothing and gives the row that is there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import DefaultClause, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import IdempotencyConflictError
from dgx_music.statuses import PENDING
from dgx_music.storage.batches import add_batches, drop_batches
from dgx_music.storage.clips import hold_clips, keep_clips
from dgx_music.storage.connection.postgres_errors import is_taken
from dgx_music.storage.generation import CLIP_COLUMNS, Generation, g, generations
from dgx_music.storage.insertion_postgres import insert_on_postgres, is_single
from dgx_music.storage.new_rows import (
    GIVEN,
    AlikeRows,
    Row,
    add_times,
    keys_of,
    object_of,
    parameters,
)
from dgx_music.storage.prepared import Prepared, as_json
from dgx_music.storage.prompts import count_on_sqlite, uncount_prompt_uses
from dgx_music.storage.schema import commits_each_statement, dialect_of, is_among, written

_CHUNK = 1_000
"""How many rows are read at a time."""


async def insert_generations(
    session: AsyncSession,
    rows: Sequence[Row],
    clips: Mapping[str, tuple[bytes, float]],
    lock_timeout: str | None = None,
) -> list[Generation]:
    """Insert these rows and return the generations in the same order.

    ``clips`` holds the content and the seconds of each clip that a row refers to, by ``sha256``; a
    clip that is not among them must be stored already. A row whose idempotency key exists is not
    inserted: the existing generation is returned in its place. A batch is added with its first row.
    The objects are in no session. Raises ``IdempotencyConflictError`` if an existing row belongs to
    a different request.

    On PostgreSQL it waits for another open transaction that has inserted a key of them: for a
    ``lock_timeout``, or until that transaction ends or the statement's own timeout is over.
    """
    if isinstance(rows, AlikeRows):
        return await _insert(session, rows, _batches_of([rows.shared]))
    is_on_postgres = dialect_of(session) == "postgresql"
    if is_on_postgres and is_single(rows) and commits_each_statement(session):
        return await _insert_by_one_statement(session, rows, lock_timeout)
    by_key = await find_by_key(session, rows)
    fresh = _without_repeats(rows, by_key)
    batches = _batches_of(fresh)
    to_add: Mapping[str, str | None] = batches
    inserted: dict[str, Generation] = {}
    while fresh:
        await _keep_clips(session, fresh, clips)
        made = await _insert(session, _in_order_of_keys(fresh), to_add, lock_timeout)
        inserted |= {row.id: row for row in made}
        to_add = {}
        # Another producer was faster with the same key.
        raced = [row for row in fresh if row["id"] not in inserted]
        found = await find_by_key(session, raced)
        for row in raced:
            if (owner := found.get(row["idempotency_key"])) is not None:
                _check_same_request(row, owner.id, owner.request_hash)
        by_key |= found
        # The other producer's row is gone again: insert once more.
        fresh = [row for row in raced if row["idempotency_key"] not in found]
    await drop_batches(session, batches.keys() - {row.batch_id for row in inserted.values()})
    return _in_order(rows, inserted.values(), by_key)


async def _insert_by_one_statement(
    session: AsyncSession, rows: Sequence[Row], lock_timeout: str | None
) -> list[Generation]:
    """Insert rows without clips where each statement is a transaction: all, or none if one fails.

    Another producer may be faster with the same key: then the statement fails, and what that
    producer has stored is found.
    """
    while True:
        by_key = await find_by_key(session, rows)
        fresh = _without_repeats(rows, by_key)
        try:
            inserted = await insert_on_postgres(
                session, fresh, _batches_of(fresh), lock_timeout, must_be_free=True
            )
        except DBAPIError as error:
            if not is_taken(error, "uq_generations_idempotency_key"):
                raise
        else:
            return _in_order(rows, inserted, by_key)


def _in_order(
    rows: Sequence[Row], inserted: Iterable[Generation], by_key: Mapping[str, Generation]
) -> list[Generation]:
    """Return the generation of each row: the one inserted for it, or the one that has its key."""
    by_id = {row.id: row for row in inserted}
    if len(by_id) < len(rows):
        own = {row.idempotency_key: row for row in by_id.values() if row.idempotency_key}
        by_key = {**by_key, **own}
    return [by_id.get(row["id"]) or by_key[row["idempotency_key"]] for row in rows]


def _batches_of(rows: Sequence[Row]) -> dict[str, str | None]:
    """Return the names of the batches of these rows, by id."""
    return {row["batch_id"]: row["batch_name"] for row in rows if row["batch_id"]}


def _without_repeats(rows: Sequence[Row], by_key: Mapping[str, Generation]) -> list[Row]:
    """Return the rows to insert: those without a key, and the first of each new key."""
    owners = {key: (found.id, found.request_hash) for key, found in by_key.items()}
    for row in rows:
        if (key := row["idempotency_key"]) is not None:
            _check_same_request(row, *owners.setdefault(key, (row["id"], row["request_hash"])))
    return [row for row in rows if owners.get(row["idempotency_key"], (row["id"],))[0] == row["id"]]


def _check_same_request(row: Row, owner_id: str, request_hash: str | None) -> None:
    if request_hash != row["request_hash"]:
        raise IdempotencyConflictError(row["idempotency_key"], owner_id)


async def find_by_key(session: AsyncSession, rows: Sequence[Row]) -> dict[str, Generation]:
    """Return the generations that have the idempotency keys of these rows, by key."""
    keys = keys_of(rows)
    # Usually none is stored yet, and this finds that out at little cost.
    if not keys or not (found := await _HAVE_KEYS.rows(session, {"keys": as_json([*keys])})):
        return {}
    ids, by_key = [row.id for row in found], dict[str, Generation]()
    for start in range(0, len(ids), _CHUNK):
        query = select(Generation).where(Generation.id.in_(ids[start : start + _CHUNK]))
        by_key |= {str(row.idempotency_key): row for row in await session.scalars(query)}
    return by_key


def _in_order_of_keys(rows: Iterable[Row]) -> list[Row]:
    """Return the rows in the one order: two inserts must not wait for each other in a circle."""
    return sorted(rows, key=lambda row: row["idempotency_key"] or "")


async def _keep_clips(
    session: AsyncSession, rows: list[Row], clips: Mapping[str, tuple[bytes, float]]
) -> None:
    """Store the clips that the rows refer to, and hold those that are stored already."""
    used = {row[name] for row in rows for name in CLIP_COLUMNS} - {None}
    if used:
        await keep_clips(session, {sha256: clips[sha256] for sha256 in used & clips.keys()})
        await hold_clips(session, used - clips.keys())


async def _insert(
    session: AsyncSession,
    rows: Sequence[Row],
    batches: Mapping[str, str | None],
    lock_timeout: str | None = None,
) -> list[Generation]:
    """Add the batches, count the prompts, insert the rows; return those whose key was free."""
    if dialect_of(session) == "postgresql":
        return await insert_on_postgres(session, rows, batches, lock_timeout)
    return await _insert_on_sqlite(session, [*rows], batches)


async def _insert_on_sqlite(
    session: AsyncSession, rows: list[Row], batches: Mapping[str, str | None]
) -> list[Generation]:
    await add_batches(session, batches)
    prompts = await count_on_sqlite(session, [row["prompt"] for row in rows])
    at = prompts[rows[-1]["prompt"]].now
    wanted = [
        {
            **row,
            "prompt_id": prompts[row["prompt"]].id,
            "created_at": at,
            "run_at": row["wanted_run_at"] or at,
        }
        for row in rows
    ]
    await _INSERT_ON_SQLITE.insert_each(session, wanted)
    if raced := await _find_raced(session, rows):
        await uncount_prompt_uses(session, [row["prompt"] for row in rows if row["id"] in raced])
    return [
        add_times(object_of(row), row["prompt_id"], at, row["run_at"])
        for row in wanted
        if row["id"] not in raced
    ]


async def _find_raced(session: AsyncSession, rows: list[Row]) -> set[str]:
    """Return the ids that were not inserted: another producer was faster with the same key."""
    ids = [row["id"] for row in rows if row["idempotency_key"] is not None]
    if not ids:
        return set()
    return {*ids} - {row.id for row in await _ARE_STORED.rows(session, {"ids": as_json(ids)})}


def _insert_on_sqlite_statement() -> Any:
    values = parameters((*GIVEN, "prompt_id", "created_at", "run_at"))
    # Else SQLAlchemy would expect a parameter for each of them.
    rest = (each for each in g if each.default and each.name not in values)
    defaults = {each.name: cast("DefaultClause", each.server_default).arg for each in rest}
    values |= defaults | {"status": written(PENDING)}
    return (
        sqlite.insert(generations)
        .values(values)
        .on_conflict_do_nothing(index_elements=["idempotency_key"])
    )


_INSERT_ON_SQLITE = Prepared(_insert_on_sqlite_statement)
_HAVE_KEYS = Prepared(lambda: select(g.id).where(is_among(g.idempotency_key, "keys")))
_ARE_STORED = Prepared(lambda: select(g.id).where(is_among(g.id, "ids")))
