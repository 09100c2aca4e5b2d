"""The workers' own rows: who serves what, on which machine, its last heartbeat, and how it ended.

A worker is *alive* if its last heartbeat is younger than its own lease and it has not ended. It is
*silent* if the heartbeat is older and it has not said that it ends: it was killed or cut off. A
worker that has ended is neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, delete, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import PROCESSING, WorkerState
from dgx_music.storage.models import Generation, WorkerInfo
from dgx_music.storage.schema import dialect_of, insert, now, now_plus, written

_FORGET_AFTER_SECONDS = 86_400.0
_RUNNING_FIELDS = ("id", "model_name", "progress", "started_at")
_ENDS_KEPT = 20
"""For each model: a worker that is started again and again must not fill the table."""

IS_LIVING = and_(
    WorkerInfo.state != WorkerState.ENDED.value,
    WorkerInfo.heartbeat_at > now_plus(-WorkerInfo.lease_seconds),
)

_IS_HELD = and_(Generation.status == written(PROCESSING), Generation.worker_id.is_not(None))


@dataclass(frozen=True)
class Service:
    """The workers of one model: how many serve it and load it, and the last one that is gone."""

    serving_count: int = 0
    loading_count: int = 0
    last_id: str | None = None
    """Of those that have ended or are silent, the one with the latest heartbeat."""
    gone_since: datetime | None = None
    end_reason: str | None = None
    """Why it ended; ``None`` if it is silent instead."""


async def register_worker(session: AsyncSession, **values: Any) -> None:
    """Add the worker's row, or replace the one with the same id."""
    await heartbeat_worker(session, **values, running_count=0)
    await session.execute(
        update(WorkerInfo).where(WorkerInfo.id == values["id"]).values(started_at=now())
    )
    await _forget(session)


async def heartbeat_worker(session: AsyncSession, **values: Any) -> None:
    """Record that the worker is alive, and what it is; add its row if somebody has deleted it."""
    statement = insert(dialect_of(session), WorkerInfo).values(**values)
    changes = {
        "state": WorkerState.SERVING.value,
        **values,
        "heartbeat_at": now(),
        "ended_at": None,
        "end_reason": None,
    }
    await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changes))


async def end_worker(session: AsyncSession, *, reason: str, **values: Any) -> None:
    """Record that the worker has ended, and why, in one line."""
    ended = {
        **values,
        "state": WorkerState.ENDED.value,
        "ended_at": now(),
        "end_reason": reason,
        "running_count": 0,
    }
    statement = insert(dialect_of(session), WorkerInfo).values(**ended)
    changes = {**ended, "heartbeat_at": now()}
    await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changes))
    await _forget(session)


async def _forget(session: AsyncSession) -> None:
    """Delete workers that are gone for a day, and all but the last few ended ones of a model."""
    newest_first = WorkerInfo.ended_at.desc()
    nth = func.row_number().over(partition_by=WorkerInfo.model_name, order_by=newest_first)
    has_ended = WorkerInfo.state == WorkerState.ENDED.value
    ends = select(WorkerInfo.id, nth.label("nth")).where(has_ended).subquery()
    is_surplus = WorkerInfo.id.in_(select(ends.c.id).where(ends.c.nth > _ENDS_KEPT))
    is_old = WorkerInfo.heartbeat_at < now_plus(-_FORGET_AFTER_SECONDS)
    forgotten = select(WorkerInfo.id).where(or_(is_old, is_surplus))
    # Another worker that ends now may delete the same rows: skip what it has locked.
    unlocked = forgotten.with_for_update(skip_locked=True)
    chosen = unlocked.cte("forgotten").prefix_with("MATERIALIZED")
    await session.execute(
        delete(WorkerInfo).where(WorkerInfo.id.in_(select(chosen.c.id))),
        execution_options={"synchronize_session": False},
    )


async def get_workers(session: AsyncSession) -> list[dict[str, Any]]:
    """Return the workers, oldest first, each with ``is_alive`` (see above) and ``running``.

    ``running`` has ``id``, ``model_name``, ``progress`` and ``started_at`` of each generation that
    the worker holds. Workers that ended within the last day are included.
    """
    query = select(WorkerInfo, IS_LIVING).order_by(WorkerInfo.started_at, WorkerInfo.id)
    rows = (await session.execute(query)).all()
    running = await _find_running(session)
    return [
        {**worker.to_dict(), "is_alive": bool(alive), "running": running[worker.id]}
        for worker, alive in rows
    ]


async def find_service(session: AsyncSession, model_name: str) -> Service:
    """Return which workers serve this model, and which one did last."""
    query = select(WorkerInfo, IS_LIVING.label("is_living")).order_by(
        WorkerInfo.heartbeat_at, WorkerInfo.id
    )
    rows = [
        row for row in await session.execute(query) if model_name in served_models(row.WorkerInfo)
    ]
    states = [row.WorkerInfo.state for row in rows if row.is_living]
    gone = [row.WorkerInfo for row in rows if not row.is_living]
    last = gone[-1] if gone else None
    return Service(
        serving_count=states.count(WorkerState.SERVING.value),
        loading_count=states.count(WorkerState.LOADING.value),
        last_id=last and last.id,
        gone_since=last and (last.ended_at or last.heartbeat_at),
        end_reason=last and last.end_reason,
    )


def served_models(worker: Any) -> frozenset[str]:
    """Return the models that a worker serves by its row; if it names none, the loaded one."""
    return frozenset(worker.models or [worker.model_name])


async def count_free_workers(session: AsyncSession, model_name: str) -> int:
    """Return how many living workers have this model loaded, and hold fewer than they have slots."""
    is_free = and_(
        IS_LIVING,
        WorkerInfo.state == WorkerState.SERVING.value,
        WorkerInfo.model_name == model_name,
        WorkerInfo.running_count < WorkerInfo.slots,
    )
    return await session.scalar(select(func.count()).select_from(WorkerInfo).where(is_free)) or 0


async def longest_silent(session: AsyncSession, *, other_than: str) -> datetime | None:
    """Return the oldest heartbeat of all workers except this one; ``None`` if there is no other.

    Only workers that hold a generation count: the others leave nothing to rescue.
    """
    has_not_ended = WorkerInfo.state != WorkerState.ENDED.value
    holds_something = exists().where(_IS_HELD, Generation.worker_id == WorkerInfo.id)
    oldest = select(func.min(WorkerInfo.heartbeat_at))
    oldest = oldest.where(WorkerInfo.id != other_than, has_not_ended, holds_something)
    since: datetime | None = await session.scalar(oldest)
    return since


async def _find_running(session: AsyncSession) -> Mapping[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in await session.scalars(select(Generation).where(_IS_HELD).order_by(Generation.id)):
        fields = row.to_dict()
        found[str(row.worker_id)].append({name: fields[name] for name in _RUNNING_FIELDS})
    return found
