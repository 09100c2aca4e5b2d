"""The first transition of a row's life: into the queue, in the caller's own transaction.

One call keeps the clips, adds the batches, counts the prompts, and inserts the generations. A
repeated idempotency key inserts nothing and gives the row that is there already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from operator import is_, itemgetter
from typing import Any, cast

from sqlalchemy import CTE, BigInteger, DefaultClause, Text, bindparam, column, func, select, true
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import IdempotencyConflictError
from dgx_music.statuses import PENDING
from dgx_music.storage.batches import add_batches, added_batches, drop_batches
from dgx_music.storage.clips import hold_clips, keep_clips
from dgx_music.storage.connection.direct import DirectSession
from dgx_music.storage.connection.sessions import start_to_finish
from dgx_music.storage.generation import CLIP_COLUMNS, Generation, as_inserted, g, generations
from dgx_music.storage.prepared import Prepared, as_json, json_rows_sharing
from dgx_music.storage.prompts import (
    count_on_sqlite,
    counted_prompt,
    counted_prompts,
    uncount_prompt_uses,
    use_of,
    uses_of,
)
from dgx_music.storage.schema import UtcDateTime, dialect_of, now, written

Row = Mapping[str, Any]
"""The columns of a new generation, by their names; ``wanted_run_at`` is ``None`` to run at once.

``batch_name`` is the name of the batch that ``batch_id`` identifies.
"""

_CHUNK = 1_000


async def insert_generations(
    session: AsyncSession, rows: Sequence[Row], clips: Mapping[str, tuple[bytes, float]]
) -> list[Generation]:
    """Insert these rows and return the generations in the same order.

    ``clips`` holds the content and the seconds of each clip that a row refers to, by ``sha256``; a
    clip that is not among them must be stored already. A row whose idempotency key exists is not
    inserted: the existing generation is returned in its place. A batch is added with its first row.
    Raises ``IdempotencyConflictError`` if an existing row belongs to a different request.
    """
    by_key = await find_by_key(session, rows)
    fresh = _without_repeats(rows, by_key)
    batches = {row["batch_id"]: row["batch_name"] for row in fresh if row["batch_id"]}
    to_add: Mapping[str, str | None] = batches
    inserted: dict[str, Generation] = {}
    while fresh:
        inserted |= {row.id: row for row in await _insert_fresh(session, fresh, clips, to_add)}
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
    if len(inserted) < len(rows):
        if batches:
            used = {row.batch_id for row in inserted.values()}
            await drop_batches(session, batches.keys() - used)
        by_key |= {
            row.idempotency_key: row for row in inserted.values() if row.idempotency_key is not None
        }
    return [inserted.get(row["id"]) or by_key[row["idempotency_key"]] for row in rows]


async def insert_all(
    rows: Sequence[Row], clips: Mapping[str, tuple[bytes, float]], session: AsyncSession
) -> list[Generation]:
    """Do ``insert_generations`` as the work of a transaction."""
    return await insert_generations(session, rows, clips)


def is_single(rows: Sequence[Row]) -> bool:
    """Return True if PostgreSQL inserts these rows with one statement, and nothing beside it."""
    return len(rows) <= _CHUNK and not any(any(_waits_for(row)) for row in rows)


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
    keys = sorted({row["idempotency_key"] for row in rows} - {None})
    found: dict[str, Generation] = {}
    for start in range(0, len(keys), _CHUNK):
        is_among = Generation.idempotency_key.in_(keys[start : start + _CHUNK])
        query = select(Generation).where(is_among)
        found |= {str(row.idempotency_key): row for row in await session.scalars(query)}
    return found


async def _insert_fresh(
    session: AsyncSession,
    rows: list[Row],
    clips: Mapping[str, tuple[bytes, float]],
    batches: Mapping[str, str | None],
) -> list[Generation]:
    """Keep the rows' clips, count their prompts, insert them; return those whose key was free.

    ``batches`` are added before them.
    """
    used = {row[name] for row in rows for name in CLIP_COLUMNS} - {None}
    if used:
        await keep_clips(session, {sha256: clips[sha256] for sha256 in used & clips.keys()})
        await hold_clips(session, used - clips.keys())
    # In one order: two batches must not wait for each other in a circle.
    rows = sorted(rows, key=lambda row: row["idempotency_key"] or "")
    insert = _insert_on_postgres if dialect_of(session) == "postgresql" else _insert_on_sqlite
    inserted = await insert(session, rows, batches)
    if isinstance(session, DirectSession):  # of our own, and about to close
        return inserted
    session.add_all(inserted)
    return inserted


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
        _add_times(_as_inserted(row), row["prompt_id"], at, row["run_at"])
        for row in wanted
        if row["id"] not in raced
    ]


async def _find_raced(session: AsyncSession, rows: list[Row]) -> set[str]:
    """Return the ids that were not inserted: another producer was faster with the same key."""
    ids = [row["id"] for row in rows if row["idempotency_key"] is not None]
    found: set[str] = set()
    for start in range(0, len(ids), _CHUNK):
        query = select(g.id).where(g.id.in_(ids[start : start + _CHUNK]))
        found.update(await session.scalars(query))
    return {*ids} - found


async def _insert_on_postgres(
    session: AsyncSession, rows: list[Row], batches: Mapping[str, str | None]
) -> list[Generation]:
    if len(rows) == 1 and rows[0]["idempotency_key"] is None and not batches:
        return [await _insert_one(session, rows[0])]
    inserted: list[Generation] = []
    for start in range(0, len(rows), _CHUNK):
        inserted += await _insert_chunk(session, rows[start : start + _CHUNK], batches)
        batches = {}
    return inserted


async def _insert_one(session: AsyncSession, row: Row) -> Generation:
    """Insert a row without a key: the statement for many takes the server a third longer."""
    values = {**row, **use_of(row["prompt"])}
    (made,) = await _INSERT_ONE_ON_POSTGRES.rows(session, values)
    return _add_times(_as_inserted(row), made.prompt_id, made.created_at, made.run_at)


async def _insert_chunk(
    session: AsyncSession, rows: list[Row], batches: Mapping[str, str | None]
) -> list[Generation]:
    shared, own = _split(rows)
    values = {
        "shared": as_json(shared),
        "rows": as_json(own),
        "texts": as_json(uses_of(row["prompt"] for row in rows)),
    }
    if batches:
        values["batches"] = as_json([{"id": key, "name": batches[key]} for key in batches])
    if any(row["idempotency_key"] for row in rows):
        return await _insert_with_keys(session, rows, values)
    asked = start_to_finish(_INSERTS_ON_POSTGRES[bool(batches)].rows(session, values))
    await asyncio.sleep(0)  # it begins now; while the server works, the objects are made
    objects = [_as_inserted(row) for row in rows]
    (made,) = await asked
    prompt_ids = dict(zip(made.texts or (), made.prompt_ids or (), strict=True))
    return [
        _add_times(each, prompt_ids.get(row["prompt"]), made.at, row["wanted_run_at"] or made.at)
        for each, row in zip(objects, rows, strict=True)
    ]


async def _insert_with_keys(
    session: AsyncSession, rows: list[Row], values: Mapping[str, Any]
) -> list[Generation]:
    statement = _INSERTS_WITH_KEYS_ON_POSTGRES["batches" in values]
    made = {row.id: row for row in await statement.rows(session, values)}
    found = [(row, made[row["id"]]) for row in rows]
    raced = [(row, at) for row, at in found if at.created_at is None]
    counted = [row["prompt"] for row, at in raced if at.prompt_id is not None]
    await uncount_prompt_uses(session, counted)
    return [
        _add_times(_as_inserted(row), at.prompt_id, at.created_at, at.run_at)
        for row, at in found
        if at.created_at is not None
    ]


def _split(rows: list[Row]) -> tuple[Row, list[Row]]:
    """Return what these rows have in common, and what each has of its own: so the JSON is short.

    Only the same objects count as equal: ``1`` and ``True`` are equal, but not as JSON.
    """
    first = _rest_of(rows[0])
    if all(all(map(is_, first, _rest_of(row))) for row in rows):
        shared = dict(zip(_REST, first, strict=True))
        return shared, [{name: row[name] for name in _OWN} for row in rows]
    return {}, [{name: row[name] for name in (*_OWN, *_REST)} for row in rows]


def _as_inserted(row: Row) -> Generation:
    """Return the object of a row; what the database adds to it is still missing."""
    values = dict(zip(_ATTRIBUTES, _values_of(row), strict=True))
    values["sampling"] = dict(values["sampling"])  # rows of one batch share theirs
    return as_inserted(values)


def _add_times(
    generation: Generation, prompt_id: int | None, created_at: datetime, run_at: datetime
) -> Generation:
    """Add what the database has added to the row."""
    vars(generation).update(prompt_id=prompt_id, created_at=created_at, run_at=run_at)
    return generation


_GIVEN = (
    *("id", "prompt", "model_name", "duration_seconds", "sample_rate", "channels", "sampling"),
    *CLIP_COLUMNS,
    *("priority", "tenant", "max_attempts", "idempotency_key", "request_hash", "metadata"),
    *("audio_format", "batch_id", "take", "parent_id"),
    *("title", "notes", "tags", "is_starred", "search_text"),
)
"""The columns that a request gives; the database adds the others."""


def _insert_on_sqlite_statement() -> Any:
    values = _parameters((*_GIVEN, "prompt_id", "created_at", "run_at"))
    # Else SQLAlchemy would expect a parameter for each of them.
    rest = (each for each in g if each.default and each.name not in values)
    defaults = {each.name: cast("DefaultClause", each.server_default).arg for each in rest}
    values |= defaults | {"status": written(PENDING)}
    return (
        sqlite.insert(generations)
        .values(values)
        .on_conflict_do_nothing(index_elements=["idempotency_key"])
    )


def _parameters(names: Sequence[str]) -> dict[str, Any]:
    """Return the parameter of each of these columns; it has the name of the attribute."""
    return {name: bindparam(_attribute(name), type_=g[name].type) for name in names}


def _attribute(column_name: str) -> str:
    return "metadata_" if column_name == "metadata" else column_name


def _insert_one_on_postgres_statement() -> Any:
    """Return PostgreSQL's INSERT of a row without a key, which counts its prompt as well."""
    counted = counted_prompt()
    run_at = func.coalesce(bindparam("wanted_run_at", type_=UtcDateTime), now())
    values = _parameters(_GIVEN) | {
        "prompt_id": select(counted.c.id).scalar_subquery(),
        "run_at": run_at,
    }
    row = select(*values.values())
    statement = postgresql.insert(generations).from_select(list(values), row, False)
    return statement.returning(g.prompt_id, g.created_at, g.run_at)


def _insert_on_postgres_statement(*, has_batches: bool) -> Any:
    """Return PostgreSQL's INSERT of any number of rows without keys, which counts their prompts.

    It returns one row: ``texts`` and ``prompt_ids`` of the prompts that it counted, two arrays, and
    ``at``, the time of the database.
    """
    clock = _clock()
    _, counted, _, insert = _parts_of_insert(clock)
    query = select(
        func.array_agg(counted.c.text, type_=ARRAY(Text)).label("texts"),
        func.array_agg(counted.c.id, type_=ARRAY(BigInteger)).label("prompt_ids"),
        select(clock.c.at).scalar_subquery().label("at"),
    ).add_cte(insert.cte("inserted"))
    return query.add_cte(added_batches()) if has_batches else query


def _insert_with_keys_on_postgres_statement(*, has_batches: bool) -> Any:
    """Return PostgreSQL's INSERT of any number of rows, those whose keys are free.

    It returns all of them: with ``prompt_id`` what was counted, with times what was inserted. Rows
    without keys meet no others: to look for them takes the server time.
    """
    given, counted, of_prompts, insert = _parts_of_insert(_clock())
    insert = insert.on_conflict_do_nothing(index_elements=["idempotency_key"])
    inserted = insert.returning(g.id, g.created_at, g.run_at).cte("inserted")
    query = select(
        given.c.id,
        counted.c.id.label("prompt_id"),
        inserted.c.created_at,
        inserted.c.run_at,
    ).select_from(of_prompts.outerjoin(inserted, inserted.c.id == given.c.id))
    return query.add_cte(added_batches()) if has_batches else query


def _clock() -> CTE:
    """Return the time ``at`` at which the rows of a statement are created, the same for all."""
    return select(now().label("at")).cte("clock").prefix_with("MATERIALIZED")


def _parts_of_insert(clock: CTE) -> tuple[CTE, CTE, Any, postgresql.Insert]:
    """Return the rows given, the prompts counted, both joined, and the INSERT of these."""
    names = {name: _attribute(name) for name in _GIVEN}
    columns = [column(name, g[each].type) for each, name in names.items()]
    given = json_rows_sharing("shared", "rows", [*columns, column("wanted_run_at", UtcDateTime)])
    counted = counted_prompts()
    of_prompts = given.outerjoin(counted, counted.c.text == given.c.prompt)
    chosen = (
        select(
            *(given.c[name] for name in names.values()),
            counted.c.id,
            clock.c.at,
            func.coalesce(given.c.wanted_run_at, clock.c.at),
        )
        .select_from(of_prompts.join(clock, true()))
        .order_by(given.c.idempotency_key, given.c.id)
    )
    into = [*names, "prompt_id", "created_at", "run_at"]
    insert = postgresql.insert(generations).from_select(into, chosen, include_defaults=False)
    return given, counted, of_prompts, insert


_waits_for = itemgetter("idempotency_key", *CLIP_COLUMNS)
_OWN = ("id", "prompt", "request_hash")
"""The columns that rows never have in common, even if they are alike."""
_ATTRIBUTES = tuple(map(_attribute, _GIVEN))
_values_of = itemgetter(*_ATTRIBUTES)
_REST = ("wanted_run_at", *(name for name in _ATTRIBUTES if name not in _OWN))
_rest_of = itemgetter(*_REST)
_INSERT_ON_SQLITE = Prepared(_insert_on_sqlite_statement)
_INSERT_ONE_ON_POSTGRES = Prepared(_insert_one_on_postgres_statement)
_INSERTS_ON_POSTGRES, _INSERTS_WITH_KEYS_ON_POSTGRES = (
    {has: Prepared(partial(statement, has_batches=has)) for has in (False, True)}
    for statement in (_insert_on_postgres_statement, _insert_with_keys_on_postgres_statement)
)
"""By whether batches are added with them."""
