"""The guarded transitions, in life order: claim, renew, complete, fail, release, cancel, rescue, retry, prune.

Each is one guarded statement that says what it changed; none reads and then writes. Every write after a claim carries the
fence: the row's id, ``status = 'processing'`` and the attempt. Times are the database's; workers send durations. Each
coroutine works in the session it is given and leaves committing to whoever opened it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import GenerationNotFoundError, IllegalTransitionError
from dgx_music.storage.models import Attempt, Generation
from dgx_music.storage.schema import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    PENDING,
    PROCESSING,
    AttemptOutcome,
    now,
    now_plus,
    unindexed,
    with_json_key,
)

AUDIO_KEY = "audio"
"""What completion adds to a row's metadata."""
RESCUE_CHUNK = 100
_BACKOFF_LIMIT_SECONDS = 3600.0

generations = cast("Table", Generation.__table__)
attempts = cast("Table", Attempt.__table__)
g = generations.c


@dataclass(frozen=True)
class Lease:
    """The right to write a row: this generation, while this attempt is the one that runs."""

    generation_id: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claimed row: the lease on it, and what it asks for."""

    lease: Lease
    prompt: str
    model_name: str
    duration_seconds: float
    sample_rate: int
    channels: int
    sampling: Mapping[str, Any]
    failures: int


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an attempt leaves behind: where its audio is, and how it was made."""

    lease: Lease
    file_path: str
    file_size_bytes: int
    sha256: str
    model_version: str
    generation_time_seconds: float
    audio: Mapping[str, Any]
    """Goes into the row's metadata under the key ``audio``."""


@dataclass(frozen=True)
class Rescued:
    """A row taken from a lost worker: the lease that died, and the status the row has now."""

    lease: Lease
    status: str


def backoff_seconds(failures: int, base: float, rng: random.Random) -> float:
    """Return how long to wait before the next attempt, after this many failures.

    Full jitter on a doubling limit: uniform between half of and all of ``base * 2**(failures - 1)``, at most an hour
    (M. Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015, in its "equal jitter" form).
    """
    limit = min(_BACKOFF_LIMIT_SECONDS, base * 2.0 ** min(failures - 1, 30))
    return rng.uniform(limit / 2, limit)


async def claim(
    session: AsyncSession, *, worker_id: str, model_name: str, limit: int, lease_seconds: float
) -> list[Claim]:
    """Take up to ``limit`` due generations of this model for this worker, most urgent first, and return them."""
    due = (
        select(g.id)
        .where(g.status == PENDING, g.model_name == model_name, unindexed(g.run_at) <= now())
        .order_by(g.priority.desc(), g.run_at, g.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    statement = (
        update(generations)
        .where(_is_one_of(due), g.status == PENDING)
        .values(
            status=PROCESSING,
            attempt=g.attempt + 1,
            worker_id=worker_id,
            started_at=now(),
            lease_expires_at=now_plus(lease_seconds),
            progress=0.0,
        )
        .returning(*_CLAIMED)
    )
    rows = sorted((await session.execute(statement)).all(), key=lambda row: (-row.priority, row.run_at, row.id))
    if rows:
        made = [{"generation_id": row.id, "attempt": row.attempt, "worker_id": worker_id} for row in rows]
        await session.execute(insert(attempts), made)
    return [_as_claim(row) for row in rows]


async def renew(session: AsyncSession, progress: Mapping[Lease, float], *, lease_seconds: float) -> dict[Lease, bool]:
    """Extend these leases and store their progress; return those still held, with whether a cancel was requested.

    A lease that is not in the answer is lost: stop that generation and drop its file. An expired lease that nobody has
    rescued yet is revived.
    """
    if not progress:
        return {}
    by_id = {lease.generation_id: done for lease, done in progress.items()}
    statement = (
        update(generations)
        .where(_is_held_by(progress.keys()))
        .values(lease_expires_at=now_plus(lease_seconds), progress=case(by_id, value=g.id, else_=g.progress))
        .returning(g.id, g.attempt, g.cancel_requested)
    )
    rows = (await session.execute(statement)).all()
    return {Lease(row.id, row.attempt): row.cancel_requested for row in rows}


async def find_cancel_requests(session: AsyncSession, worker_id: str) -> list[Lease]:
    """Return the leases of this worker whose generations somebody wants cancelled."""
    query = select(g.id, g.attempt).where(g.status == PROCESSING, g.worker_id == worker_id, g.cancel_requested)
    return [Lease(row.id, row.attempt) for row in (await session.execute(query)).all()]


async def complete(session: AsyncSession, completions: Sequence[Completion]) -> set[Lease]:
    """Complete these generations in one go and return the leases of those that are completed by their own attempt.

    The rest were taken by another attempt, deleted, or have a cancel requested. Saying it again after a lost reply gives
    the same answer.
    """
    if not completions:
        return set()
    await session.execute(_COMPLETE, [_completion_values(completion) for completion in completions])
    query = select(g.id, g.attempt).where(
        _is_among(completion.lease for completion in completions), g.status == COMPLETED
    )
    done = {Lease(row.id, row.attempt) for row in (await session.execute(query)).all()}
    ended = [completion for completion in completions if completion.lease in done]
    if ended:
        await session.execute(_END_ATTEMPT, [_attempt_values(AttemptOutcome.COMPLETED, item) for item in ended])
    return done


async def fail(
    session: AsyncSession,
    lease: Lease,
    error: str,
    *,
    retry_in_seconds: float | None,
    device_seconds: float | None = None,
) -> str | None:
    """Count a failure: pending again after a wait, or failed for good where the budget is spent.

    ``retry_in_seconds`` of ``None`` says that no retry can help. Returns the new status (cancelled where that was
    requested), or ``None`` where the lease was lost.
    """
    spent = literal(retry_in_seconds is None) | (g.failures + 1 >= g.max_attempts)
    status = case((g.cancel_requested, CANCELLED), (spent, FAILED), else_=PENDING)
    statement = _let_go(status).where(_is_held_by([lease]))
    statement = statement.values(failures=g.failures + 1, error_message=error, run_at=now_plus(retry_in_seconds or 0.0))
    moved = (await session.execute(statement)).one_or_none()
    if moved is None:
        return None
    outcome = AttemptOutcome.CANCELLED if moved.status == CANCELLED else AttemptOutcome.FAILED
    await session.execute(_END_ATTEMPT, [_end(lease, outcome, error, device_seconds)])
    return str(moved.status)


async def release(session: AsyncSession, leases: Collection[Lease]) -> dict[Lease, str]:
    """Give generations back at no cost to their budget, due at once; return the new status of those that were held.

    One whose cancel was requested becomes cancelled instead: this is also how a worker confirms a cancel.
    """
    if not leases:
        return {}
    statement = _let_go(case((g.cancel_requested, CANCELLED), else_=PENDING)).where(_is_held_by(leases))
    rows = (await session.execute(statement)).all()
    moved = {Lease(row.id, row.attempt): str(row.status) for row in rows}
    ends = [_end(lease, _released(status)) for lease, status in moved.items()]
    if ends:
        await session.execute(_END_ATTEMPT, ends)
    return moved


async def cancel(session: AsyncSession, generation_id: str) -> str:
    """Cancel a pending generation, or ask the worker of a running one to stop; return the status it has now.

    ``processing`` means that the request is noted: such a row ends cancelled, whatever its attempt comes to. Raises
    ``GenerationNotFoundError``, or ``IllegalTransitionError`` where it has already completed or failed.
    """
    is_pending = g.status == PENDING
    statement = (
        update(generations)
        .where(g.id == generation_id, g.status.in_([PENDING, PROCESSING, CANCELLED]))
        .values(
            status=case((is_pending, CANCELLED), else_=g.status),
            completed_at=case((is_pending, now()), else_=g.completed_at),
            cancel_requested=True,
        )
        .returning(g.status)
    )
    status = await session.scalar(statement)
    return str(status) if status is not None else await _refuse(session, generation_id, CANCELLED)


async def rescue(session: AsyncSession, *, limit: int = RESCUE_CHUNK) -> list[Rescued]:
    """Take rows from workers whose leases have expired; return what was taken.

    Counts a failure each: a generation that kills its worker again and again must run out of budget.
    """
    is_lost = and_(g.status == PROCESSING, g.worker_id.is_not(None), g.lease_expires_at < now())
    lost = select(g.id).where(is_lost).order_by(g.lease_expires_at).limit(limit).with_for_update(skip_locked=True)
    status = case((g.cancel_requested, CANCELLED), (g.failures + 1 >= g.max_attempts, FAILED), else_=PENDING)
    statement = _let_go(status).where(_is_one_of(lost), is_lost)
    statement = statement.values(failures=g.failures + 1, error_message=WORKER_LOST, run_at=now())
    rows = (await session.execute(statement)).all()
    rescued = [Rescued(Lease(row.id, row.attempt), row.status) for row in rows]
    if rescued:
        await session.execute(_END_ATTEMPT, [_end(item.lease, AttemptOutcome.LOST, WORKER_LOST) for item in rescued])
    return rescued


async def read_clock(session: AsyncSession) -> datetime:
    """Return what the database's clock says now."""
    return (await session.execute(select(now()))).scalar_one()


WORKER_LOST = "worker lost: it stopped renewing its lease"


async def retry(session: AsyncSession, generation_id: str) -> None:
    """Make a failed or cancelled generation pending again, with a fresh budget; its attempts keep counting.

    Raises ``GenerationNotFoundError``, or ``IllegalTransitionError`` where it is pending, running or completed.
    """
    statement = (
        update(generations)
        .where(g.id == generation_id, g.status.in_([FAILED, CANCELLED]))
        .values(status=PENDING, failures=0, cancel_requested=False, run_at=now(), completed_at=null(), progress=0.0)
        .returning(g.id)
    )
    if await session.scalar(statement) is None:
        await _refuse(session, generation_id, PENDING)


async def has_due(session: AsyncSession, model_name: str) -> bool:
    """Return True where a claim would find something; takes no lock, and reads one entry of an index."""
    is_due = and_(g.status == PENDING, g.model_name == model_name, g.run_at <= now())
    return bool(await session.scalar(select(select(g.id).where(is_due).exists())))


async def release_all(session: AsyncSession, worker_id: str, *, but: Collection[Lease]) -> int:
    """Give back what this worker still holds, ``but`` for these, at no cost to their budget; return how many."""
    statement = _let_go(case((g.cancel_requested, CANCELLED), else_=PENDING))
    statement = statement.where(g.status == PROCESSING, g.worker_id == worker_id, not_(_is_among(but)))
    rows = (await session.execute(statement)).all()
    if rows:
        await session.execute(_END_ATTEMPT, [_end(Lease(row.id, row.attempt), _released(row.status)) for row in rows])
    return len(rows)


async def has_work(session: AsyncSession, model_name: str) -> bool:
    """Return True while a generation of this model is due, waits for its next attempt, or is held by any worker."""
    is_waiting = and_(g.status == PENDING, g.model_name == model_name, or_(g.run_at <= now(), g.failures > 0))
    is_held = and_(g.status == PROCESSING, g.model_name == model_name, g.worker_id.is_not(None))
    return bool(
        await session.scalar(select(select(g.id).where(is_waiting).exists() | select(g.id).where(is_held).exists()))
    )


async def find_prunable(session: AsyncSession, *, status: str, older_than_seconds: float, limit: int) -> list[Lease]:
    """Return finished generations of this status that ended longer ago than this, each with its last attempt."""
    query = (
        select(g.id, g.attempt)
        .where(g.status == status, g.status.in_(FINISHED), g.completed_at <= now_plus(-older_than_seconds))
        .order_by(g.completed_at)
        .limit(limit)
    )
    return [Lease(row.id, row.attempt) for row in (await session.execute(query)).all()]


async def find_files(session: AsyncSession, leases: Collection[Lease]) -> list[str]:
    """Return where workers have put the audio of these generations."""
    query = select(g.file_path).where(_is_among(leases), g.sha256.is_not(None), g.file_path.is_not(None))
    return list(await session.scalars(query))


async def prune(session: AsyncSession, leases: Collection[Lease]) -> int:
    """Delete these rows where they are still finished; return how many. Delete their files first."""
    statement = delete(generations).where(_is_among(leases), g.status.in_(FINISHED)).returning(g.id)
    return len((await session.execute(statement)).all())


async def queue_position(session: AsyncSession, generation_id: str) -> int | None:
    """Return the place of a pending generation among those of its model, from 1; ``None`` where it does not wait."""
    query = select(g.model_name, g.priority, g.run_at).where(g.id == generation_id, g.status == PENDING)
    own = (await session.execute(query)).one_or_none()
    if own is None:
        return None
    is_sooner = or_(g.run_at < own.run_at, and_(g.run_at == own.run_at, g.id <= generation_id))
    is_ahead = or_(g.priority > own.priority, and_(g.priority == own.priority, is_sooner))
    is_counted = or_(g.run_at <= now(), g.id == generation_id)  # what is scheduled for later is in nobody's way
    counted = select(func.count()).where(g.status == PENDING, g.model_name == own.model_name, is_ahead, is_counted)
    return await session.scalar(counted) or None


_CLAIMED = (
    g.id,
    g.attempt,
    g.prompt,
    g.model_name,
    g.duration_seconds,
    g.sample_rate,
    g.channels,
    g.sampling,
    g.failures,
    g.priority,
    g.run_at,
)

_COMPLETE = (
    update(generations)
    .where(
        g.id == bindparam("lease_id"),
        g.attempt == bindparam("lease_attempt"),
        g.status == PROCESSING,
        g.worker_id.is_not(None),
        not_(g.cancel_requested),
    )
    .values(
        status=COMPLETED,
        completed_at=now(),
        worker_id=null(),
        lease_expires_at=null(),
        progress=1.0,
        error_message=null(),
        file_path=bindparam("path"),
        file_size_bytes=bindparam("size"),
        sha256=bindparam("hash"),
        model_version=bindparam("version"),
        generation_time_seconds=bindparam("seconds"),
        metadata=with_json_key(g.metadata, literal(AUDIO_KEY), bindparam("audio")),
    )
)

_END_ATTEMPT = (
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


def _let_go(status: ColumnElement[str]) -> Any:
    """Return the UPDATE that ends a claim with this status, and answers with id, attempt and status."""
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


def _is_one_of(rows: Select[tuple[str]]) -> ColumnElement[bool]:
    """Choose rows by a query that is evaluated once: without MATERIALIZED its LIMIT may be applied again and again.

    A join (UPDATE … FROM), not ``IN``: with that SQLite walks all rows of the status in search of the few.
    """
    chosen = rows.cte("chosen").prefix_with("MATERIALIZED")
    return g.id == chosen.c.id


def _is_among(leases: Any) -> ColumnElement[bool]:
    return tuple_(g.id, g.attempt).in_([(lease.generation_id, lease.attempt) for lease in leases])


def _is_held_by(leases: Any) -> ColumnElement[bool]:
    """Keep a write to rows that are still processing under the very attempt that was claimed: the fence."""
    return and_(_is_among(leases), g.status == PROCESSING, g.worker_id.is_not(None))


def _as_claim(row: Any) -> Claim:
    return Claim(
        lease=Lease(row.id, row.attempt),
        prompt=row.prompt,
        model_name=row.model_name,
        duration_seconds=row.duration_seconds,
        sample_rate=row.sample_rate,
        channels=row.channels,
        sampling=row.sampling or {},
        failures=row.failures,
    )


def _completion_values(completion: Completion) -> dict[str, Any]:
    return {
        "lease_id": completion.lease.generation_id,
        "lease_attempt": completion.lease.attempt,
        "path": completion.file_path,
        "size": completion.file_size_bytes,
        "hash": completion.sha256,
        "version": completion.model_version,
        "seconds": completion.generation_time_seconds,
        "audio": json.dumps(completion.audio, allow_nan=False),
    }


def _released(status: str) -> AttemptOutcome:
    return AttemptOutcome.CANCELLED if status == CANCELLED else AttemptOutcome.RELEASED


def _attempt_values(outcome: AttemptOutcome, completion: Completion) -> dict[str, Any]:
    return _end(completion.lease, outcome, None, completion.generation_time_seconds)


def _end(
    lease: Lease, outcome: AttemptOutcome, error: str | None = None, seconds: float | None = None
) -> dict[str, Any]:
    return {
        "lease_id": lease.generation_id,
        "lease_attempt": lease.attempt,
        "how": outcome.value,
        "error": error,
        "seconds": seconds,
    }


async def _refuse(session: AsyncSession, generation_id: str, wanted: str) -> Any:
    current = await session.scalar(select(g.status).where(g.id == generation_id))
    if current is None:
        raise GenerationNotFoundError(generation_id)
    raise IllegalTransitionError(generation_id, current, wanted)
