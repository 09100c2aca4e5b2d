"""What is due, in which order, and how much of it there is. Nothing here changes a row.

A paused model's generations are not due. The order is ``claim_order``: earliest first, a point of priority being worth a
minute of waiting.
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
    not_,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.generation import g, generations
from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.schema import PENDING, PROCESSING, claim_order, dialect_of, now, unindexed, written

pauses = cast("Table", Pause.__table__)

CLAIM_ORDER = claim_order(g.run_at, g.priority)
_PENDING, _PROCESSING = written(PENDING), written(PROCESSING)
_SPARE = 16
_ONE_INSERT = literal(timedelta(milliseconds=10), Interval)
_TURN_LOCK = 0x6467_7874  # "dgxt": an advisory lock's number


def due_rows(dialect: str, model_name: str, limit: int, tenant_limit: int | None = None) -> Select[Any]:
    """Return the query of the ids of up to ``limit`` due generations, most urgent first.

    With a ``tenant_limit`` it leaves out what would give a tenant more than so many in hand; take turns first.
    """
    if tenant_limit is None:
        chosen = select(g.id).where(*_is_due(model_name)).order_by(CLAIM_ORDER, g.id).limit(limit)
        chosen = chosen.with_for_update(skip_locked=True, key_share=True)
    else:
        chosen = _due_by_tenant(dialect, model_name, limit, tenant_limit)
    return chosen.where(_is_anything_due(model_name)) if dialect == "postgresql" else chosen


async def take_turns(session: AsyncSession) -> None:
    """Wait until no other transaction counts what tenants have in hand; SQLite's writers take turns anyway."""
    if dialect_of(session) == "postgresql":
        await session.execute(text(f"SELECT pg_advisory_xact_lock({_TURN_LOCK})"))


async def fair_share(session: AsyncSession, model_name: str, limit: int, workers: int) -> int:
    """Return how many of the due generations are one worker's share among so many, at least 1 and at most ``limit``.

    While there is enough for everybody that is the limit; the last few are spread, instead of all being the quickest one's.
    """
    if workers <= 1 or limit <= 1:
        return limit
    some = select(g.id).where(*_is_due(model_name)).order_by(CLAIM_ORDER, g.id).limit(limit * workers).subquery()
    count = await session.scalar(select(func.count()).select_from(some)) or 0
    return max(1, min(limit, math.ceil(count / workers)))


async def find_waits(session: AsyncSession, models: Collection[str]) -> dict[str, float]:
    """Return for how many seconds the longest waiting of these models' due generations has waited.

    Models of which nothing is due, or which are paused, are left out. Takes no lock, and reads one entry of an index each.
    """
    waits: dict[str, float] = {}
    for model in models:
        first = select(func.min(g.run_at)).where(g.status == _PENDING, g.model_name == model, not_(is_paused(model)))
        row = (await session.execute(select(first.scalar_subquery().label("run_at"), now().label("now")))).one()
        if row.run_at is not None and row.run_at <= row.now:
            waits[model] = (row.now - row.run_at).total_seconds()
    return waits


async def find_overtaken(session: AsyncSession, models: Collection[str]) -> list[str]:
    """Return of which of these models something waits that was due at once: the database's clock has gone back since."""
    dialect = dialect_of(session)
    return [model for model in models if await session.scalar(select(exists().where(overtaken(dialect, model))))]


async def has_work(session: AsyncSession, models: Collection[str]) -> bool:
    """Return True while something of these models is due, waits for its next attempt, or is held by any worker.

    What a pause holds back is not waited for, nor what is scheduled for later.
    """
    for model in models:
        # In the order of an index: PostgreSQL would else look for one that waits among all that are finished.
        waiting = select(g.run_at).where(g.status == _PENDING, g.model_name == model).order_by(g.run_at).limit(1)
        is_due = waiting.scalar_subquery() <= now()
        is_to_retry = waiting.where(g.failures > 0).scalar_subquery().is_not(None)
        is_held = and_(g.status == _PROCESSING, g.model_name == model, g.worker_id.is_not(None))
        is_waiting = and_(or_(is_due, is_to_retry), not_(is_paused(model)))
        if await session.scalar(select(or_(is_waiting, select(g.id).where(is_held).exists()))):
            return True
    return False


async def queue_position(session: AsyncSession, generation_id: str) -> int | None:
    """Return the place of a pending generation among those of its model, from 1; ``None`` where it does not wait."""
    query = select(g.model_name, CLAIM_ORDER.label("place")).where(g.id == generation_id, g.status == _PENDING)
    own = (await session.execute(query)).one_or_none()
    if own is None:
        return None
    is_ahead = and_(own.place >= CLAIM_ORDER, or_(own.place > CLAIM_ORDER, g.id <= generation_id))
    is_counted = or_(g.run_at <= now(), g.id == generation_id)  # what is scheduled for later is in nobody's way
    counted = select(func.count()).where(g.status == _PENDING, g.model_name == own.model_name, is_ahead, is_counted)
    return await session.scalar(counted) or None


def overtaken(dialect: str, model_name: str) -> ColumnElement[bool]:
    """Return the condition that a row of this model waits for a moment that had come when it was stored.

    It was due when it was made, or when its last attempt began, and nobody has put it off since. PostgreSQL reads its clock
    for each column of a new row anew; the statement's time is a constant to it, so that an index finds what is later.
    """
    is_postgres = dialect == "postgresql"
    made_at = g.created_at + _ONE_INSERT if is_postgres else g.created_at
    is_later = g.run_at > (func.statement_timestamp() if is_postgres else now())
    was_due = or_(g.run_at <= made_at, g.run_at <= g.started_at)
    return and_(g.status == _PENDING, g.model_name == model_name, is_later, was_due)


def is_paused(model_name: str) -> ColumnElement[bool]:
    """Return the condition that nothing of this model may be claimed now."""
    return select(pauses.c.model_name).where(pauses.c.model_name.in_([model_name, ALL_MODELS])).exists()


def _is_due(model_name: str) -> tuple[ColumnElement[bool], ...]:
    return g.status == _PENDING, g.model_name == model_name, unindexed(g.run_at) <= now(), not_(is_paused(model_name))


def _is_anything_due(model_name: str) -> ColumnElement[bool]:
    """Return a condition that is looked at once: without it, a claim of nothing would walk all that is scheduled for later.

    SQLite's workers look before they claim, since a claim takes the write lock. The statement's time, unlike the clock's, is
    a constant to PostgreSQL.
    """
    others = generations.alias("others").c
    first = select(func.min(others.run_at)).where(others.status == written(PENDING), others.model_name == model_name)
    return first.scalar_subquery() <= func.statement_timestamp()


def _due_by_tenant(dialect: str, model_name: str, limit: int, tenant_limit: int) -> Select[Any]:
    """Choose from each tenant's own queue no more than it has room for, then the most urgent of all those.

    An index holds each tenant's queue by itself: however much one has waiting, it is never walked through in search of
    another's. What has no tenant is a queue of its own, with room for everything.
    """
    rooms = _rooms(_waiting_tenants(model_name), limit, tenant_limit)
    queue = generations.alias("queue")
    place = claim_order(queue.c.run_at, queue.c.priority)
    # A range of one tenant, in the order of the tenants: for an equality PostgreSQL might take the index of all claims,
    # whose order is the same, and walk through everybody else's in search of this one's.
    order = (queue.c.tenant, place, queue.c.id)
    nth = func.row_number().over(order_by=order)
    waiting = select(queue.c.id, place.label("place"), nth.label("nth")).where(
        queue.c.status == _PENDING,
        queue.c.model_name == model_name,
        queue.c.tenant.between(rooms.c.tenant, rooms.c.tenant),
        unindexed(queue.c.run_at) <= now(),
    )
    own = waiting.order_by(*order).limit(limit + _SPARE).correlate(rooms).subquery("own")
    allowed = select(own.c.id, own.c.place).where(own.c.nth <= rooms.c.room).correlate(rooms)
    is_open = not_(is_paused(model_name))
    if dialect != "postgresql":  # SQLite has no LATERAL, but looks up the ids that a query of each tenant's finds
        is_first = g.id.in_(allowed.with_only_columns(own.c.id))
        chosen = select(g.id).select_from(rooms.join(generations, is_first)).where(is_open)
        return chosen.order_by(CLAIM_ORDER, g.id).limit(limit)
    first = allowed.lateral("first")
    # Some to spare, in the place of those that somebody else has locked.
    firsts = select(first.c.id, first.c.place).select_from(rooms.join(first, true())).where(is_open)
    firsts = firsts.order_by(first.c.place, first.c.id).limit(limit + _SPARE)
    best = firsts.cte("best").prefix_with("MATERIALIZED")
    chosen = select(g.id).join(best, g.id == best.c.id).where(g.status == _PENDING).order_by(best.c.place, best.c.id)
    return chosen.limit(limit).with_for_update(of=generations, skip_locked=True, key_share=True)


def _rooms(tenants: Any, limit: int, tenant_limit: int) -> Any:
    """Return the tenants that may have more in hand, and how much; who has no name has room for everything."""
    is_running = and_(g.status == _PROCESSING, g.worker_id.is_not(None))
    by_tenant = select(unindexed(g.tenant).label("tenant"), func.count().label("count")).where(is_running)
    running = by_tenant.group_by(unindexed(g.tenant)).cte("running").prefix_with("MATERIALIZED")
    room = literal(tenant_limit) - func.coalesce(running.c.count, 0)
    room = case((tenants.c.tenant == "", limit + _SPARE), else_=room)
    rooms = select(tenants.c.tenant, room.label("room")).outerjoin(running, running.c.tenant == tenants.c.tenant)
    return rooms.where(tenants.c.tenant.is_not(None), room > 0).cte("rooms").prefix_with("MATERIALIZED")


def _waiting_tenants(model_name: str) -> Any:
    """Return the tenants of whom something waits, one step of the index each instead of one for each row.

    A "loose index scan" (PostgreSQL wiki, "Loose indexscan").
    """

    def next_tenant(*beyond: ColumnElement[bool]) -> Any:
        first = select(func.min(g.tenant)).where(g.status == _PENDING, g.model_name == model_name, *beyond)
        return first.scalar_subquery()

    tenants = select(next_tenant().label("tenant")).cte("tenants", recursive=True)
    return tenants.union_all(select(next_tenant(g.tenant > tenants.c.tenant)).where(tenants.c.tenant.is_not(None)))
