"""The guarded transitions, in life order: claim, renew, complete, fail, release, cancel, rescue, retry, prune.

Each is one guarded statement that says what it changed; none reads and then writes. Every write after a claim carries the
fence: the row's id, ``status = 'processing'`` and the attempt. Times are the database's; workers send durations. Each
coroutine works in the session it is given and leaves committing to whoever opened it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

from pydantic_core import to_json
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    Select,
    Table,
    and_,
    bindparam,
    case,
    column,
    delete,
    func,
    insert,
    literal,
    not_,
    null,
    select,
    tuple_,
    update,
)
from sqlalchemy import cast as cast_to
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import DatabaseNotMigratedError, GenerationNotFoundError, IllegalTransitionError
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from dgx_music.storage.due import CLAIM_ORDER, due_rows, g, generations, overtaken, take_turns
from dgx_music.storage.models import Attempt, WorkerInfo
from dgx_music.storage.repository import dialect_of
from dgx_music.storage.schema import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    PENDING,
    PROCESSING,
    AttemptOutcome,
    HashText,
    Id,
    JsonObject,
    LongText,
    ShortText,
    is_our_schema,
    now,
    now_plus,
    schema_revision,
    with_json_key,
    written,
)

AUDIO_KEY = "audio"
"""What completion adds to a row's metadata."""
RESCUE_CHUNK = 100
_BACKOFF_LIMIT_SECONDS = 3600.0

attempts = cast("Table", Attempt.__table__)


@dataclass(frozen=True)
class Lease:
    """The right to write a row: this generation, while this attempt is the one that runs."""

    generation_id: str
    attempt: int

    def __str__(self) -> str:
        return f"generation {self.generation_id} attempt {self.attempt}"


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
    continuation_sha256: str | None = None
    melody_sha256: str | None = None


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
class Held:
    """How long a lease still is: until when on the database's clock, and the length that its worker gives its leases."""

    expires_at: datetime
    length_seconds: float | None
    """``None`` where the worker has no row of its own."""


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
    session: AsyncSession,
    *,
    worker_id: str,
    model_name: str,
    limit: int,
    lease_seconds: float,
    tenant_limit: int | None = None,
) -> list[Claim]:
    """Take up to ``limit`` due generations of this model for this worker, most urgent first, and return them.

    With a ``tenant_limit`` no tenant has more than so many in hand, whoever works on them: counted in the rows themselves,
    by one claim at a time. Nothing of a paused model is taken, nor anything where the schema is no longer this version's:
    that raises ``DatabaseNotMigratedError``.
    """
    if tenant_limit is not None:
        await take_turns(session)
    dialect = dialect_of(session)
    statement = _claim_statement(dialect, worker_id, model_name, limit, lease_seconds, tenant_limit)
    rows = sorted((await session.execute(statement)).all(), key=lambda row: (row.claim_order, row.id))
    if rows and dialect != "postgresql":
        made = [{"generation_id": row.id, "attempt": row.attempt, "worker_id": worker_id} for row in rows]
        await session.execute(insert(attempts), made)
    if not rows:
        await check_schema(session)
    return [_as_claim(row) for row in rows]


async def check_schema(session: AsyncSession) -> None:
    """Raise ``DatabaseNotMigratedError`` where the schema has become an older or a newer version's.

    One that is at no revision is being made anew: there is nothing to claim, and nothing to give up for.
    """
    found = await session.scalar(schema_revision())
    if found not in (None, SCHEMA_REVISION):
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)


async def renew(session: AsyncSession, progress: Mapping[Lease, float], *, lease_seconds: float) -> dict[Lease, bool]:
    """Extend these leases and store their progress; return those still held, with whether a cancel was requested.

    A lease that is not in the answer is lost: stop that generation and drop its file. An expired lease that nobody has
    rescued yet is revived. A row that somebody else has locked is passed over until the next time, and still held: an
    open transaction must not cost the others their leases.
    """
    if not progress:
        return {}
    by_id = {lease.generation_id: done for lease, done in progress.items()}
    free = select(g.id).where(_is_held_by(progress.keys())).order_by(g.id)
    free = free.with_for_update(skip_locked=True, key_share=True)
    statement = (
        update(generations)
        .where(_is_one_of(free), _is_held_by(progress.keys()))
        .values(lease_expires_at=now_plus(lease_seconds), progress=case(by_id, value=g.id, else_=g.progress))
        .returning(g.id, g.attempt, g.cancel_requested)
    )
    rows = list((await session.execute(statement)).all())
    if len(rows) < len(progress):
        rest = progress.keys() - {Lease(row.id, row.attempt) for row in rows}
        rows += (await session.execute(select(g.id, g.attempt, g.cancel_requested).where(_is_held_by(rest)))).all()
    return {Lease(row.id, row.attempt): row.cancel_requested for row in rows}


async def find_cancel_requests(session: AsyncSession, worker_id: str) -> list[Lease]:
    """Return the leases of this worker whose generations somebody wants cancelled."""
    query = select(g.id, g.attempt).where(g.status == written(PROCESSING), g.worker_id == worker_id, g.cancel_requested)
    return [Lease(row.id, row.attempt) for row in (await session.execute(query)).all()]


async def complete(session: AsyncSession, completions: Sequence[Completion]) -> set[Lease]:
    """Complete these generations in one go and return the leases of those that are completed by their own attempt.

    The rest were taken by another attempt, deleted, or have a cancel requested; or somebody else has them locked, and
    ``find_completable`` says so. Saying it again after a lost reply gives the same answer.
    """
    if not completions:
        return set()
    completions = sorted(completions, key=lambda completion: completion.lease.generation_id)  # as renewals lock them
    done = await _complete(session, completions)
    if len(done) < len(completions):  # lost, or said before
        done = await find_completed(session, [completion.lease for completion in completions])
    if done:
        await session.execute(_end_completed(done))
    return done


async def find_completed(session: AsyncSession, leases: Collection[Lease]) -> set[Lease]:
    """Return which of these leases have completed their rows: attempt numbers are never used twice, so that is exact."""
    return await _read_leases(session, select(g.id, g.attempt).where(_is_among(leases), g.status == COMPLETED))


async def find_completable(session: AsyncSession, leases: Collection[Lease]) -> set[Lease]:
    """Return which of these leases could still be completed: right after ``complete``, those that it found locked."""
    if not leases:
        return set()
    query = select(g.id, g.attempt).where(_is_held_by(leases), not_(g.cancel_requested))
    return await _read_leases(session, query)


async def _complete(session: AsyncSession, completions: Sequence[Completion]) -> set[Lease]:
    """Complete what can be and return it; SQLite, which has no round trips to spare, does not say."""
    rows = [_completion_values(completion) for completion in completions]
    if dialect_of(session) == "postgresql":
        return await _read_leases(session, _COMPLETE_TOGETHER, {"completions": _as_json(rows)})
    await session.execute(_COMPLETE, [row | {"audio": _as_json(row["audio"])} for row in rows])
    return set()


async def _read_leases(session: AsyncSession, statement: Any, values: Any = None) -> set[Lease]:
    return {Lease(row.id, row.attempt) for row in (await session.execute(statement, values)).all()}


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


async def find_leases(session: AsyncSession) -> dict[Lease, Held]:
    """Return every lease of the fleet."""
    own = WorkerInfo.__table__.c
    query = select(g.id, g.attempt, g.lease_expires_at, own.lease_seconds)
    query = query.outerjoin(WorkerInfo, own.id == g.worker_id)
    query = query.where(g.status == written(PROCESSING), g.worker_id.is_not(None))
    rows = (await session.execute(query)).all()
    return {Lease(row.id, row.attempt): Held(row.lease_expires_at, row.lease_seconds) for row in rows}


async def rescue(
    session: AsyncSession, lapsed: Mapping[Lease, datetime] | None = None, *, limit: int = RESCUE_CHUNK
) -> list[Rescued]:
    """Take rows from lost workers; return what was taken.

    Those that are named, each with the end of its lease: where that is another one by now, the worker lives. With none
    named, up to ``limit`` of which the database's clock says that their leases have expired.

    Counts a failure each: a generation that kills its worker again and again must run out of budget. Where the schema is no
    longer this version's, nothing is taken: what becomes of such rows is for those to say who know all of it.
    """
    is_lost = and_(g.status == written(PROCESSING), g.worker_id.is_not(None), _has_lapsed(lapsed))
    lost = select(g.id).where(is_lost).order_by(g.lease_expires_at).limit(limit)
    lost = lost.with_for_update(skip_locked=True, key_share=True)
    status = case((g.cancel_requested, CANCELLED), (g.failures + 1 >= g.max_attempts, FAILED), else_=PENDING)
    statement = _let_go(status).where(_is_one_of(lost), is_lost, is_our_schema())
    # Due at once, behind what was due when it began; not later than that, or after a step back of the clock it would wait.
    due_at = case((g.started_at < now(), g.started_at), else_=now())
    statement = statement.values(failures=g.failures + 1, error_message=WORKER_LOST, run_at=due_at)
    rows = (await session.execute(statement)).all()
    rescued = [Rescued(Lease(row.id, row.attempt), row.status) for row in rows]
    if rescued:
        await session.execute(_END_ATTEMPT, [_end(item.lease, AttemptOutcome.LOST, WORKER_LOST) for item in rescued])
    return rescued


async def hasten(session: AsyncSession, model_name: str, *, limit: int = RESCUE_CHUNK) -> int:
    """Make due now what was due at once when it was stored, before the database's clock went back; return how many."""
    is_late = overtaken(dialect_of(session), model_name)
    late = select(g.id).where(is_late).order_by(g.run_at).limit(limit).with_for_update(skip_locked=True, key_share=True)
    statement = update(generations).where(_is_one_of(late), is_late).values(run_at=now()).returning(g.id)
    return len((await session.execute(statement)).all())


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


async def release_all(session: AsyncSession, worker_id: str, *, but: Collection[Lease]) -> int:
    """Give back what this worker still holds, ``but`` for these, at no cost to their budget; return how many."""
    statement = _let_go(case((g.cancel_requested, CANCELLED), else_=PENDING))
    statement = statement.where(g.status == written(PROCESSING), g.worker_id == worker_id, not_(_is_among(but)))
    rows = (await session.execute(statement)).all()
    if rows:
        await session.execute(_END_ATTEMPT, [_end(Lease(row.id, row.attempt), _released(row.status)) for row in rows])
    return len(rows)


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


def _has_lapsed(lapsed: Mapping[Lease, datetime] | None) -> ColumnElement[bool]:
    if lapsed is None:
        return g.lease_expires_at < now()
    named = [(lease.generation_id, lease.attempt, expires_at) for lease, expires_at in lapsed.items()]
    return tuple_(g.id, g.attempt, g.lease_expires_at).in_(named)


def _is_one_of(rows: Select[tuple[str]]) -> ColumnElement[bool]:
    """Choose rows by a query that is evaluated once: without MATERIALIZED its LIMIT may be applied again and again.

    A join (UPDATE … FROM), not ``IN``: with that SQLite walks all rows of the status in search of the few.
    """
    chosen = rows.cte("chosen").prefix_with("MATERIALIZED")
    return g.id == chosen.c.id


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
    g.continuation_sha256,
    g.melody_sha256,
    CLAIM_ORDER.label("claim_order"),
)


@lru_cache
def _claim_statement(
    dialect: str, worker_id: str, model_name: str, limit: int, lease_seconds: float, tenant_limit: int | None
) -> Any:
    """Return the statement that claims; a worker says the same few again and again, and building one takes its time.

    PostgreSQL's adds the attempts in the same round trip; SQLite's cannot.
    """
    claimed = (
        update(generations)
        .where(
            _is_one_of(due_rows(dialect, model_name, limit, tenant_limit)),
            g.status == written(PENDING),
            is_our_schema(),
        )
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
    if dialect != "postgresql":
        return claimed
    taken = claimed.cte("claimed")
    made = select(taken.c.id, taken.c.attempt, literal(worker_id))
    return select(taken).add_cte(
        insert(attempts).from_select(["generation_id", "attempt", "worker_id"], made).cte("made")
    )


_COMPLETION_COLUMNS = (
    column("lease_id", Id),
    column("lease_attempt", Integer),
    column("path", LongText),
    column("size", BigInteger),
    column("hash", HashText),
    column("version", ShortText),
    column("seconds", Double),
    column("audio", JsonObject),
)


def _is_completable(values: Any) -> ColumnElement[bool]:
    """Keep a completion to the row that its attempt holds, and that nobody wants cancelled: the fence."""
    is_held = and_(g.status == PROCESSING, g.worker_id.is_not(None), not_(g.cancel_requested))
    return and_(g.id == values.lease_id, g.attempt == values.lease_attempt, is_held)


def _complete_with(values: Any) -> Any:
    """Return the UPDATE that completes rows with these values: bind parameters, or a table's columns."""
    return (
        update(generations)
        .where(_is_completable(values))
        .values(
            status=COMPLETED,
            completed_at=now(),
            worker_id=null(),
            lease_expires_at=null(),
            progress=1.0,
            error_message=null(),
            file_path=values.path,
            file_size_bytes=values.size,
            sha256=values.hash,
            model_version=values.version,
            generation_time_seconds=values.seconds,
            metadata=with_json_key(g.metadata, literal(AUDIO_KEY), values.audio),
        )
    )


def _complete_together() -> Any:
    """Return PostgreSQL's UPDATE of many rows at once, with their values in one JSON text; they are locked by id first."""
    rows = func.jsonb_to_recordset(cast_to(bindparam("completions", type_=LongText), JSONB))
    values = rows.table_valued(*_COMPLETION_COLUMNS, name="given").render_derived(with_types=True)
    given = select(values).cte("given").prefix_with("MATERIALIZED")
    free = select(g.id).where(_is_completable(given.c)).order_by(g.id)
    free = free.with_for_update(of=generations, skip_locked=True, key_share=True)
    return _complete_with(given.c).where(_is_one_of(free)).returning(g.id, g.attempt)


_COMPLETE = _complete_with(SimpleNamespace(**{c.name: bindparam(c.name) for c in _COMPLETION_COLUMNS}))
_COMPLETE_TOGETHER = _complete_together()

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
        continuation_sha256=row.continuation_sha256,
        melody_sha256=row.melody_sha256,
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
        "audio": completion.audio,
    }


def _as_json(value: Any) -> str:
    """Return the value as JSON, null for what is not a number; ``json`` takes four times as long over a waveform."""
    return to_json(value, inf_nan_mode="null").decode()


def _released(status: str) -> AttemptOutcome:
    return AttemptOutcome.CANCELLED if status == CANCELLED else AttemptOutcome.RELEASED


def _end_completed(leases: Collection[Lease]) -> Any:
    """Return the UPDATE that ends the attempts of completed generations as they have ended."""
    named = [(lease.generation_id, lease.attempt) for lease in leases]
    return (
        update(attempts)
        .where(
            tuple_(attempts.c.generation_id, attempts.c.attempt).in_(named),
            attempts.c.outcome.is_(None),
            g.id == attempts.c.generation_id,
        )
        .values(
            finished_at=g.completed_at,
            outcome=AttemptOutcome.COMPLETED.value,
            device_seconds=g.generation_time_seconds,
        )
    )


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
