"""The insert of new rows on PostgreSQL: one statement, which counts their prompts as well.

There is a statement for one row, for rows that are alike, for any rows, and for rows whose keys
other producers may have: what a statement need not look at takes the server no time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    Text,
    bindparam,
    case,
    cast,
    column,
    func,
    select,
    true,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.batches import added_batches
from dgx_music.storage.connection.sessions import start_to_finish
from dgx_music.storage.generation import Generation, g, generations
from dgx_music.storage.new_rows import (
    GIVEN,
    AlikeRows,
    Row,
    add_times,
    attribute,
    have_clips,
    keys_of,
    object_of,
    parameters,
)
from dgx_music.storage.prepared import Prepared, as_json, json_rows
from dgx_music.storage.prompts import (
    counted_prompt,
    counted_prompts,
    uncount_prompt_uses,
    use_of,
    uses_of,
)
from dgx_music.storage.schema import Id, LongText, UtcDateTime, now

CHUNK = 1_000
"""How many rows a statement inserts."""


def is_single(rows: Sequence[Row]) -> bool:
    """Return True if one statement inserts these rows, and nothing is written beside it."""
    return len(rows) <= CHUNK and not have_clips(rows)


async def insert_on_postgres(
    session: AsyncSession,
    rows: Sequence[Row],
    batches: Mapping[str, str | None],
    lock_timeout: str | None = None,
    *,
    must_be_free: bool = False,
) -> list[Generation]:
    """Add the batches, count the prompts, insert the rows; return those whose key was free.

    If the keys ``must_be_free``, one that is not is an error of the database, and undoes all.
    ``lock_timeout`` is PostgreSQL's setting for how long to wait for a rival's transaction.
    """
    may_meet = not must_be_free and bool(keys_of(rows))
    if len(rows) == 1 and not may_meet and not batches:
        return [await _insert_one(session, rows[0], lock_timeout)]
    inserted: list[Generation] = []
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        values = _values(chunk, batches) | {"lock_timeout": lock_timeout}
        insert = _insert_those_free if may_meet else _insert_all
        inserted += await insert(session, chunk, values)
        batches = {}
    return inserted


def _values(rows: Sequence[Row], batches: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the parameters that hold rows and batches."""
    values = uses_of(_prompts_of(rows))
    if isinstance(rows, AlikeRows):
        values |= {"shared": as_json(rows.shared), "ids": rows.ids, "prompts": rows.prompts}
    else:
        values["rows"] = as_json(rows)
    if batches:
        values["batches"] = as_json([{"id": key, "name": batches[key]} for key in batches])
    return values


def _prompts_of(rows: Sequence[Row]) -> Sequence[str]:
    return rows.prompts if isinstance(rows, AlikeRows) else [row["prompt"] for row in rows]


async def _insert_one(session: AsyncSession, row: Row, lock_timeout: str | None) -> Generation:
    """Insert a row by itself: the statement for many takes the server a third longer."""
    values = {**row, **use_of(row["prompt"]), "lock_timeout": lock_timeout}
    (made,) = await _INSERT_ONE.rows(session, values)
    return add_times(object_of(row), made.prompt_id, made.created_at, made.run_at)


async def _insert_all(
    session: AsyncSession, rows: Sequence[Row], values: Mapping[str, Any]
) -> list[Generation]:
    insert = (_INSERT_ALIKE if isinstance(rows, AlikeRows) else _INSERT)["batches" in values]
    asked = start_to_finish(insert.rows(session, values))
    await asyncio.sleep(0)  # it begins now; while the server works, the objects are made
    objects = [object_of(row) for row in rows]
    wanted = [(row["prompt"], row["wanted_run_at"]) for row in rows]
    (made,) = await asked
    prompt_ids = dict(zip(made.texts or (), made.prompt_ids or (), strict=True))
    return [
        add_times(each, prompt_ids.get(prompt), made.at, run_at or made.at)
        for each, (prompt, run_at) in zip(objects, wanted, strict=True)
    ]


async def _insert_those_free(
    session: AsyncSession, rows: Sequence[Row], values: Mapping[str, Any]
) -> list[Generation]:
    statement = _INSERT_THOSE_FREE["batches" in values]
    made = {row.id: row for row in await statement.rows(session, values)}
    found = [(row, made[row["id"]]) for row in rows]
    raced = [(row, at) for row, at in found if at.created_at is None]
    counted = [row["prompt"] for row, at in raced if at.prompt_id is not None]
    await uncount_prompt_uses(session, counted)
    return [
        add_times(object_of(row), at.prompt_id, at.created_at, at.run_at)
        for row, at in found
        if at.created_at is not None
    ]


# ---------------------------------------------------------------------------------- the statements


def _insert_one_statement() -> Any:
    """Return the INSERT of a row, which fails if its key is taken."""
    counted = counted_prompt()
    run_at = func.coalesce(bindparam("wanted_run_at", type_=UtcDateTime), now())
    values = parameters(GIVEN) | {
        "prompt_id": select(counted.c.id).scalar_subquery(),
        "run_at": run_at,
    }
    row = select(*values.values()).where(_set_lock_timeout().is_not(None))
    statement = postgresql.insert(generations).from_select(list(values), row, False)
    return statement.returning(g.prompt_id, g.created_at, g.run_at)


def _insert_statement(given: Callable[[], CTE], *, has_batches: bool) -> Any:
    """Return the INSERT of the given rows, which fails if a key of theirs is taken.

    It returns one row: ``texts`` and ``prompt_ids`` of the prompts that it counted, two arrays, and
    ``at``, the time of the database.
    """
    rows, counted, clock = given(), counted_prompts(), _clock()
    order = () if given is _given_alike else _order_of_keys(rows)
    insert = _insert_of(rows, _with_prompts(rows, counted), counted, clock, order)
    query = select(
        func.array_agg(counted.c.text, type_=ARRAY(Text)).label("texts"),
        func.array_agg(counted.c.id, type_=ARRAY(BigInteger)).label("prompt_ids"),
        select(clock.c.at).scalar_subquery().label("at"),
    ).add_cte(insert.cte("inserted"))
    return query.add_cte(added_batches()) if has_batches else query


def _insert_those_free_statement(*, has_batches: bool) -> Any:
    """Return the INSERT of the given rows whose keys are free.

    It returns all of them: with ``prompt_id`` what was counted, with times what was inserted.
    """
    rows, counted, clock = _given_rows(), counted_prompts(), _clock()
    with_prompts = _with_prompts(rows, counted)
    insert = _insert_of(rows, with_prompts, counted, clock, _order_of_keys(rows))
    insert = insert.on_conflict_do_nothing(index_elements=["idempotency_key"])
    inserted = insert.returning(g.id, g.created_at, g.run_at).cte("inserted")
    query = select(
        rows.c.id,
        counted.c.id.label("prompt_id"),
        inserted.c.created_at,
        inserted.c.run_at,
    ).select_from(with_prompts.outerjoin(inserted, inserted.c.id == rows.c.id))
    return query.add_cte(added_batches()) if has_batches else query


def _given_rows() -> CTE:
    """Return the rows of the parameter ``rows``, a JSON array."""
    return json_rows("rows", _columns(GIVEN))


def _given_alike() -> CTE:
    """Return the rows of an ``AlikeRows``: of the parameters ``shared``, ``ids`` and ``prompts``."""
    ids, prompts = bindparam("ids", type_=ARRAY(Id)), bindparam("prompts", type_=ARRAY(LongText))
    each = func.unnest(ids, prompts).table_valued(column("id", Id), column("prompt", LongText))
    own = each.render_derived(name="own")
    record = func.jsonb_to_record(cast(bindparam("shared", type_=Text), JSONB))
    names = [name for name in GIVEN if name not in own.c]
    shared = record.table_valued(*_columns(names), name="shared").render_derived(with_types=True)
    rows = select(*own.c, *shared.c).select_from(own.join(shared, true()))
    return rows.cte("given_rows")


def _columns(names: Sequence[str]) -> list[Any]:
    given = [column(attribute(name), g[name].type) for name in names]
    return [*given, column("wanted_run_at", UtcDateTime)]


def _order_of_keys(rows: CTE) -> tuple[Any, Any]:
    """Return the one order of inserts: two of them must not wait for each other in a circle."""
    return rows.c.idempotency_key, rows.c.id


def _clock() -> CTE:
    """Return the time ``at`` at which the rows of a statement are created, the same for all.

    Reading it, before the first row is inserted, also sets the statement's ``lock_timeout``.
    """
    once = select(now().label("at"), _set_lock_timeout().label("lock_timeout"))
    return once.cte("clock").prefix_with("MATERIALIZED")


def _set_lock_timeout() -> ColumnElement[str]:
    """Return what sets ``lock_timeout`` for the rest of the transaction, if one is given."""
    given = bindparam("lock_timeout", type_=Text)
    return case((given.is_not(None), func.set_config("lock_timeout", given, true())), else_="")


def _with_prompts(rows: CTE, counted: CTE) -> Any:
    return rows.outerjoin(counted, counted.c.text == rows.c.prompt)


def _insert_of(
    rows: CTE, with_prompts: Any, counted: CTE, clock: CTE, order: Sequence[Any] = ()
) -> postgresql.Insert:
    chosen = (
        select(
            *(rows.c[attribute(name)] for name in GIVEN),
            counted.c.id,
            clock.c.at,
            func.coalesce(rows.c.wanted_run_at, clock.c.at),
        )
        .select_from(with_prompts.join(clock, true()))
        .order_by(*order)
    )
    into = [*GIVEN, "prompt_id", "created_at", "run_at"]
    return postgresql.insert(generations).from_select(into, chosen, include_defaults=False)


_INSERT_ONE = Prepared(_insert_one_statement)
_INSERT, _INSERT_ALIKE = (
    {has: Prepared(partial(_insert_statement, given, has_batches=has)) for has in (False, True)}
    for given in (_given_rows, _given_alike)
)
_INSERT_THOSE_FREE = {
    has: Prepared(partial(_insert_those_free_statement, has_batches=has)) for has in (False, True)
}
"""By whether batches are added with them, as the two before it."""
