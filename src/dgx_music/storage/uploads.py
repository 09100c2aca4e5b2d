"""Uploads of the web API: names, for a day, of audio that is stored as clips."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.clips import keep_clips, prune_clips
from dgx_music.storage.models import Upload
from dgx_music.storage.schema import dialect_of, insert, now, now_plus

UPLOAD_SECONDS = 86_400.0
"""How long an upload can be used; its clips are kept at least as long."""


async def add_upload(
    session: AsyncSession, values: Mapping[str, Any], clips: Mapping[str, tuple[bytes, float]]
) -> Upload:
    """Store an upload and its clips (content and seconds, by ``sha256``), and return its row."""
    await keep_clips(session, clips)
    lasting = {**values, "expires_at": now_plus(UPLOAD_SECONDS)}
    statement = insert(dialect_of(session), Upload).values(lasting).returning(Upload)
    upload: Upload = (await session.scalars(statement)).one()
    return upload


async def find_uploads(
    session: AsyncSession, ids: Collection[str], tenant: str | None
) -> dict[str, Upload]:
    """Return those of these uploads that can be used, by id; of one tenant if it is given."""
    query = select(Upload).where(Upload.id.in_(ids), Upload.expires_at > now())
    if tenant is not None:
        query = query.where(Upload.tenant == tenant)
    return {upload.id: upload for upload in await session.scalars(query)}


async def count_expired_uploads(session: AsyncSession) -> int:
    """Return how many uploads ``prune_uploads`` would delete."""
    query = select(func.count()).select_from(Upload).where(Upload.expires_at <= now())
    return await session.scalar(query) or 0


async def prune_uploads(session: AsyncSession, *, limit: int) -> int:
    """Delete uploads that have expired, and clips that nothing needs then; return how many."""
    expired = select(Upload.id).where(Upload.expires_at <= now()).order_by(Upload.expires_at)
    unlocked = expired.limit(limit).with_for_update(skip_locked=True)
    chosen = unlocked.cte("chosen").prefix_with("MATERIALIZED")
    statement = delete(Upload).where(Upload.id.in_(select(chosen.c.id)))
    statement = statement.execution_options(synchronize_session=False)
    returning = statement.returning(Upload.mono_sha256, Upload.stereo_sha256)
    gone = (await session.execute(returning)).all()
    clips = {sha256 for row in gone for sha256 in row}
    if clips:
        await prune_clips(session, limit=len(clips), among=clips)
    return len(gone)
