"""The clips that generations start with or follow: stored once each, while they are needed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, bindparam, delete, exists, func, not_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import InvalidRequestError
from dgx_music.storage.generation import CLIP_COLUMNS, Generation
from dgx_music.storage.models import Clip, Upload
from dgx_music.storage.schema import dialect_of, insert, now, now_plus
from dgx_music.validation import CLIP_FIELDS

UNUSED_SECONDS = 86_400.0
"""How long an unused clip is kept: an enqueue that is about to refer to it must find it."""
_FRESH_SECONDS = 3_600.0


def clips_of(row: object) -> dict[str, str]:
    """Return the ``sha256`` of each clip of a generation or a claim, by the name of its field."""
    found = {name: getattr(row, f"{name}_sha256", None) for name in CLIP_FIELDS}
    return {name: sha256 for name, sha256 in found.items() if sha256 is not None}


async def keep_clips(session: AsyncSession, clips: Mapping[str, tuple[bytes, float]]) -> None:
    """Store the missing ones of these clips (content and seconds, by ``sha256``); note their use.

    A clip that was used in the last hour is not written: ``prune_clips`` keeps it for a day, and a
    write would make all others with the same clip wait for the end of this transaction. The others
    are written in one order, or two transactions would wait for each other in a circle.
    """
    if not clips:
        return
    fresh = await _find_fresh(session, clips.keys())
    # One at a time: a driver limits the time of a statement, not of a row.
    for sha256 in sorted(clips.keys() - fresh):
        data, seconds = clips[sha256]
        values = {"sha256": sha256, "data": data, "duration_seconds": seconds}
        await session.execute(_keep_statement(dialect_of(session)), values)


async def hold_clips(session: AsyncSession, sha256s: Collection[str]) -> None:
    """Keep stored clips until the end of this transaction, so that a new row can refer to them.

    Raises ``InvalidRequestError`` if one of them is gone.
    """
    if not sha256s:
        return
    query = (
        select(Clip.sha256)
        .where(Clip.sha256.in_(sha256s))
        .with_for_update(key_share=True, read=True)
    )
    gone = {*sha256s} - {*await session.scalars(query)}
    if gone:
        problem = f"{min(gone)[:12]} is no longer stored"
        raise InvalidRequestError("clip", problem, "give the audio itself")


async def read_clips(session: AsyncSession, sha256s: Collection[str]) -> dict[str, bytes]:
    """Return the content of each of these clips that is stored, by ``sha256``."""
    rows = await session.execute(select(Clip.sha256, Clip.data).where(Clip.sha256.in_(sha256s)))
    return {row.sha256: row.data for row in rows.all()}


async def read_clip_seconds(session: AsyncSession, sha256s: Collection[str]) -> dict[str, float]:
    """Return the length in seconds of each of these clips that is stored, by ``sha256``."""
    query = select(Clip.sha256, Clip.duration_seconds).where(Clip.sha256.in_(sha256s))
    rows = await session.execute(query)
    return {row.sha256: row.duration_seconds for row in rows.all()}


async def count_unused_clips(
    session: AsyncSession, *, unused_seconds: float = UNUSED_SECONDS
) -> int:
    """Return how many clips ``prune_clips`` would delete."""
    query = select(func.count()).select_from(Clip).where(_is_unused(unused_seconds))
    return await session.scalar(query) or 0


async def prune_clips(
    session: AsyncSession,
    *,
    limit: int,
    unused_seconds: float = UNUSED_SECONDS,
    among: Collection[str] | None = None,
) -> int:
    """Delete clips without a generation or an upload that were last used longer ago; return how many.

    ``among`` names the clips to look at; all if not given.
    """
    unused = select(Clip.sha256).where(_is_unused(unused_seconds)).order_by(Clip.sha256)
    if among is not None:
        unused = unused.where(Clip.sha256.in_(among))
    unlocked = unused.limit(limit).with_for_update(skip_locked=True)
    chosen = unlocked.cte("chosen").prefix_with("MATERIALIZED")
    statement = delete(Clip).where(Clip.sha256.in_(select(chosen.c.sha256))).returning(Clip.sha256)
    options = {"synchronize_session": False}
    return len((await session.execute(statement, execution_options=options)).all())


def _is_unused(seconds: float) -> ColumnElement[bool]:
    columns = [getattr(Generation, name) for name in CLIP_COLUMNS]
    columns += [Upload.mono_sha256, Upload.stereo_sha256]
    is_referred_to = or_(*(exists().where(column == Clip.sha256) for column in columns))
    return (Clip.last_used_at < now_plus(-seconds)) & not_(is_referred_to)


async def _find_fresh(session: AsyncSession, sha256s: Collection[str]) -> set[str]:
    is_fresh = Clip.last_used_at > now_plus(-_FRESH_SECONDS)
    return set(await session.scalars(select(Clip.sha256).where(Clip.sha256.in_(sha256s), is_fresh)))


@cache
def _keep_statement(dialect: str) -> Any:
    names = ("sha256", "data", "duration_seconds")
    values: dict[str, Any] = {name: bindparam(name) for name in names}
    upsert = insert(dialect, Clip).values(values)
    return upsert.on_conflict_do_update(index_elements=["sha256"], set_={"last_used_at": now()})
