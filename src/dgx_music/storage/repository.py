"""One generation's row: create, get, delete; and the plain lists of the storage API.

Every coroutine works in the session that it is given and leaves the commit to whoever opened it.
The transitions that a worker makes are in queue.py, those made by hand in by_hand.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import Any

from sqlalchemy import case, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.statuses import PENDING, GenerationStatus
from dgx_music.storage.listing import limited
from dgx_music.storage.models import Attempt, Batch, Generation
from dgx_music.storage.prompts import count_prompt_uses
from dgx_music.storage.schema import check_status, dialect_of, written


async def create_generation(
    session: AsyncSession,
    prompt: str,
    model_name: str,
    duration_seconds: float,
    sample_rate: int,
    channels: int,
    file_path: str | None = None,
    model_version: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Generation:
    """Add a pending generation, count its prompt's use, and return the row.

    ``enqueue`` does more (model limits, sampling, idempotency); this one takes any model's name and
    any length. Raises ``InvalidRequestError`` for a value that no database could keep.
    """
    check_name, check_integer = validation.check_name, validation.check_integer
    values: dict[str, Any] = {
        "prompt": validation.check_prompt(prompt),
        "model_name": check_name("model_name", model_name),
        "duration_seconds": validation.check_positive("duration_seconds", duration_seconds),
        "sample_rate": check_integer("sample_rate", sample_rate, 1, 1_000_000),
        "channels": check_integer("channels", channels, 1, 64),
        "file_path": None
        if file_path is None
        else validation.check_path("file_path", str(file_path)),
        "model_version": None
        if model_version is None
        else check_name("model_version", model_version),
        "metadata": None if metadata is None else validation.check_metadata(metadata),
    }
    used = await count_prompt_uses(session, [values["prompt"]])
    generation = Generation(**values, prompt_id=used[0].id if used else None)
    session.add(generation)
    await session.flush()
    return generation


async def get_generation(session: AsyncSession, generation_id: str) -> Generation | None:
    """Return the generation, or ``None`` if there is none of this id."""
    if not generation_id.isprintable():  # no id is like this, and no driver can send some such text
        return None
    return await session.get(Generation, generation_id)


async def find_generation_ids(session: AsyncSession, part: str, limit: int = 20) -> list[str]:
    """Return at most ``limit`` ids that hold this text; reads the whole index of ids.

    First those that end with it, then those that start with it: the end of an id is random, and its
    start is a time.
    """
    return await _find_ids(session, Generation.id, part, limit)


async def find_batch_ids(session: AsyncSession, part: str, limit: int = 20) -> list[str]:
    """Return at most ``limit`` ids of batches that hold this text, as ``find_generation_ids``."""
    return await _find_ids(session, Batch.id, part, limit)


async def count_end_characters(session: AsyncSession, ids: Sequence[str], least: int) -> int:
    """Return how many last characters tell each of these ids from all others; at least ``least``.

    Reads the whole index of ids.
    """
    ending = func.right if dialect_of(session) == "postgresql" else _last_on_sqlite
    ends = {each[-least:] for each in ids}
    alike = await session.scalars(
        select(Generation.id).where(ending(Generation.id, least).in_(ends))
    )
    backwards = sorted({each[::-1] for each in {*alike, *ids}})
    meant = {each[::-1] for each in ids}
    # What has most in common with an id stands next to it.
    together = [_alike(*pair) for pair in pairwise(backwards) if not meant.isdisjoint(pair)]
    return max([least - 1, *together]) + 1


def _alike(one: str, other: str) -> int:
    """Return with how many equal characters both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _last_on_sqlite(column: Any, count: int) -> Any:
    return func.substr(column, -count)


async def _find_ids(session: AsyncSession, column: Any, part: str, limit: int) -> list[str]:
    rank = case(
        (column.endswith(part, autoescape=True), 0),
        (column.startswith(part, autoescape=True), 1),
        else_=2,
    )
    query = select(column).where(column.contains(part, autoescape=True)).order_by(rank, column)
    return list(await session.scalars(limited(query, limit)))


async def get_attempts(session: AsyncSession, generation_id: str) -> list[Attempt]:
    """Return the attempts made at the generation, first to last."""
    query = select(Attempt).where(Attempt.generation_id == generation_id).order_by(Attempt.attempt)
    return list(await session.scalars(query))


async def get_all_generations(
    session: AsyncSession,
    limit: int = 100,
    offset: int = 0,
    status: GenerationStatus | str | None = None,
) -> list[Generation]:
    """Return generations, newest first, of one status if it is given."""
    query = select(Generation).order_by(Generation.created_at.desc(), Generation.id.desc())
    if status is not None:
        query = query.where(Generation.status == check_status(status))
    return list(await session.scalars(limited(query, limit, offset)))


async def get_pending_generations(session: AsyncSession, limit: int = 100) -> list[Generation]:
    """Return pending generations, oldest first."""
    query = select(Generation).where(Generation.status == written(PENDING))
    oldest_first = query.order_by(Generation.created_at, Generation.id)
    return list(await session.scalars(limited(oldest_first, limit)))


async def delete_generation(session: AsyncSession, generation_id: str) -> bool:
    """Delete the row, its attempts and its tags. Return False if the id is unknown.

    It leaves the file of a completed generation, which then belongs to none until ``dgx-music
    prune --orphans`` deletes it, and also its clips and its batch. ``dgx_music.delete_generations``
    leaves nothing. A worker that holds the row finds that its lease is lost, stops, and deletes its
    own file.
    """
    is_meant = Generation.id == generation_id
    deleted = await session.scalar(delete(Generation).where(is_meant).returning(Generation.id))
    return deleted is not None
