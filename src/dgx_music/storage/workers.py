"""The workers' own rows: who serves what, where, with what in hand, when each was last heard of, and how it ended.

A worker is *alive* while it was heard of within its own lease and has not ended. It is *silent* where it was not, and has not
said that it ends: killed, or cut off. One that has ended is neither.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, delete, exists, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.models import Generation, WorkerInfo
from dgx_music.storage.schema import PROCESSING, WorkerState, dialect_of, insert, now, now_plus, written

_FORGET_AFTER_SECONDS = 86_400.0
_ENDS_KEPT = 20
"""Of each model: a worker that its service manager starts again and again would else fill the table."""

IS_LIVING = and_(
    WorkerInfo.state != WorkerState.ENDED.value, WorkerInfo.heartbeat_at > now_plus(-WorkerInfo.lease_seconds)
)

_IS_HELD = and_(Generation.status == written(PROCESSING), Generation.worker_id.is_not(None))


@dataclass(frozen=True)
class Service:
    """Who makes what a model's queue holds: workers that serve it, that load it, and the last one that no longer does."""

    serving_count: int = 0
    loading_count: int = 0
    last_id: str | None = None
    """Of those that have ended or fallen silent, the one last heard of."""
    gone_since: datetime | None = None
    end_reason: str | None = None
    """Why it ended; ``None`` where it has fallen silent instead."""


async def register_worker(session: AsyncSession, **values: Any) -> None:
    """Add the worker's row, or take over one of the same id."""
    await heartbeat_worker(session, **values, running_count=0)
    await session.execute(update(WorkerInfo).where(WorkerInfo.id == values["id"]).values(started_at=now()))
    await _forget(session)


async def heartbeat_worker(session: AsyncSession, **values: Any) -> None:
    """Say that the worker is alive, and what it is; its row is added where somebody has removed it."""
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
    ended = {**values, "state": WorkerState.ENDED.value, "ended_at": now(), "end_reason": reason, "running_count": 0}
    statement = insert(dialect_of(session), WorkerInfo).values(**ended)
    changes = {**ended, "heartbeat_at": now()}
    await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changes))
    await _forget(session)


async def _forget(session: AsyncSession) -> None:
    """Forget who ended or fell silent more than a day ago, and of each model all but the last few that have ended."""
    newest_first = WorkerInfo.ended_at.desc()
    nth = func.row_number().over(partition_by=WorkerInfo.model_name, order_by=newest_first).label("nth")
    ends = select(WorkerInfo.id, nth).where(WorkerInfo.state == WorkerState.ENDED.value).subquery()
    is_surplus = WorkerInfo.id.in_(select(ends.c.id).where(ends.c.nth > _ENDS_KEPT))
    is_old = WorkerInfo.heartbeat_at < now_plus(-_FORGET_AFTER_SECONDS)
    forgotten = select(WorkerInfo.id).where(or_(is_old, is_surplus)).with_for_update(skip_locked=True)
    chosen = forgotten.cte("forgotten").prefix_with("MATERIALIZED")  # whoever else ends now may forget the same ones
    await session.execute(
        delete(WorkerInfo).where(WorkerInfo.id.in_(select(chosen.c.id))),
        execution_options={"synchronize_session": False},
    )


async def get_workers(session: AsyncSession) -> list[dict[str, Any]]:
    """Return the workers, oldest first, each with ``is_alive`` (see above) and ``running``.

    That is a list of what it has in hand: ``id``, ``model_name``, ``progress`` and ``started_at`` of each generation.
    Those that ended within the last day are among them.
    """
    query = select(WorkerInfo, IS_LIVING).order_by(WorkerInfo.started_at, WorkerInfo.id)
    rows = (await session.execute(query)).all()
    running = await _find_running(session)
    return [{**worker.to_dict(), "is_alive": bool(alive), "running": running[worker.id]} for worker, alive in rows]


async def find_service(session: AsyncSession, model_name: str) -> Service:
    """Return who serves this model, and who did last."""
    query = select(WorkerInfo, IS_LIVING.label("is_living")).order_by(WorkerInfo.heartbeat_at, WorkerInfo.id)
    rows = [row for row in await session.execute(query) if model_name in served_models(row.WorkerInfo)]
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
    """Return the models that a worker's row says it serves; one that names none serves what it has loaded."""
    return frozenset(worker.models or [worker.model_name])


async def count_free_workers(session: AsyncSession, model_name: str) -> int:
    """Return how many living workers have this model loaded and a slot free, as far as their heartbeats tell."""
    is_free = and_(
        IS_LIVING,
        WorkerInfo.state == WorkerState.SERVING.value,
        WorkerInfo.model_name == model_name,
        WorkerInfo.running_count < WorkerInfo.slots,
    )
    return await session.scalar(select(func.count()).select_from(WorkerInfo).where(is_free)) or 0


async def longest_silent(session: AsyncSession, *, but: str) -> datetime | None:
    """Return since when one of the workers, ``but`` for this one, was not heard of; ``None`` where there is no other.

    Only those count that hold something: who has ended, or was killed and rescued long ago, left nothing to be rescued.
    """
    has_not_ended = WorkerInfo.state != WorkerState.ENDED.value
    holds_something = exists().where(_IS_HELD, Generation.worker_id == WorkerInfo.id)
    since: datetime | None = await session.scalar(
        select(func.min(WorkerInfo.heartbeat_at)).where(WorkerInfo.id != but, has_not_ended, holds_something)
    )
    return since


async def _find_running(session: AsyncSession) -> Mapping[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in await session.scalars(select(Generation).where(_IS_HELD).order_by(Generation.id)):
        shown = row.to_dict()
        found[str(row.worker_id)].append({name: shown[name] for name in ("id", "model_name", "progress", "started_at")})
    return found
