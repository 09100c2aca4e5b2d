"""Which generations are due, and in which order. Nothing here changes a row.

The generations of a paused model are not due. The order is ``claim_order``: earliest first, and one
point of priority is worth a minute of waiting.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from datetime import timedelta
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Interval,
    Select,
    Table,
    and_,
    case,
    exists,
    func,
    literal,
    literal_column,
    not_,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import PENDING, PROCESSING
from dgx_music.storage.generation import g, generations
from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.schema import claim_order, dialect_of, now, unindexed, written

pauses = cast("Table", Pause.__table__)

CLAIM_ORDER = claim_order(g.run_at, g.priority)
_PENDING, _PROCESSING = written(PENDING), written(PROCESSING)
_SPARE = 16
_ONE_INSERT = literal(timedelta(milliseconds=10), Interval)
_TURN_LOCK = 0x6467_7874  # "dgxt": an advisory lock's number


def due_rows(
    dialect: str,
    model_name: str,
    limit: int | ColumnElement[int],
    tenant_limit: int | None = None,
) -> Select[Any]:
    """Return the query for the ids of up to ``limit`` due generations, most urgent first.

    With a ``tenant_limit`` it leaves out what would give a tenant more than this many running; call
    ``take_turns`` first.
    """
    if tenant_limit is None:
        most_urgent = select(g.id).where(*_is_due(model_name)).order_by(CLAIM_ORDER, g.id)
        chosen = most_urgent.limit(limit).with_for_update(skip_locked=True, key_share=True)
    else:
        chosen = _due_by_tenant(dialect, model_name, cast("int", limit), tenant_limit)
    return chosen.where(_is_anything_due(model_name)) if dialect == "postgresql" else chosen


async def take_turns(session: AsyncSession) -> None:
    """Wait until no other transaction counts what the tenants have running.

    SQLite's writers take turns anyway.
    """
    if dialect_of(session) == "postgresql":
        await session.execute(text(f"SELECT pg_advisory_xact_lock({_TURN_LOCK})"))


async def fair_share(session: AsyncSession, model_name: str, limit: int, workers: int) -> int:
    """Return one worker's share of the due generations among so many workers: 1 to ``limit``.

    It is the limit while there are enough; the last few are shared, so that the fastest worker does
    not take them all.
    """
    if workers <= 1 or limit <= 1:
        return limit
    most_urgent = select(g.id).where(*_is_due(model_name)).order_by(CLAIM_ORDER, g.id)
    some = most_urgent.limit(limit * workers).subquery()
    count = await session.scalar(select(func.count()).select_from(some)) or 0
    return max(1, min(limit, math.ceil(count / workers)))


async def find_waits(session: AsyncSession, models: Collection[str]) -> dict[str, float]:
    """Return for each of these models how many seconds its longest waiting generation has waited.

    Paused models, and those of which nothing is due, are left out. Takes no lock, and reads one
    index entry for each model.
    """
    waits: dict[str, float] = {}
    for model in models:
        is_waiting = (waits_by_time(g, model), not_(is_paused(model)))
        first = select(func.min(g.run_at)).where(*is_waiting).scalar_subquery()
        row = (await session.execute(select(first.label("run_at"), now().label("now")))).one()
        if row.run_at is not None and row.run_at <= row.now:
            waits[model] = (row.now - row.run_at).total_seconds()
    return waits


async def find_overtaken(session: AsyncSession, models: Collection[str]) -> list[str]:
    """Return the models of which something waits that was due when it was stored.

    The database's clock has gone back since then.
    """
    dialect = dialect_of(session)
    queries = {model: select(exists().where(overtaken(dialect, model))) for model in models}
    return [model for model, query in queries.items() if await session.scalar(query)]


async def has_work(session: AsyncSession, models: Collection[str]) -> bool:
    """Return True while something of these models is due, waits for a retry, or runs.

    What is paused or scheduled for later does not count.
    """
    for model in models:
        # In the order of an index, or PostgreSQL would search all finished rows.
        waiting = select(g.run_at).where(waits_by_time(g, model))
        waiting = waiting.order_by(g.run_at).limit(1)
        is_due = waiting.scalar_subquery() <= now()
        is_to_retry = waiting.where(g.failures > 0).scalar_subquery().is_not(None)
        is_processed = (g.status == _PROCESSING, g.model_name == model, g.worker_id.is_not(None))
        is_held = select(g.id).where(*is_processed).exists()
        is_waiting = and_(or_(is_due, is_to_retry), not_(is_paused(model)))
        if await session.scalar(select(or_(is_waiting, is_held))):
            return True
    return False


async def queue_position(session: AsyncSession, generation_id: str) -> int | None:
    """Return the place of a pending generation in its model's queue, from 1; else ``None``."""
    query = select(g.model_name, CLAIM_ORDER.label("place"))
    query = query.where(g.id == generation_id, g.status == _PENDING)
    own = (await session.execute(query)).one_or_none()
    if own is None:
        return None
    is_ahead = and_(own.place >= CLAIM_ORDER, or_(own.place > CLAIM_ORDER, g.id <= generation_id))
    is_counted = or_(g.run_at <= now(), g.id == generation_id)  # not what is scheduled for later
    is_same = (g.status == _PENDING, g.model_name == own.model_name)
    counted = select(func.count()).where(*is_same, is_ahead, is_counted)
    return await session.scalar(counted) or None


def overtaken(dialect: str, model_name: str) -> ColumnElement[bool]:
    """Return the condition that a row of this model waits, but was due when it was stored.

    It was due when it was made, or when its last attempt began, and nobody has postponed it since.
    PostgreSQL reads its clock for each column of a row that is inserted alone, so those times may
    differ a little. The statement's time is a constant for it, so that an index finds what is later.
    """
    is_postgres = dialect == "postgresql"
    made_at = g.created_at + _ONE_INSERT if is_postgres else g.created_at
    is_later = g.run_at > (func.statement_timestamp() if is_postgres else now())
    was_due = or_(g.run_at <= made_at, g.run_at <= g.started_at)
    return and_(waits_by_time(g, model_name), is_later, was_due)


def waits_by_time(columns: Any, model_name: str) -> ColumnElement[bool]:
    """Return the condition that a row of this model waits, for a search in the order of time."""
    is_in_index = columns.attempt >= literal_column("0")  # as the index by time says it
    return and_(columns.status == _PENDING, columns.model_name == model_name, is_in_index)


def is_paused(model_name: str) -> ColumnElement[bool]:
    """Return the condition that nothing of this model may be claimed now."""
    names = [literal(model_name), literal(ALL_MODELS)]  # a list that has its length for good
    return select(pauses.c.model_name).where(pauses.c.model_name.in_(names)).exists()


def _is_due(model_name: str) -> tuple[ColumnElement[bool], ...]:
    return (
        g.status == _PENDING,
        g.model_name == model_name,
        unindexed(g.run_at) <= now(),
        not_(is_paused(model_name)),
    )


def _is_anything_due(model_name: str) -> ColumnElement[bool]:
    """Return a condition that PostgreSQL evaluates once for each statement.

    Without it, a claim that finds nothing would walk all rows that are scheduled for later.
    SQLite's workers look before they claim, since a claim takes the write lock. The statement's
    time, unlike the clock's, is a constant for PostgreSQL.
    """
    others = generations.alias("others").c
    first = select(func.min(others.run_at))
    first = first.where(waits_by_time(others, model_name))
    return first.scalar_subquery() <= func.statement_timestamp()


def _due_by_tenant(dialect: str, model_name: str, limit: int, tenant_limit: int) -> Select[Any]:
    """Return the query that takes from each tenant's queue what it has room for, most urgent first.

    An index holds each tenant's queue separately, so that a search for one tenant never walks
    through another's long queue. Generations without a tenant are one more queue, with room for
    everything.
    """
    rooms = _rooms(_waiting_tenants(model_name), limit, tenant_limit)
    own = _own_queue(rooms, model_name, limit)
    allowed = select(own.c.id, own.c.place).where(own.c.nth <= rooms.c.room).correlate(rooms)
    is_open = not_(is_paused(model_name))
    if dialect != "postgresql":  # SQLite has no LATERAL, but looks up the ids found for each tenant
        is_first = g.id.in_(allowed.with_only_columns(own.c.id))
        chosen = select(g.id).select_from(rooms.join(generations, is_first)).where(is_open)
        return chosen.order_by(CLAIM_ORDER, g.id).limit(limit)
    first = allowed.lateral("first")
    # Some to spare, in place of those that another transaction has locked.
    firsts = select(first.c.id, first.c.place).select_from(rooms.join(first, true())).where(is_open)
    firsts = firsts.order_by(first.c.place, first.c.id).limit(limit + _SPARE)
    best = firsts.cte("best").prefix_with("MATERIALIZED")
    chosen = select(g.id).join(best, g.id == best.c.id).where(g.status == _PENDING)
    chosen = chosen.order_by(best.c.place, best.c.id).limit(limit)
    return chosen.with_for_update(of=generations, skip_locked=True, key_share=True)


def _own_queue(rooms: Any, model_name: str, limit: int) -> Any:
    """Return the due rows of the tenant at hand in ``rooms``, in order and numbered from 1."""
    queue = generations.alias("queue")
    place = claim_order(queue.c.run_at, queue.c.priority)
    # A range of one tenant, in the order of the tenants: for an equality PostgreSQL might use the index
    # of all claims, which has the same order, and walk through the rows of all other tenants.
    order = (queue.c.tenant, place, queue.c.id)
    nth = func.row_number().over(order_by=order)
    waiting = select(queue.c.id, place.label("place"), nth.label("nth")).where(
        queue.c.status == _PENDING,
        queue.c.model_name == model_name,
        queue.c.tenant.between(rooms.c.tenant, rooms.c.tenant),
        unindexed(queue.c.run_at) <= now(),
    )
    return waiting.order_by(*order).limit(limit + _SPARE).correlate(rooms).subquery("own")


def _rooms(tenants: Any, limit: int, tenant_limit: int) -> Any:
    """Return the tenants that may have more running, and how many; the empty one has no limit."""
    is_running = and_(g.status == _PROCESSING, g.worker_id.is_not(None))
    tenant = unindexed(g.tenant)
    by_tenant = select(tenant.label("tenant"), func.count().label("count")).where(is_running)
    running = by_tenant.group_by(unindexed(g.tenant)).cte("running").prefix_with("MATERIALIZED")
    room = literal(tenant_limit) - func.coalesce(running.c.count, 0)
    room = case((tenants.c.tenant == "", limit + _SPARE), else_=room)
    rooms = select(tenants.c.tenant, room.label("room"))
    rooms = rooms.outerjoin(running, running.c.tenant == tenants.c.tenant)
    rooms = rooms.where(tenants.c.tenant.is_not(None), room > 0)
    return rooms.cte("rooms").prefix_with("MATERIALIZED")


def _waiting_tenants(model_name: str) -> Any:
    """Return the tenants that have waiting rows: one index step for each tenant, not for each row.

    A "loose index scan" (PostgreSQL wiki, "Loose indexscan").
    """

    def next_tenant(*beyond: ColumnElement[bool]) -> Any:
        is_waiting = (g.status == _PENDING, g.model_name == model_name, *beyond)
        return select(func.min(g.tenant)).where(*is_waiting).scalar_subquery()

    tenants = select(next_tenant().label("tenant")).cte("tenants", recursive=True)
    following = select(next_tenant(g.tenant > tenants.c.tenant))
    return tenants.union_all(following.where(tenants.c.tenant.is_not(None)))
