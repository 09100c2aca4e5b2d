"""Rows that would never run.

Those of lost workers, and those whose ``run_at`` moved into the future because the clock went back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, case, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import (
    CANCELLED,
    FAILED,
    PENDING,
    PROCESSING,
    AttemptOutcome,
    GenerationStatus,
)
from dgx_music.storage.due import overtaken
from dgx_music.storage.generation import g, generations
from dgx_music.storage.lease_end import END_ATTEMPT, attempt_end, let_go
from dgx_music.storage.leases import Lease, is_one_of
from dgx_music.storage.schema import dialect_of, is_our_schema, now, written

RESCUE_CHUNK = 100
WORKER_LOST = "worker lost: it stopped renewing its lease"


@dataclass(frozen=True)
class Rescued:
    """A row taken from a lost worker: the lease that ended, and the status that the row has now."""

    lease: Lease
    status: GenerationStatus


async def rescue(session: AsyncSession, lapsed: Mapping[Lease, datetime]) -> list[Rescued]:
    """Take rows from lost workers; return what was taken.

    ``lapsed`` names leases, each with its end: if a lease ends at another time now, its worker
    lives.

    Counts a failure for each row: a generation that kills its workers must run out of attempts. If
    the schema is not this version's any more, nothing is taken: this version does not know all of a
    row.
    """
    is_lost = and_(g.status == written(PROCESSING), g.worker_id.is_not(None), _has_lapsed(lapsed))
    lost = select(g.id).where(is_lost).order_by(g.id)
    lost = lost.with_for_update(skip_locked=True, key_share=True)
    spent = g.failures + 1 >= g.max_attempts
    status = case((g.cancel_requested, CANCELLED), (spent, FAILED), else_=PENDING)
    statement = let_go(status).where(is_one_of(lost), is_lost, is_our_schema())
    # Due at once, behind what was due when it began. Not later than now: after a step back of the
    # clock it would wait.
    due_at = case((g.started_at < now(), g.started_at), else_=now())
    changes = {"failures": g.failures + 1, "error_message": WORKER_LOST, "run_at": due_at}
    rows = (await session.execute(statement.values(changes))).all()
    rescued = [Rescued(Lease(row.id, row.attempt), GenerationStatus(row.status)) for row in rows]
    ends = [attempt_end(item.lease, AttemptOutcome.LOST, WORKER_LOST) for item in rescued]
    if ends:
        await session.execute(END_ATTEMPT, ends)
    return rescued


async def hasten(session: AsyncSession, model_name: str, *, limit: int = RESCUE_CHUNK) -> int:
    """Set ``run_at`` to now for rows that were due before the database's clock went back.

    Returns how many.
    """
    is_late = overtaken(dialect_of(session), model_name)
    late = select(g.id).where(is_late).order_by(g.run_at).limit(limit)
    late = late.with_for_update(skip_locked=True, key_share=True)
    statement = update(generations).where(is_one_of(late), is_late).values(run_at=now())
    return len((await session.execute(statement.returning(g.id))).all())


async def read_clock(session: AsyncSession) -> datetime:
    """Return the time of the database's clock."""
    return (await session.execute(select(now()))).scalar_one()


def _has_lapsed(lapsed: Mapping[Lease, datetime]) -> ColumnElement[bool]:
    named = [(lease.generation_id, lease.attempt, end) for lease, end in lapsed.items()]
    return tuple_(g.id, g.attempt, g.lease_expires_at).in_(named)
