"""Who owns a file: what garbage collection has to know of the rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.models import Generation
from dgx_music.storage.schema import COMPLETED, PROCESSING


@dataclass(frozen=True)
class Owner:
    """A generation as it is now: its last attempt, whether that one may have a file, and the file it names itself."""

    attempt: int
    is_live: bool
    file_path: str | None

    def may_have(self, attempt: int, path: str | None = None) -> bool:
        """Return True where this attempt's file is the generation's, or may come to be: it must not be deleted."""
        is_own = attempt > self.attempt or (attempt == self.attempt and self.is_live)
        return is_own or (path is not None and path == self.file_path)


async def find_owners(session: AsyncSession, generation_ids: Collection[str]) -> dict[str, Owner]:
    """Return those of these generations that exist, by id."""
    query = select(Generation.id, Generation.attempt, Generation.status, Generation.file_path)
    rows = (await session.execute(query.where(Generation.id.in_(generation_ids)))).all()
    return {row.id: Owner(row.attempt, row.status in (PROCESSING, COMPLETED), row.file_path) for row in rows}


async def find_completed_files(
    session: AsyncSession, *, after_id: str, limit: int
) -> list[tuple[str, str, int | None]]:
    """Return the next completed generations by id, each with its file's path and size; those without one are left out."""
    columns = (Generation.id, Generation.file_path, Generation.file_size_bytes)
    query = select(*columns).where(Generation.status == COMPLETED, Generation.id > after_id)
    rows = await session.execute(query.where(Generation.file_path.is_not(None)).order_by(Generation.id).limit(limit))
    return [(row.id, str(row.file_path), row.file_size_bytes) for row in rows]
