"""The completion of generations: the write after which their audio belongs to their rows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pydantic_core import to_json
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    and_,
    bindparam,
    cast,
    column,
    func,
    literal,
    not_,
    null,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import COMPLETED, PROCESSING, AttemptOutcome
from dgx_music.storage.generation import g, generations
from dgx_music.storage.leases import Lease, is_among, is_held_by, is_one_of
from dgx_music.storage.models import attempts
from dgx_music.storage.schema import (
    HashText,
    Id,
    JsonObject,
    LongText,
    ShortText,
    dialect_of,
    now,
    with_json_key,
)

AUDIO_KEY = "audio"
"""The key that completion adds to a row's metadata."""


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
    """Goes into the row's metadata under the key ``audio``."""


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
    done = await _complete(session, completions)
    if len(done) < len(completions):  # lost, or completed by an earlier call
        done = await find_completed(session, [completion.lease for completion in completions])
    if done:
        await session.execute(_end_attempts(done))
    return done


async def find_completed(session: AsyncSession, leases: Collection[Lease]) -> set[Lease]:
    """Return which of these leases have completed their rows.

    The answer is exact, since attempt numbers are never used twice.
    """
    query = select(g.id, g.attempt).where(is_among(leases), g.status == COMPLETED)
    return await _read_leases(session, query)


async def find_completable(session: AsyncSession, leases: Collection[Lease]) -> set[Lease]:
    """Return which of these leases could still be completed.

    Right after ``complete`` these are the rows that were locked.
    """
    if not leases:
        return set()
    query = select(g.id, g.attempt).where(is_held_by(leases), not_(g.cancel_requested))
    return await _read_leases(session, query)


async def _complete(session: AsyncSession, completions: Sequence[Completion]) -> set[Lease]:
    """Complete what can be completed and return it; on SQLite return nothing."""
    rows = [_values(completion) for completion in completions]
    if dialect_of(session) == "postgresql":
        return await _read_leases(session, _COMPLETE_TOGETHER, {"completions": _as_json(rows)})
    await session.execute(_COMPLETE, [row | {"audio": _as_json(row["audio"])} for row in rows])
    return set()


async def _read_leases(session: AsyncSession, statement: Any, values: Any = None) -> set[Lease]:
    rows = (await session.execute(statement, values)).all()
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
        )
    )


def _is_completable(values: Any) -> ColumnElement[bool]:
    """Return the fence: the attempt itself holds the row, and no cancel is requested."""
    is_held = and_(g.status == PROCESSING, g.worker_id.is_not(None), not_(g.cancel_requested))
    return and_(g.id == values.lease_id, g.attempt == values.lease_attempt, is_held)


def _complete_together() -> Any:
    """Return PostgreSQL's UPDATE of many rows at once; it locks them in the order of their ids.

    Their values are in one JSON text.
    """
    rows = func.jsonb_to_recordset(cast(bindparam("completions", type_=LongText), JSONB))
    values = rows.table_valued(*_COLUMNS, name="given").render_derived(with_types=True)
    given = select(values).cte("given").prefix_with("MATERIALIZED")
    free = select(g.id).where(_is_completable(given.c)).order_by(g.id)
    free = free.with_for_update(of=generations, skip_locked=True, key_share=True)
    return _complete_with(given.c).where(is_one_of(free)).returning(g.id, g.attempt)


_COLUMNS = (
    column("lease_id", Id),
    column("lease_attempt", Integer),
    column("path", LongText),
    column("size", BigInteger),
    column("hash", HashText),
    column("version", ShortText),
    column("seconds", Double),
    column("audio", JsonObject),
)
_COMPLETE = _complete_with(SimpleNamespace(**{c.name: bindparam(c.name) for c in _COLUMNS}))
_COMPLETE_TOGETHER = _complete_together()


def _values(completion: Completion) -> dict[str, Any]:
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
    """Return the value as JSON, with null for NaN; ``json`` takes four times as long."""
    return to_json(value, inf_nan_mode="null").decode()


def _end_attempts(leases: Collection[Lease]) -> Any:
    """Return the UPDATE that ends the attempts of completed rows, with the rows' own values."""
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
