"""The workers' own rows: who serves what, where, and when each was last heard of."""

from __future__ import annotations

from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.models import WorkerInfo
from dgx_music.storage.repository import dialect_of, insert
from dgx_music.storage.schema import now, now_plus

_FORGET_AFTER_SECONDS = 86_400.0


async def register_worker(session: AsyncSession, **values: Any) -> None:
    """Add the worker's row, or take over one of the same id."""
    statement = insert(dialect_of(session), WorkerInfo).values(**values)
    changes = {**values, "running_count": 0, "started_at": now(), "heartbeat_at": now()}
    await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changes))


async def heartbeat_worker(session: AsyncSession, worker_id: str, running_count: int) -> None:
    """Say that the worker is alive, with this many generations in hand."""
    statement = update(WorkerInfo).where(WorkerInfo.id == worker_id)
    await session.execute(statement.values(heartbeat_at=now(), running_count=running_count))


async def remove_worker(session: AsyncSession, worker_id: str) -> None:
    """Remove the row of a worker that stops, and of any that has been silent for a day."""
    is_forgotten = WorkerInfo.heartbeat_at < now_plus(-_FORGET_AFTER_SECONDS)
    await session.execute(delete(WorkerInfo).where((WorkerInfo.id == worker_id) | is_forgotten))


async def get_workers(session: AsyncSession) -> list[dict[str, Any]]:
    """Return the workers, oldest first, each with ``is_alive``: heard of within its own lease."""
    is_alive = WorkerInfo.heartbeat_at > now_plus(-WorkerInfo.lease_seconds)
    query = select(WorkerInfo, is_alive).order_by(WorkerInfo.started_at, WorkerInfo.id)
    return [{**worker.to_dict(), "is_alive": bool(alive)} for worker, alive in (await session.execute(query)).all()]


async def has_live_worker(session: AsyncSession, model_name: str) -> bool:
    """Return True where somebody alive serves this model."""
    is_alive = WorkerInfo.heartbeat_at > now_plus(-WorkerInfo.lease_seconds)
    query = select(func.count()).select_from(WorkerInfo).where(WorkerInfo.model_name == model_name, is_alive)
    return bool(await session.scalar(query))
