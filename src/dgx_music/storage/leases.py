"""Leases: who may write a row, and until when.

A lease is a generation and the attempt that runs. Every write after a claim carries the fence
(``is_held_by``): the row's id, ``status = 'processing'`` and the attempt. Attempt numbers only go
up, so a worker that lost its lease can never write the row again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Select, and_, case, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import PROCESSING
from dgx_music.storage.generation import g, generations
from dgx_music.storage.models import WorkerInfo
from dgx_music.storage.schema import now_plus, rechecked, written


@dataclass(frozen=True)
class Lease:
    """The right to write a row: this generation, while this attempt is the one that runs."""

    generation_id: str
    attempt: int

    def __str__(self) -> str:
        return f"generation {self.generation_id} attempt {self.attempt}"


@dataclass(frozen=True)
class Held:
    """When a lease ends, and how long its worker makes its leases."""

    expires_at: datetime
    """On the database's clock."""
    length_seconds: float | None
    """``None`` if the worker has no row of its own."""


async def renew(
    session: AsyncSession, progress: Mapping[Lease, float], *, lease_seconds: float
) -> dict[Lease, bool]:
    """Extend these leases and store their progress; return those still held.

    Each comes with True if a cancel was requested. A lease that is not in the answer is lost: stop
    that generation and delete its file. An expired lease that nobody has rescued is held again. A
    row that another transaction has locked is skipped until the next time and still counts as held:
    one open transaction must not cost the other rows their leases.
    """
    if not progress:
        return {}
    by_id = {lease.generation_id: done for lease, done in progress.items()}
    free = select(g.id).where(is_held_by(progress.keys())).order_by(g.id)
    free = free.with_for_update(skip_locked=True, key_share=True)
    statement = (
        update(generations)
        .where(is_one_of(free), is_held_by(progress.keys()))
        .values(
            lease_expires_at=now_plus(lease_seconds),
            progress=case(by_id, value=g.id, else_=g.progress),
        )
        .returning(g.id, g.attempt, g.cancel_requested)
    )
    rows = list((await session.execute(statement)).all())
    if len(rows) < len(progress):
        rest = progress.keys() - {Lease(row.id, row.attempt) for row in rows}
        locked = select(g.id, g.attempt, g.cancel_requested).where(is_held_by(rest))
        rows += (await session.execute(locked)).all()
    return {Lease(row.id, row.attempt): row.cancel_requested for row in rows}


async def find_cancel_requests(session: AsyncSession, worker_id: str) -> list[Lease]:
    """Return the leases of this worker for whose generations a cancel was requested."""
    is_own = (g.status == written(PROCESSING), g.worker_id == worker_id)
    query = select(g.id, g.attempt).where(*is_own, g.cancel_requested)
    return [Lease(row.id, row.attempt) for row in (await session.execute(query)).all()]


async def find_leases(session: AsyncSession) -> dict[Lease, Held]:
    """Return every lease of all workers."""
    own = WorkerInfo.__table__.c
    query = select(g.id, g.attempt, g.lease_expires_at, own.lease_seconds)
    query = query.outerjoin(WorkerInfo, own.id == g.worker_id)
    query = query.where(g.status == written(PROCESSING), g.worker_id.is_not(None))
    rows = (await session.execute(query)).all()
    return {
        Lease(row.id, row.attempt): Held(row.lease_expires_at, row.lease_seconds) for row in rows
    }


def is_held_by(leases: Collection[Lease]) -> ColumnElement[bool]:
    """Return the fence: the row is still processing under the very attempt that was claimed."""
    is_held = and_(rechecked(g.status) == PROCESSING, g.worker_id.is_not(None))
    return and_(is_among(leases), is_held)


def is_among(leases: Collection[Lease]) -> ColumnElement[bool]:
    """Return the condition that the row's last attempt is one of these, whatever its status is.

    It names the ids twice: SQLite finds no row by pairs and would read the whole table. A condition
    beside it, on a column that leads an index, must be ``rechecked``.
    """
    pairs = [(lease.generation_id, lease.attempt) for lease in leases]
    return and_(g.id.in_([each for each, _ in pairs]), tuple_(g.id, g.attempt).in_(pairs))


def is_one_of(rows: Select[tuple[str]]) -> ColumnElement[bool]:
    """Return the condition that the row's id is in the answer to a query, which is run once.

    Without MATERIALIZED its LIMIT may be applied again and again. It is a join (UPDATE … FROM), not
    ``IN``: with that SQLite would walk all rows of the status in search of the few.
    """
    chosen = rows.cte("chosen").prefix_with("MATERIALIZED")
    return g.id == chosen.c.id
