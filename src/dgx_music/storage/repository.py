"""The plain reads and writes: generations, prompts, statistics.

Every coroutine works in the session it is given and leaves committing to whoever opened it. What moves a generation on
behalf of a worker is in queue.py; ``update_generation_status`` and ``complete_generation`` here are for rows that their
caller works on by hand, and refuse one that a worker holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, and_, case, delete, func, not_, or_, select, true, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.errors import IllegalTransitionError, InvalidRequestError
from dgx_music.storage.models import Attempt, Generation, Prompt, text_hash
from dgx_music.storage.schema import (
    COMPLETED,
    FINISHED,
    PENDING,
    PROCESSING,
    GenerationStatus,
    now,
    sources_of,
)

_MAX_ROWS = 2**31 - 1


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

    ``enqueue`` does more (model limits, sampling, idempotency); this one takes any model's name and any length. Raises
    ``InvalidRequestError`` on a value that no database could keep.
    """
    values: dict[str, Any] = {
        "prompt": validation.check_prompt(prompt),
        "model_name": validation.check_name("model_name", model_name),
        "duration_seconds": validation.check_positive("duration_seconds", duration_seconds),
        "sample_rate": validation.check_integer("sample_rate", sample_rate, 1, 1_000_000),
        "channels": validation.check_integer("channels", channels, 1, 64),
        "file_path": None if file_path is None else validation.check_path("file_path", str(file_path)),
        "model_version": None if model_version is None else validation.check_name("model_version", model_version),
        "metadata": None if metadata is None else validation.check_metadata(metadata),
    }
    used = await track_prompt_usage(session, values["prompt"])
    generation = Generation(**values, prompt_id=used.id)
    session.add(generation)
    await session.flush()
    return generation


async def get_generation(session: AsyncSession, generation_id: str) -> Generation | None:
    """Return the generation, or ``None`` where there is none of this id."""
    if not generation_id.isprintable():  # some such text no driver can send, and none of it is an id
        return None
    return await session.get(Generation, generation_id)


async def find_generation_ids(session: AsyncSession, prefix: str, limit: int = 2) -> list[str]:
    """Return the ids that start with this, at most ``limit`` of them; reads the whole index of ids."""
    query = select(Generation.id).where(Generation.id.startswith(prefix, autoescape=True)).order_by(Generation.id)
    return list(await session.scalars(_page(query, limit)))


async def get_attempts(session: AsyncSession, generation_id: str) -> list[Attempt]:
    """Return the attempts made at the generation, first to last."""
    query = select(Attempt).where(Attempt.generation_id == generation_id).order_by(Attempt.attempt)
    return list(await session.scalars(query))


async def get_all_generations(
    session: AsyncSession, limit: int = 100, offset: int = 0, status: GenerationStatus | str | None = None
) -> list[Generation]:
    """Return generations, newest first, of one status where one is given."""
    query = select(Generation).order_by(Generation.created_at.desc(), Generation.id.desc())
    if status is not None:
        query = query.where(Generation.status == check_status(status))
    return list(await session.scalars(_page(query, limit, offset)))


async def get_pending_generations(session: AsyncSession, limit: int = 100) -> list[Generation]:
    """Return pending generations, oldest first."""
    query = select(Generation).where(Generation.status == PENDING).order_by(Generation.created_at, Generation.id)
    return list(await session.scalars(_page(query, limit)))


async def count_generations(session: AsyncSession, status: GenerationStatus | str | None = None) -> int:
    """Return how many generations there are, of one status where one is given."""
    query = select(func.count()).select_from(Generation)
    if status is not None:
        query = query.where(Generation.status == check_status(status))
    return await session.scalar(query) or 0


async def update_generation_status(
    session: AsyncSession,
    generation_id: str,
    status: GenerationStatus | str,
    error_message: str | None = None,
) -> Generation | None:
    """Move a row by hand and return it; ``None`` where the id is unknown.

    Raises ``IllegalTransitionError`` where its status does not allow the change, or where a worker holds it.
    """
    wanted = check_status(status)
    changes: dict[str, Any] = {"status": wanted}
    if error_message is not None:
        changes["error_message"] = validation.tidy_text(error_message)
    if wanted == PROCESSING:
        changes |= {"attempt": Generation.attempt + 1, "started_at": now(), "progress": 0.0}
    if wanted == PENDING:
        failures = case((Generation.status == PROCESSING, Generation.failures), else_=0)
        changes |= {"run_at": now(), "failures": failures, "cancel_requested": False, "progress": 0.0}
    changes["completed_at"] = now() if wanted in FINISHED else None
    return await _move_by_hand(session, generation_id, wanted, changes)


async def complete_generation(
    session: AsyncSession,
    generation_id: str,
    generation_time: float,
    file_size_bytes: int,
    metadata: dict[str, Any] | None = None,
) -> Generation | None:
    """Complete a row worked on by hand and return it; ``None`` where the id is unknown.

    ``generation_time`` is in seconds; ``metadata`` is merged into what is there. Raises ``IllegalTransitionError`` where
    the row is not processing, or where a worker holds it.
    """
    changes = {
        "status": GenerationStatus.COMPLETED.value,
        "completed_at": now(),
        "generation_time_seconds": validation.check_between("generation_time", generation_time, 0, 1e9),
        "file_size_bytes": validation.check_integer("file_size_bytes", file_size_bytes, 0, validation.MAX_SEED),
        "progress": 1.0,
        "error_message": None,
    }
    more = validation.check_metadata(metadata or {})
    generation = await _move_by_hand(session, generation_id, GenerationStatus.COMPLETED.value, changes)
    if generation is not None and more:
        generation.set_metadata(generation.get_metadata() | more)
        await session.flush()
    return generation


async def delete_generation(session: AsyncSession, generation_id: str) -> bool:
    """Delete the row and its attempts; its file stays. Return False where the id is unknown.

    A worker that holds it finds its lease lost, stops, and drops its file.
    """
    deleted = await session.scalar(delete(Generation).where(Generation.id == generation_id).returning(Generation.id))
    return deleted is not None


async def track_prompt_usage(session: AsyncSession, prompt_text: str) -> Prompt:
    """Count one use of this prompt in one atomic statement, and return its row."""
    return (await count_prompt_uses(session, [validation.check_prompt(prompt_text)]))[0]


async def count_prompt_uses(session: AsyncSession, texts: Iterable[str]) -> list[Prompt]:
    """Count one use for each text given, repeated ones too, and return the rows of the distinct texts.

    In the texts' order: two batches that count the same prompts in different orders would deadlock on PostgreSQL.
    """
    rows = [
        {"text": text, "text_hash": text_hash(text), "used_count": count}
        for text, count in sorted(Counter(texts).items())
    ]
    statement = _count_statement(dialect_of(session))
    return list(await session.scalars(statement, rows, execution_options={"populate_existing": True}))


@cache
def _count_statement(dialect: str) -> Any:
    upsert = insert(dialect, Prompt)
    return upsert.on_conflict_do_update(
        index_elements=["text_hash"],
        set_={"used_count": Prompt.used_count + upsert.excluded.used_count, "last_used_at": now()},
    ).returning(Prompt)


async def uncount_prompt_uses(session: AsyncSession, texts: Iterable[str]) -> None:
    """Take back one use for each text given."""
    for text, count in sorted(Counter(texts).items()):
        is_counted = and_(Prompt.text_hash == text_hash(text), Prompt.used_count > count)
        await session.execute(update(Prompt).where(is_counted).values(used_count=Prompt.used_count - count))


async def get_prompt_by_text(session: AsyncSession, text: str) -> Prompt | None:
    """Return the prompt's row, or ``None`` where it was never used."""
    return await session.scalar(select(Prompt).where(Prompt.text_hash == text_hash(text.strip())))


async def get_most_used_prompts(session: AsyncSession, limit: int = 10) -> list[Prompt]:
    """Return prompts, most used first."""
    query = select(Prompt).order_by(Prompt.used_count.desc(), Prompt.id)
    return list(await session.scalars(_page(query, limit)))


async def get_database_stats(session: AsyncSession) -> dict[str, int]:
    """Return how many generations there are in all and by status, and how many distinct prompts."""
    counted = await session.execute(select(Generation.status, func.count()).group_by(Generation.status))
    counts = {status: count for status, count in counted.all()}  # noqa: C416 - rows are not pairs to the type checker
    stats = {f"{status.value}_generations": counts.get(status.value, 0) for status in GenerationStatus}
    prompts = await session.scalar(select(func.count()).select_from(Prompt)) or 0
    return {"total_generations": sum(counts.values()), **stats, "total_prompts": prompts}


def check_status(status: GenerationStatus | str) -> str:
    """Return the status as text, or raise ``InvalidRequestError``."""
    try:
        return GenerationStatus(status).value
    except ValueError:
        known = ", ".join(GenerationStatus)
        raise InvalidRequestError("status", f"{status!r} is not one", f"use {known}") from None


def dialect_of(session: AsyncSession) -> str:
    """Return the kind of the session's database: ``sqlite`` or ``postgresql``."""
    return session.get_bind().dialect.name


def insert(dialect: str, model: type[Any]) -> Any:
    """Return an INSERT of this kind of database, one that can say ON CONFLICT."""
    return (postgresql.insert if dialect == "postgresql" else sqlite.insert)(model)


async def _move_by_hand(
    session: AsyncSession, generation_id: str, wanted: str, changes: dict[str, Any]
) -> Generation | None:
    moved: Generation | None = await session.scalar(
        update(Generation)
        .where(
            Generation.id == generation_id,
            Generation.status.in_(sources_of(wanted)),
            Generation.worker_id.is_(None),
            _may_leave(wanted),
        )
        .values(changes)
        .returning(Generation),
        execution_options={"populate_existing": True},
    )
    if moved is not None:
        return moved
    current = await session.get(Generation, generation_id, populate_existing=True)
    if current is None:
        return None
    reason = f"worker {current.worker_id} holds it" if current.worker_id else ""
    if current.cancel_requested and current.is_processing and wanted in (PENDING, COMPLETED):
        reason = "its cancellation was requested"
    raise IllegalTransitionError(generation_id, current.status, wanted, reason)


def _may_leave(wanted: str) -> ColumnElement[bool]:
    """Keep a row whose cancel was requested from being revived or completed."""
    if wanted not in (PENDING, COMPLETED):
        return true()
    return or_(not_(Generation.cancel_requested), Generation.status != PROCESSING)


def _page(query: Any, limit: int, offset: int = 0) -> Any:
    return query.limit(validation.check_integer("limit", limit, 0, _MAX_ROWS)).offset(
        validation.check_integer("offset", offset, 0, _MAX_ROWS)
    )
