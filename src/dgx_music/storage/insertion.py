"""The first transition of a row's life: into the queue, in the caller's own transaction.

One call keeps the clips, counts the prompts, and inserts the generations. A repeated idempotency
key inserts nothing and gives the row that is there already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sqlalchemy import bindparam, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import IdempotencyConflictError
from dgx_music.storage.clips import keep_clips
from dgx_music.storage.generation import CLIP_COLUMNS, Generation
from dgx_music.storage.prompts import count_prompt_uses, uncount_prompt_uses
from dgx_music.storage.schema import UtcDateTime, dialect_of, insert, now

Row = Mapping[str, Any]
"""The columns of a new generation, by their names; ``wanted_run_at`` is ``None`` to run at once."""

_CHUNK = 500


async def insert_generations(
    session: AsyncSession, rows: Sequence[Row], clips: Mapping[str, tuple[bytes, float]]
) -> list[Generation]:
    """Insert these rows and return the generations in the same order.

    ``clips`` holds the content and the seconds of each clip that a row refers to, by ``sha256``. A
    row whose idempotency key exists is not inserted: the existing generation is returned in its
    place. Raises ``IdempotencyConflictError`` if that one belongs to a different request.
    """
    by_key = await _find_by_key(session, rows)
    fresh = _without_repeats(rows, by_key)
    inserted: dict[str, Generation] = {}
    while fresh:
        inserted |= {row.id: row for row in await _insert_fresh(session, fresh, clips)}
        # Another producer was faster with the same key.
        raced = [row for row in fresh if row["id"] not in inserted]
        found = await _find_by_key(session, raced)
        for row in raced:
            if (owner := found.get(row["idempotency_key"])) is not None:
                _check_same_request(row, owner.id, owner.request_hash)
        by_key |= found
        # The other producer's row is gone again: insert once more.
        fresh = [row for row in raced if row["idempotency_key"] not in found]
    by_key |= {
        row.idempotency_key: row for row in inserted.values() if row.idempotency_key is not None
    }
    return [inserted.get(row["id"]) or by_key[row["idempotency_key"]] for row in rows]


def _without_repeats(rows: Sequence[Row], by_key: Mapping[str, Generation]) -> list[Row]:
    """Return the rows to insert: those without a key, and the first of each new key."""
    owners = {key: (found.id, found.request_hash) for key, found in by_key.items()}
    for row in rows:
        if (key := row["idempotency_key"]) is not None:
            _check_same_request(row, *owners.setdefault(key, (row["id"], row["request_hash"])))
    return [row for row in rows if owners.get(row["idempotency_key"], (row["id"],))[0] == row["id"]]


def _check_same_request(row: Row, owner_id: str, request_hash: str | None) -> None:
    if request_hash != row["request_hash"]:
        raise IdempotencyConflictError(row["idempotency_key"], owner_id)


async def _find_by_key(session: AsyncSession, rows: Sequence[Row]) -> dict[str, Generation]:
    keys = sorted({row["idempotency_key"] for row in rows} - {None})
    found: dict[str, Generation] = {}
    for start in range(0, len(keys), _CHUNK):
        is_among = Generation.idempotency_key.in_(keys[start : start + _CHUNK])
        query = select(Generation).where(is_among)
        found |= {str(row.idempotency_key): row for row in await session.scalars(query)}
    return found


async def _insert_fresh(
    session: AsyncSession, rows: list[Row], clips: Mapping[str, tuple[bytes, float]]
) -> list[Generation]:
    """Keep the rows' clips, count their prompts, insert them; return those whose key was free."""
    used = {row[name] for row in rows for name in CLIP_COLUMNS} - {None}
    if used:
        await keep_clips(session, {sha256: clips[sha256] for sha256 in used})
    prompts = await count_prompt_uses(session, [row["prompt"] for row in rows])
    prompt_ids = {prompt.text: prompt.id for prompt in prompts}
    statement = _insert_statement(dialect_of(session))
    inserted: list[Generation] = []
    # In one order: two batches must not wait for each other in a circle.
    rows = sorted(rows, key=lambda row: row["idempotency_key"] or "")
    for start in range(0, len(rows), _CHUNK):
        chunk = [
            {**row, "prompt_id": prompt_ids.get(row["prompt"])}
            for row in rows[start : start + _CHUNK]
        ]
        inserted += await session.scalars(statement, chunk)
    stored = {row.id for row in inserted}
    raced = [
        row["prompt"] for row in rows if row["id"] not in stored and row["prompt"] in prompt_ids
    ]
    await uncount_prompt_uses(session, raced)
    return inserted


@cache
def _insert_statement(dialect: str) -> Any:
    return (
        insert(dialect, Generation)
        .values(run_at=func.coalesce(bindparam("wanted_run_at", type_=UtcDateTime), now()))
        .on_conflict_do_nothing(index_elements=["idempotency_key"])
        .returning(Generation)
    )
