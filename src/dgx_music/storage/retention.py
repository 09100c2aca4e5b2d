"""Which rows may be deleted, and which generation owns a file.

Pruning and ``doctor --files`` use it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import COMPLETED, FINISHED, PROCESSING
from dgx_music.storage.generation import g, generations
from dgx_music.storage.leases import Lease, is_among
from dgx_music.storage.schema import now_plus, unindexed


@dataclass(frozen=True)
class Owner:
    """A generation as the owner of files."""

    attempt: int
    """Its last attempt."""
    is_live: bool
    """True if that attempt runs or has completed, so that it may have a file."""
    file_path: str | None
    """The file that the row names."""

    def may_have(self, attempt: int, path: str | None = None) -> bool:
        """Return True if this attempt's file belongs to the generation, or may later: keep it."""
        is_own = attempt > self.attempt or (attempt == self.attempt and self.is_live)
        return is_own or (path is not None and path == self.file_path)


async def find_prunable(
    session: AsyncSession, *, status: str, older_than_seconds: float, limit: int
) -> list[Lease]:
    """Return finished generations of this status that ended longer ago, as leases."""
    query = (
        select(g.id, g.attempt)
        .where(
            g.status == status,
            g.status.in_(FINISHED),
            g.completed_at <= now_plus(-older_than_seconds),
        )
        .order_by(g.completed_at)
        .limit(limit)
    )
    return [Lease(row.id, row.attempt) for row in (await session.execute(query)).all()]


async def find_files(session: AsyncSession, leases: Collection[Lease]) -> list[str]:
    """Return the places in which workers have stored the audio of these generations."""
    has_audio = (g.sha256.is_not(None), g.file_path.is_not(None))
    return list(await session.scalars(select(g.file_path).where(is_among(leases), *has_audio)))


async def prune(session: AsyncSession, leases: Collection[Lease]) -> int:
    """Delete these rows if they are still finished; return how many. Delete their files first."""
    is_finished = unindexed(g.status).in_(FINISHED)
    statement = delete(generations).where(is_among(leases), is_finished).returning(g.id)
    return len((await session.execute(statement)).all())


async def find_owners(session: AsyncSession, generation_ids: Collection[str]) -> dict[str, Owner]:
    """Return those of these generations that exist, by id."""
    query = select(g.id, g.attempt, g.status, g.file_path).where(g.id.in_(generation_ids))
    rows = (await session.execute(query)).all()
    return {
        row.id: Owner(row.attempt, row.status in (PROCESSING, COMPLETED), row.file_path)
        for row in rows
    }


async def find_completed_files(
    session: AsyncSession, *, after_id: str, limit: int
) -> list[tuple[str, str, int | None]]:
    """Return the id, path and size in bytes of the next completed generations, by id.

    Those without a file are left out.
    """
    query = select(g.id, g.file_path, g.file_size_bytes)
    is_completed = unindexed(g.status) == COMPLETED
    query = query.where(is_completed, g.id > after_id, g.file_path.is_not(None))
    rows = await session.execute(query.order_by(g.id).limit(limit))
    return [(row.id, str(row.file_path), row.file_size_bytes) for row in rows]
