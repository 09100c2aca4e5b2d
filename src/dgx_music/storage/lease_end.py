"""How a lease ends without a completion: its worker fails or releases the row, or has lost it.

``let_go`` is the statement that ends a lease; completion.py has the one that completes a row.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Any

from sqlalchemy import ColumnElement, bindparam, case, literal, not_, null, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import (
    CANCELLED,
    FAILED,
    FINISHED,
    PENDING,
    PROCESSING,
    AttemptOutcome,
    GenerationStatus,
)
from dgx_music.storage.generation import g, generations
from dgx_music.storage.leases import Lease, is_among, is_held_by
from dgx_music.storage.models import attempts
from dgx_music.storage.schema import now, now_plus, written

_BACKOFF_LIMIT_SECONDS = 3600.0


def backoff_seconds(failures: int, base: float, rng: random.Random) -> float:
    """Return how long to wait before the next attempt, after this many failures.

    Jitter on a doubling limit: uniform between half of and all of ``base * 2**(failures - 1)``, at
    most an hour (M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015: "equal
    jitter").
    """
    limit = min(_BACKOFF_LIMIT_SECONDS, base * 2.0 ** min(failures - 1, 30))
    return rng.uniform(limit / 2, limit)


async def fail(
    session: AsyncSession,
    lease: Lease,
    error: str,
    *,
    retry_in_seconds: float | None,
    device_seconds: float | None = None,
) -> GenerationStatus | None:
    """Count a failure: pending again after a wait, or failed for good if no failures are left.

    ``retry_in_seconds`` is ``None`` if no retry can help. Returns the new status (cancelled if that
    was requested), or ``None`` if the lease was lost.
    """
    spent = literal(retry_in_seconds is None) | (g.failures + 1 >= g.max_attempts)
    status = case((g.cancel_requested, CANCELLED), (spent, FAILED), else_=PENDING)
    run_at = now_plus(retry_in_seconds or 0.0)
    statement = let_go(status).where(is_held_by([lease]))
    statement = statement.values(failures=g.failures + 1, error_message=error, run_at=run_at)
    moved = (await session.execute(statement)).one_or_none()
    if moved is None:
        return None
    outcome = AttemptOutcome.CANCELLED if moved.status == CANCELLED else AttemptOutcome.FAILED
    await session.execute(END_ATTEMPT, [attempt_end(lease, outcome, error, device_seconds)])
    return GenerationStatus(moved.status)


async def release(
    session: AsyncSession, leases: Collection[Lease]
) -> dict[Lease, GenerationStatus]:
    """Give generations back, due at once, without a failure; return the new status of those held.

    If the cancel of one was requested, it becomes cancelled instead: so a worker confirms a cancel.
    """
    if not leases:
        return {}
    return await _release(session, is_held_by(leases))


async def release_all(session: AsyncSession, worker_id: str, *, keep: Collection[Lease]) -> int:
    """Give back all that this worker holds except ``keep``, without a failure; return how many."""
    is_own = (g.status == written(PROCESSING)) & (g.worker_id == worker_id)
    return len(await _release(session, is_own & not_(is_among(keep))))


async def _release(
    session: AsyncSession, is_meant: ColumnElement[bool]
) -> dict[Lease, GenerationStatus]:
    statement = let_go(case((g.cancel_requested, CANCELLED), else_=PENDING)).where(is_meant)
    rows = (await session.execute(statement)).all()
    moved = {Lease(row.id, row.attempt): GenerationStatus(row.status) for row in rows}
    ends = [attempt_end(lease, _released(status)) for lease, status in moved.items()]
    if ends:
        await session.execute(END_ATTEMPT, ends)
    return moved


def _released(status: GenerationStatus) -> AttemptOutcome:
    return AttemptOutcome.CANCELLED if status == CANCELLED else AttemptOutcome.RELEASED


def let_go(status: ColumnElement[str]) -> Any:
    """Return the UPDATE that ends leases with this status; it returns id, attempt and status."""
    return (
        update(generations)
        .values(
            status=status,
            worker_id=null(),
            lease_expires_at=null(),
            completed_at=case((status.in_(FINISHED), now()), else_=null()),
        )
        .returning(g.id, g.attempt, g.status)
    )


END_ATTEMPT = (
    update(attempts)
    .where(
        attempts.c.generation_id == bindparam("lease_id"),
        attempts.c.attempt == bindparam("lease_attempt"),
        attempts.c.outcome.is_(None),
    )
    .values(
        finished_at=now(),
        outcome=bindparam("how"),
        error_message=bindparam("error"),
        device_seconds=bindparam("seconds"),
    )
)
"""Ends one attempt; takes the values of ``attempt_end``."""


def attempt_end(
    lease: Lease, outcome: AttemptOutcome, error: str | None = None, seconds: float | None = None
) -> dict[str, Any]:
    """Return the values of ``END_ATTEMPT``; ``seconds`` are those that the device worked."""
    return {
        "lease_id": lease.generation_id,
        "lease_attempt": lease.attempt,
        "how": outcome.value,
        "error": error,
        "seconds": seconds,
    }
