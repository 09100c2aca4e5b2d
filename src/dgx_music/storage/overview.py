"""What an operator looks at: workers, queues, what runs, waits and has finished, at one moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.catalog import UNTRAINED_NOTICE, is_untrained
from dgx_music.forecast import Range
from dgx_music.statuses import COMPLETED, FAILED, PENDING, PROCESSING, GenerationStatus, WorkerState
from dgx_music.storage.due import CLAIM_ORDER
from dgx_music.storage.estimates import Estimate, estimate
from dgx_music.storage.generation import g
from dgx_music.storage.models import ALL_MODELS, WorkerInfo
from dgx_music.storage.pauses import get_pauses
from dgx_music.storage.rescue import read_clock
from dgx_music.storage.schema import unindexed, written
from dgx_music.storage.workers import IS_LIVING, served_models

RATE_SECONDS = 300.0
"""The rates are those of the last five minutes."""
_NOTHING_LEFT = Estimate(status=GenerationStatus.COMPLETED)


@dataclass(frozen=True, kw_only=True)
class WorkerOverview:
    """A worker that has not ended; ``is_alive`` if its last heartbeat is younger than its lease."""

    id: str
    host: str
    pid: int
    state: WorkerState
    is_alive: bool
    model_name: str
    models: list[str]
    device: str
    slots: int
    running_count: int
    """How many generations it holds now."""
    started_at: datetime
    heartbeat_at: datetime
    notice: str | None
    """What is to be known of its model's audio; ``None`` if nothing is."""


@dataclass(frozen=True, kw_only=True)
class ModelQueue:
    """What of one model waits and runs, and when the last of it is likely to be done."""

    model_name: str
    waiting_count: int
    scheduled_count: int
    """How many of those that wait are not due yet."""
    running_count: int
    is_paused: bool
    """True also while everything is paused."""
    done_in: Range | None
    """Seconds until the last one is done that is due or runs now; ``None`` if that is unknown."""
    unknown_because: str | None
    notice: str | None


@dataclass(frozen=True, kw_only=True)
class QueueEntry:
    """One generation: the fields of its row that fit on a line."""

    id: str
    prompt: str
    model_name: str
    duration_seconds: float
    status: GenerationStatus
    attempt: int
    worker_id: str | None
    progress: float
    cancel_requested: bool
    run_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    generation_time_seconds: float | None
    error_message: str | None


@dataclass(frozen=True, kw_only=True)
class QueueRates:
    """What was finished within the last ``window_seconds``."""

    window_seconds: float
    completed_count: int
    failed_count: int
    completed_per_minute: float
    audio_seconds_per_second: float


@dataclass(frozen=True, kw_only=True)
class QueueOverview:
    """The workers and the queue at one moment of the database's clock."""

    read_at: datetime
    is_paused: bool
    """True while everything is paused, whatever its model."""
    workers: list[WorkerOverview]
    """The living ones first, then those that are silent; each in the order of their start."""
    models: list[ModelQueue]
    """Each model that is paused, or that a living worker serves, or of which anything waits or runs."""
    running: list[QueueEntry]
    """By worker, and by start."""
    waiting: list[QueueEntry]
    """The next ones in the order of claims."""
    finished: list[QueueEntry]
    """The last ones, newest first."""
    rates: QueueRates

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; times in ISO 8601, a range as ``low`` and ``high``."""
        plain: dict[str, Any] = _as_json(asdict(self))
        for model in plain["models"]:
            model["done_in_seconds"] = model.pop("done_in")
        return plain


async def read_overview(
    session: AsyncSession, *, waiting_limit: int, finished_limit: int
) -> QueueOverview:
    """Return the overview; finished rows are read from indexes, by their time, and only a few."""
    at = await read_clock(session)
    workers = await _workers(session)
    running = await _entries(session, g.status == written(PROCESSING))
    running.sort(key=lambda entry: (entry.worker_id or "", entry.started_at or at, entry.id))
    paused = {pause.model_name for pause in await get_pauses(session)}
    counts = await _count_waiting(session, at)
    held = Counter(entry.worker_id for entry in running)
    return QueueOverview(
        read_at=at,
        is_paused=ALL_MODELS in paused,
        workers=[_overview_of(row, is_alive, held[row.id]) for row, is_alive in workers],
        models=await _models(session, at, workers, running, counts, paused),
        running=running,
        waiting=await _next(session, sorted(counts), waiting_limit),
        finished=await _finished(session, finished_limit),
        rates=await _rates(session, at),
    )


_COLUMNS = [g[name] for name in QueueEntry.__annotations__]


async def _entries(session: AsyncSession, *conditions: Any) -> list[QueueEntry]:
    rows = await session.execute(select(*_COLUMNS).where(*conditions))
    return [_entry_of(row._mapping) for row in rows]


def _entry_of(row: Mapping[Any, Any]) -> QueueEntry:
    return QueueEntry(**{name: row[name] for name in QueueEntry.__annotations__})


async def _workers(session: AsyncSession) -> list[tuple[WorkerInfo, bool]]:
    query = select(WorkerInfo, IS_LIVING).where(WorkerInfo.state != WorkerState.ENDED.value)
    rows = await session.execute(query.order_by(WorkerInfo.started_at, WorkerInfo.id))
    return sorted(((row, bool(alive)) for row, alive in rows), key=lambda each: not each[1])


def _overview_of(row: WorkerInfo, is_alive: bool, running_count: int) -> WorkerOverview:
    own = {"is_alive", "state", "models", "running_count", "notice"}
    same = {name: getattr(row, name) for name in WorkerOverview.__annotations__.keys() - own}
    return WorkerOverview(
        **same,
        is_alive=is_alive,
        state=WorkerState(row.state),
        models=sorted(served_models(row)),
        running_count=running_count,
        notice=_notice(row.model_name),
    )


def _notice(model_name: str) -> str | None:
    return UNTRAINED_NOTICE if is_untrained(model_name) else None


async def _count_waiting(session: AsyncSession, at: datetime) -> dict[str, tuple[int, int]]:
    """Return for each model how many wait, and how many of them are due.

    On PostgreSQL all of it is in the index of what is due. The attempt, which is always so, is in
    the index's condition.
    """
    due = func.count().filter(g.run_at <= at)
    is_waiting = and_(g.status == written(PENDING), g.attempt >= literal_column("0"))
    query = select(g.model_name, func.count(), due).where(is_waiting).group_by(g.model_name)
    return {name: (waiting, due) for name, waiting, due in await session.execute(query)}


async def _models(
    session: AsyncSession,
    at: datetime,
    workers: Sequence[tuple[WorkerInfo, bool]],
    running: Sequence[QueueEntry],
    counts: Mapping[str, tuple[int, int]],
    paused: set[str],
) -> list[ModelQueue]:
    served = frozenset[str]().union(*(served_models(row) for row, is_alive in workers if is_alive))
    runs = Counter(entry.model_name for entry in running)
    models = []
    for name in sorted(served | runs.keys() | counts.keys() | (paused - {ALL_MODELS})):
        waiting, due = counts.get(name, (0, 0))
        last = await _last_id(session, name, at) if due else _longest_left(name, running)
        end = _NOTHING_LEFT if last is None else await estimate(session, last)
        models.append(
            ModelQueue(
                model_name=name,
                waiting_count=waiting,
                scheduled_count=waiting - due,
                running_count=runs[name],
                is_paused=bool(paused & {name, ALL_MODELS}),
                done_in=end.done_in,
                unknown_because=end.unknown_because,
                notice=_notice(name),
            )
        )
    return models


async def _last_id(session: AsyncSession, model_name: str, at: datetime) -> str | None:
    """Return the due generation of this model that is claimed after all others."""
    is_due = (
        g.status == written(PENDING),
        g.model_name == model_name,
        unindexed(g.run_at) <= at,
    )
    last = select(g.id).where(*is_due).order_by(CLAIM_ORDER.desc(), g.id.desc()).limit(1)
    found: str | None = await session.scalar(last)
    return found


def _longest_left(model_name: str, running: Sequence[QueueEntry]) -> str | None:
    """Return which running generation of this model has the most audio still to make.

    One that is being cancelled, or was taken by hand, is the answer only if there is no other:
    nobody knows when it ends.
    """

    def order(entry: QueueEntry) -> tuple[bool, float]:
        is_known = entry.worker_id is not None and not entry.cancel_requested
        return is_known, entry.duration_seconds * (1 - entry.progress)

    own = [entry for entry in running if entry.model_name == model_name]
    return max(own, key=order).id if own else None


async def _next(session: AsyncSession, models: Sequence[str], limit: int) -> list[QueueEntry]:
    """Return the next ones of all models in the order of claims; reads so many of each model."""
    found: list[tuple[float, QueueEntry]] = []
    for name in models:
        is_waiting = (g.status == written(PENDING), g.model_name == name)
        query = select(*_COLUMNS, CLAIM_ORDER.label("place")).where(*is_waiting)
        rows = await session.execute(query.order_by(CLAIM_ORDER, g.id).limit(limit))
        found += [(row.place, _entry_of(row._mapping)) for row in rows]
    found.sort(key=lambda each: (each[0], each[1].id))
    return [entry for _, entry in found[:limit]]


async def _finished(session: AsyncSession, limit: int) -> list[QueueEntry]:
    has_ended = g.completed_at.is_not(None)
    query = select(*_COLUMNS).where(has_ended).order_by(g.completed_at.desc()).limit(limit)
    return [_entry_of(row._mapping) for row in await session.execute(query)]


async def _rates(session: AsyncSession, at: datetime) -> QueueRates:
    since = at - timedelta(seconds=RATE_SECONDS)
    is_recent = and_(
        g.status.in_([written(COMPLETED), written(FAILED)]),
        g.completed_at > since,
    )
    query = select(g.status, func.count(), func.sum(g.duration_seconds)).where(is_recent)
    sums = {row[0]: row[1:] for row in await session.execute(query.group_by(g.status))}
    completed, audio = sums.get(COMPLETED, (0, 0.0))
    return QueueRates(
        window_seconds=RATE_SECONDS,
        completed_count=completed,
        failed_count=sums.get(FAILED, (0, 0.0))[0],
        completed_per_minute=completed / RATE_SECONDS * 60,
        audio_seconds_per_second=audio / RATE_SECONDS,
    )


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _as_json(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return value
