"""The plain reads and writes: generations, prompts, statistics.

Every coroutine works in the session it is given and leaves committing to whoever opened it. What moves a generation on
behalf of a worker is in queue.py; ``update_generation_status`` and ``complete_generation`` here are for rows that their
caller works on by hand, and refuse one that a worker holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Integer, and_, bindparam, case, delete, func, not_, or_, select, true, update
from sqlalchemy import insert as core_insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.errors import IllegalTransitionError, InvalidRequestError
from dgx_music.storage.models import CANCEL_REQUESTED, Attempt, Generation, Prompt, Tally, text_hash
from dgx_music.storage.schema import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    PENDING,
    PROCESSING,
    GenerationStatus,
    now,
    sources_of,
    written,
)

_MAX_ROWS = 2**31 - 1
_COUNT_LOCK = 0x6467_7870  # "dgxp": the first half of advisory locks' numbers
_TALLY_ROWS = 500
TALLY_CHUNK = 5_000
"""How many tallies are summed up at a time."""
PROMPTS = "prompts"
"""The tally of distinct prompts."""


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
    used = await count_prompt_uses(session, [values["prompt"]])
    generation = Generation(**values, prompt_id=used[0].id if used else None)
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
    query = (
        select(Generation).where(Generation.status == written(PENDING)).order_by(Generation.created_at, Generation.id)
    )
    return list(await session.scalars(_page(query, limit)))


async def count_generations(session: AsyncSession, status: GenerationStatus | str | None = None) -> int:
    """Return how many generations there are, of one status where one is given; reads no finished row."""
    if status is None:
        return sum((await _count_by_status(session, *GenerationStatus)).values())
    wanted = check_status(status)
    return (await _count_by_status(session, wanted))[wanted]


async def update_generation_status(
    session: AsyncSession,
    generation_id: str,
    status: GenerationStatus | str,
    error_message: str | None = None,
) -> Generation | None:
    """Move a row by hand and return it; ``None`` where the id is unknown.

    One whose cancel was requested while it ran becomes cancelled in the place of failed. Raises ``IllegalTransitionError``
    where its status does not allow the change, or where a worker holds it.
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
    if wanted == FAILED:
        changes["status"] = case((Generation.cancel_requested, CANCELLED), else_=FAILED)
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
    text = validation.check_prompt(prompt_text)
    if dialect_of(session) == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(_COUNT_LOCK, _bucket(text))))
    return (await _count(session, [text]))[0]


async def count_prompt_uses(session: AsyncSession, texts: Iterable[str]) -> list[Prompt]:
    """Count one use for each text given, repeated ones too, and return the rows of those that were counted.

    On PostgreSQL a text that another open transaction is counting is left out instead of waited for: who enqueues inside
    a long transaction must not hold up everybody with the same prompt, nor be anybody's deadlock. So are all in a
    transaction of a stricter isolation, which a count made meanwhile would fail. ``count_overlooked_prompts`` makes up for it.
    """
    texts = list(texts)
    if dialect_of(session) == "postgresql":
        free = await _lock_buckets(session, {_bucket(text) for text in texts})
        texts = [text for text in texts if _bucket(text) in free]
    return await _count(session, texts) if texts else []


async def count_overlooked_prompts(session: AsyncSession, limit: int = 500) -> int:
    """Count the prompts of generations whose enqueue had to leave that out; return of how many. SQLite has none."""
    if dialect_of(session) != "postgresql":
        return 0
    overlooked = select(Generation.id, Generation.prompt).where(Generation.prompt_id.is_(None)).limit(limit)
    rows = (await session.execute(overlooked.with_for_update(skip_locked=True, key_share=True))).all()
    counted = {prompt.text: prompt.id for prompt in await count_prompt_uses(session, [row.prompt for row in rows])}
    for row in rows:
        if row.prompt in counted:
            linked = update(Generation).where(Generation.id == row.id).values(prompt_id=counted[row.prompt])
            await session.execute(linked, execution_options={"synchronize_session": False})
    return sum(row.prompt in counted for row in rows)


async def _lock_buckets(session: AsyncSession, buckets: Collection[int]) -> set[int]:
    """Lock these for the rest of the transaction and return those that nobody else has; waits for nobody."""
    return set(await session.scalars(_lock_statement(), {"buckets": sorted(buckets)}))


@cache
def _lock_statement() -> Any:
    bucket = func.unnest(bindparam("buckets", type_=ARRAY(Integer))).column_valued("bucket")
    is_usual = func.current_setting("transaction_isolation") == "read committed"
    return select(bucket).where(is_usual, func.pg_try_advisory_xact_lock(_COUNT_LOCK, bucket))


def _bucket(text: str) -> int:
    """Return which of 256 locks counts this text: one for each text would fill the server's table of locks."""
    return int(text_hash(text)[:2], 16)


async def _count(session: AsyncSession, texts: Iterable[str]) -> list[Prompt]:
    """Count in the texts' order: two that count the same prompts in different orders would deadlock on PostgreSQL."""
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
    text = text.strip() or text  # the empty prompt is one, white space is none
    return await session.scalar(select(Prompt).where(Prompt.text_hash == text_hash(text)))


async def get_most_used_prompts(session: AsyncSession, limit: int = 10) -> list[Prompt]:
    """Return prompts, most used first."""
    query = select(Prompt).order_by(Prompt.used_count.desc(), Prompt.id)
    return list(await session.scalars(_page(query, limit)))


async def get_database_stats(session: AsyncSession) -> dict[str, int]:
    """Return how many generations there are in all and by status, and how many distinct prompts."""
    counts = await _count_by_status(session, *GenerationStatus)
    tallies = await _read_tallies(session)
    stats = {f"{status}_generations": count for status, count in counts.items()}
    return {"total_generations": sum(counts.values()), **stats, "total_prompts": tallies.get(PROMPTS, 0)}


async def compact_tallies(session: AsyncSession) -> int:
    """Sum up the oldest tallies into one row each where there are many; return how many rows went into that.

    Where it is ``TALLY_CHUNK`` there may be more.
    """
    few = select(Tally.id).limit(_TALLY_ROWS).subquery()
    if (await session.scalar(select(func.count()).select_from(few)) or 0) < _TALLY_ROWS:
        return 0
    oldest = select(Tally.id).order_by(Tally.id).limit(TALLY_CHUNK).with_for_update(skip_locked=True)
    # Materialized, or its LIMIT may be applied again and again.
    chosen = select(oldest.cte("chosen").prefix_with("MATERIALIZED").c.id)
    gone = (await session.execute(delete(Tally).where(Tally.id.in_(chosen)).returning(Tally.name, Tally.delta))).all()
    sums: Counter[str] = Counter()
    for row in gone:
        sums[row.name] += row.delta
    if sums:  # else another compaction has them all in its hands
        await session.execute(core_insert(Tally), [{"name": name, "delta": delta} for name, delta in sums.items()])
    return len(gone)


async def _count_by_status(session: AsyncSession, *statuses: str) -> dict[str, int]:
    """Count the live rows, of which there are few, and sum the tallies of the finished ones, of which there are many."""
    tallies = await _read_tallies(session) if set(statuses) & set(FINISHED) else {}
    counts = {}
    for status in map(str, statuses):
        live = select(func.count()).select_from(Generation).where(Generation.status == written(status))
        counts[status] = tallies.get(status, 0) if status in FINISHED else await session.scalar(live) or 0
    return counts


async def _read_tallies(session: AsyncSession) -> dict[str, int]:
    rows = await session.execute(select(Tally.name, func.sum(Tally.delta)).group_by(Tally.name))
    return {name: int(total) for name, total in rows.all()}


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
        reason = CANCEL_REQUESTED
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
