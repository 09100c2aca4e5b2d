"""The completion of generations: the write after which their audio belongs to their rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    and_,
    bindparam,
    column,
    literal,
    not_,
    null,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import COMPLETED, PROCESSING, AttemptOutcome
from dgx_music.storage.generation import g, generations
from dgx_music.storage.leases import Lease, is_among, is_held_by
from dgx_music.storage.metadata import AUDIO_KEY, facts_as_json
from dgx_music.storage.models import attempts
from dgx_music.storage.prepared import Prepared, as_json, json_rows
from dgx_music.storage.schema import (
    HashText,
    Id,
    LongText,
    ShortText,
    dialect_of,
    now,
    rechecked,
    unindexed,
    with_json_key,
)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What an attempt leaves behind: the place of its audio, and how it was made."""

    lease: Lease
    file_path: str
    file_size_bytes: int
    sha256: str
    model_version: str
    generation_time_seconds: float
    audio: Mapping[str, Any]
    """Goes into the row's metadata under the key ``audio``; ``bpm`` and ``key`` into columns too."""


async def complete(session: AsyncSession, completions: Sequence[Completion]) -> set[Lease]:
    """Complete these generations together; return the leases that have completed their rows.

    The others were taken by another attempt, deleted, have a cancel requested, or are locked by
    another transaction; ``find_completable`` returns the locked ones. After a lost reply the same
    call gives the same answer.
    """
    if not completions:
        return set()
    # In the order in which renewals lock them.
    completions = sorted(completions, key=lambda completion: completion.lease.generation_id)
    rows = [_values(completion) for completion in completions]
    if dialect_of(session) == "postgresql":
        done = _leases(await _COMPLETE_TOGETHER.rows(session, {"completions": as_json(rows)}))
    else:
        done = await _complete_each(session, rows)
    if len(done) < len(completions):  # lost, or completed by an earlier call
        done |= await find_completed(session, [completion.lease for completion in completions])
    return done


async def find_completed(session: AsyncSession, leases: Collection[Lease]) -> set[Lease]:
    """Return which of these leases have completed their rows.

    The answer is exact, since attempt numbers are never used twice.
    """
    query = select(g.id, g.attempt).where(is_among(leases), unindexed(g.status) == COMPLETED)
    return await _read_leases(session, query)


async def find_completable(session: AsyncSession, leases: Collection[Lease]) -> set[Lease]:
    """Return which of these leases could still be completed.

    Right after ``complete`` these are the rows that were locked.
    """
    if not leases:
        return set()
    query = select(g.id, g.attempt).where(is_held_by(leases), not_(g.cancel_requested))
    return await _read_leases(session, query)


async def _complete_each(session: AsyncSession, rows: Sequence[Mapping[str, Any]]) -> set[Lease]:
    done: set[Lease] = set()
    for row in rows:
        moved = await _COMPLETE.rows(session, row)
        done |= {Lease(each.id, each.attempt) for each in moved}
    ended = [row for row in rows if Lease(row["lease_id"], row["lease_attempt"]) in done]
    await _END_ATTEMPT.run_each(session, ended)
    return done


async def _read_leases(session: AsyncSession, statement: Any) -> set[Lease]:
    return _leases((await session.execute(statement)).all())


def _leases(rows: Sequence[Any]) -> set[Lease]:
    return {Lease(row.id, row.attempt) for row in rows}


def _complete_with(values: Any) -> Any:
    """Return the UPDATE that completes rows with these parameters or columns."""
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
            bpm=values.bpm,
            musical_key=values.musical_key,
        )
        .returning(g.id, g.attempt, g.completed_at, g.generation_time_seconds)
    )


def _is_completable(values: Any) -> ColumnElement[bool]:
    """Return the fence: the attempt itself holds the row, and no cancel is requested."""
    is_processing = rechecked(g.status) == PROCESSING
    is_held = and_(is_processing, g.worker_id.is_not(None), not_(g.cancel_requested))
    return and_(g.id == values.lease_id, g.attempt == values.lease_attempt, is_held)


def _end_attempt(completed: Any) -> Any:
    """Return the UPDATE that ends the attempts of completed rows, with the rows' own values."""
    return (
        update(attempts)
        .where(
            attempts.c.generation_id == completed.id,
            attempts.c.attempt == completed.attempt,
            attempts.c.outcome.is_(None),
        )
        .values(
            finished_at=completed.completed_at,
            outcome=AttemptOutcome.COMPLETED.value,
            device_seconds=completed.generation_time_seconds,
        )
    )


def _complete_together() -> Any:
    """Return PostgreSQL's UPDATE of many rows and their attempts; it locks in the order of ids.

    It looks each row up by its id. A join of all rows at once would make PostgreSQL read the whole
    table wherever its statistics, or those of a plan that it keeps, say that the table is small.
    """
    given = json_rows("completions", _COLUMNS)
    is_free = select(g.status).where(_is_completable(given.c)).correlate(given)
    is_free = is_free.with_for_update(skip_locked=True, key_share=True)
    free = is_free.limit(1).lateral("free")
    chosen = select(given, free.c.status).join_from(given, free, true())
    locked = chosen.cte("locked").prefix_with("MATERIALIZED")
    # PostgreSQL expects one row of such a condition, and then joins by the index as well.
    is_one = rechecked(locked.c.status) == PROCESSING
    completed = _complete_with(locked.c).where(is_one).cte("completed")
    ended = _end_attempt(completed.c).cte("ended")
    return select(completed.c.id, completed.c.attempt).add_cte(ended)


_COLUMNS = (
    column("lease_id", Id),
    column("lease_attempt", Integer),
    column("path", LongText),
    column("size", BigInteger),
    column("hash", HashText),
    column("version", ShortText),
    column("seconds", Double),
    column("audio", LongText),
    column("bpm", Double),
    column("musical_key", ShortText),
)
_COMPLETE = Prepared(
    lambda: _complete_with(SimpleNamespace(**{c.name: bindparam(c.name) for c in _COLUMNS}))
)
_END_ATTEMPT = Prepared(
    lambda: _end_attempt(g).where(
        g.id == bindparam("lease_id"), g.attempt == bindparam("lease_attempt")
    )
)
_COMPLETE_TOGETHER = Prepared(_complete_together)


def _values(completion: Completion) -> dict[str, Any]:
    return {
        "lease_id": completion.lease.generation_id,
        "lease_attempt": completion.lease.attempt,
        "path": completion.file_path,
        "size": completion.file_size_bytes,
        "hash": completion.sha256,
        "version": completion.model_version,
        "seconds": completion.generation_time_seconds,
        "audio": facts_as_json(completion.audio),
        "bpm": completion.audio.get("bpm"),
        "musical_key": completion.audio.get("key"),
    }
