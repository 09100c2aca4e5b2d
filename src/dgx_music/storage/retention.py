"""Which rows may be deleted, and which generation owns a file.

Pruning, deleting and ``doctor --files`` use it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import COMPLETED, FINISHED, PROCESSING, GenerationStatus
from dgx_music.storage.batches import prune_batches
from dgx_music.storage.clips import prune_clips
from dgx_music.storage.filters import Filters, conditions
from dgx_music.storage.generation import CLIP_COLUMNS, Generation, g, generations
from dgx_music.storage.leases import Lease, is_among
from dgx_music.storage.schema import now_plus, unindexed


@dataclass(frozen=True)
class Owner:
    """A generation as the owner of files."""

    attempt: int
    """Its last attempt."""
    is_live: bool
    """True if that attempt runs or has completed, so that it may have a file."""
    is_running: bool
    """True if it runs, so that it may have a preview."""
    file_path: str | None
    """The file that the row names."""

    def may_have(self, attempt: int, path: str | None = None) -> bool:
        """Return True if this attempt's file belongs to the generation, or may later: keep it."""
        is_own = attempt > self.attempt or (attempt == self.attempt and self.is_live)
        return is_own or (path is not None and path == self.file_path)

    def may_have_preview(self, attempt: int) -> bool:
        """Return True if this attempt's preview is needed, or may be later: keep it."""
        return attempt > self.attempt or (attempt == self.attempt and self.is_running)


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
    return len(await _delete(session, leases, FINISHED))


@dataclass(frozen=True)
class Deletable:
    """A row as it was read before its deletion."""

    lease: Lease
    """Its last attempt, running or not."""
    status: GenerationStatus
    worker_id: str | None
    file_path: str | None
    """Where a worker has stored its audio; ``None`` if none has."""


async def find_deletable(
    session: AsyncSession, ids: Collection[str], filters: Filters
) -> list[Deletable]:
    """Return those of these rows that fit the filters, in the order of their ids."""
    row = Generation
    query = select(row.id, row.attempt, row.status, row.worker_id, row.file_path, row.sha256)
    query = query.where(row.id.in_(ids), *conditions(filters, row)).order_by(row.id)
    return [
        Deletable(
            Lease(each.id, each.attempt),
            each.status,
            each.worker_id,
            None if each.sha256 is None else each.file_path,
        )
        for each in (await session.execute(query)).all()
    ]


async def delete_rows(session: AsyncSession, rows: Collection[Deletable]) -> set[str]:
    """Delete these rows unless they were claimed or moved since; return the ids of those deleted.

    Delete their files first. Their attempts and tags go with them; so do batches that are empty
    then, and clips that nothing refers to and nobody used for a day.
    """
    locked = select(g.id).where(is_among([row.lease for row in rows])).order_by(g.id)
    await session.execute(locked.with_for_update())  # in the order of others, or both would wait
    gone: list[Any] = []
    for status in sorted({row.status for row in rows}):
        leases = [row.lease for row in rows if row.status == status]
        gone += await _delete(session, leases, [status])
    clips = {sha256 for row in gone for sha256 in row[2:]} - {None}
    if clips:
        await prune_clips(session, limit=len(clips), among=clips)
    batches = {row.batch_id for row in gone} - {None}
    if batches:
        await prune_batches(session, limit=len(batches), among=batches)
    return {row.id for row in gone}


async def _delete(
    session: AsyncSession, leases: Collection[Lease], statuses: Collection[str]
) -> Sequence[Any]:
    """Delete these rows if they have such a status under the same attempt, and no worker.

    Returns their ids, batches and clips.
    """
    is_so = (unindexed(g.status).in_(statuses), g.worker_id.is_(None))
    statement = delete(generations).where(is_among(leases), *is_so)
    columns = [g[name] for name in CLIP_COLUMNS]
    return (await session.execute(statement.returning(g.id, g.batch_id, *columns))).all()


async def find_owners(session: AsyncSession, generation_ids: Collection[str]) -> dict[str, Owner]:
    """Return those of these generations that exist, by id."""
    query = select(g.id, g.attempt, g.status, g.file_path).where(g.id.in_(generation_ids))
    rows = (await session.execute(query)).all()
    return {
        row.id: Owner(
            row.attempt,
            row.status in (PROCESSING, COMPLETED),
            row.status == PROCESSING,
            row.file_path,
        )
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
