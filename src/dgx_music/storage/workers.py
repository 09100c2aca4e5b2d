"""The workers' own rows: who serves what, where, with what in hand, and when each was last heard of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.models import Generation, WorkerInfo
from dgx_music.storage.repository import dialect_of, insert
from dgx_music.storage.schema import PROCESSING, now, now_plus, written

_FORGET_AFTER_SECONDS = 86_400.0


async def register_worker(session: AsyncSession, **values: Any) -> None:
    """Add the worker's row, or take over one of the same id."""
    await heartbeat_worker(session, **values, running_count=0)
    await session.execute(update(WorkerInfo).where(WorkerInfo.id == values["id"]).values(started_at=now()))


async def heartbeat_worker(session: AsyncSession, **values: Any) -> None:
    """Say that the worker is alive, and what it is; its row is added where somebody has removed it."""
    statement = insert(dialect_of(session), WorkerInfo).values(**values)
    changes = {**values, "heartbeat_at": now()}
    await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changes))


async def remove_worker(session: AsyncSession, worker_id: str) -> None:
    """Remove the row of a worker that stops, and of any that has been silent for a day."""
    is_forgotten = WorkerInfo.heartbeat_at < now_plus(-_FORGET_AFTER_SECONDS)
    await session.execute(delete(WorkerInfo).where((WorkerInfo.id == worker_id) | is_forgotten))


async def get_workers(session: AsyncSession) -> list[dict[str, Any]]:
    """Return the workers, oldest first, each with ``is_alive`` (heard of within its own lease) and ``running``.

    That is a list of what it has in hand: ``id``, ``model_name``, ``progress`` and ``started_at`` of each generation.
    """
    is_alive = WorkerInfo.heartbeat_at > now_plus(-WorkerInfo.lease_seconds)
    query = select(WorkerInfo, is_alive).order_by(WorkerInfo.started_at, WorkerInfo.id)
    rows = (await session.execute(query)).all()
    running = await _find_running(session)
    return [{**worker.to_dict(), "is_alive": bool(alive), "running": running[worker.id]} for worker, alive in rows]


async def has_live_worker(session: AsyncSession, model_name: str) -> bool:
    """Return True where somebody alive serves this model."""
    rows = await session.execute(_living(WorkerInfo.models, WorkerInfo.model_name))
    return any(model_name in served_models(row) for row in rows)


def served_models(worker: Any) -> frozenset[str]:
    """Return the models that a worker's row says it serves; one that names none serves what it has loaded."""
    return frozenset(worker.models or [worker.model_name])


async def count_free_workers(session: AsyncSession, model_name: str) -> int:
    """Return how many living workers have this model loaded and a slot free, as far as their heartbeats tell."""
    is_free = (WorkerInfo.model_name == model_name) & (WorkerInfo.running_count < WorkerInfo.slots)
    return await session.scalar(_living(func.count()).where(is_free)) or 0


async def longest_silent(session: AsyncSession, *, but: str) -> datetime | None:
    """Return since when one of the workers, ``but`` for this one, was not heard of; ``None`` where there is no other."""
    since: datetime | None = await session.scalar(select(func.min(WorkerInfo.heartbeat_at)).where(WorkerInfo.id != but))
    return since


def _living(*what: Any) -> Any:
    return select(*what).select_from(WorkerInfo).where(WorkerInfo.heartbeat_at > now_plus(-WorkerInfo.lease_seconds))


async def _find_running(session: AsyncSession) -> Mapping[str, list[dict[str, Any]]]:
    is_held = (Generation.status == written(PROCESSING)) & Generation.worker_id.is_not(None)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in await session.scalars(select(Generation).where(is_held).order_by(Generation.id)):
        shown = row.to_dict()
        found[str(row.worker_id)].append({name: shown[name] for name in ("id", "model_name", "progress", "started_at")})
    return found
