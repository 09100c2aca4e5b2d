"""How many rows there are: counted from tallies, so that no count reads all finished rows."""

from __future__ import annotations

from collections import Counter

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.statuses import FINISHED, GenerationStatus
from dgx_music.storage.models import Generation, Tally
from dgx_music.storage.schema import check_status, written

TALLY_CHUNK = 5_000
"""How many tallies are summed up at a time."""
_TALLY_ROWS = 500
"""Fewer tallies than this are not summed up."""
_PROMPTS = "prompts"
"""The tally of distinct prompts."""


async def get_database_stats(session: AsyncSession) -> dict[str, int]:
    """Return the number of generations in all and of each status, and of distinct prompts."""
    counts = await _count_by_status(session, *GenerationStatus)
    tallies = await _read_tallies(session)
    stats = {f"{status}_generations": count for status, count in counts.items()}
    total = sum(counts.values())
    return {"total_generations": total, **stats, "total_prompts": tallies.get(_PROMPTS, 0)}


async def count_generations(
    session: AsyncSession, status: GenerationStatus | str | None = None
) -> int:
    """Return the number of generations, of one status if it is given; reads no finished row."""
    if status is None:
        return sum((await _count_by_status(session, *GenerationStatus)).values())
    wanted = check_status(status)
    return (await _count_by_status(session, wanted))[wanted]


async def compact_tallies(session: AsyncSession) -> int:
    """Replace the oldest tallies by one sum for each name; return how many tallies were replaced.

    Does nothing if there are few. If the answer is ``TALLY_CHUNK`` there may be more.
    """
    few = select(Tally.id).limit(_TALLY_ROWS).subquery()
    if (await session.scalar(select(func.count()).select_from(few)) or 0) < _TALLY_ROWS:
        return 0
    oldest = (
        select(Tally.id).order_by(Tally.id).limit(TALLY_CHUNK).with_for_update(skip_locked=True)
    )
    # Without MATERIALIZED its LIMIT may be applied again and again.
    chosen = select(oldest.cte("chosen").prefix_with("MATERIALIZED").c.id)
    deleted = delete(Tally).where(Tally.id.in_(chosen)).returning(Tally.name, Tally.delta)
    gone = (await session.execute(deleted)).all()
    sums: Counter[str] = Counter()
    for row in gone:
        sums[row.name] += row.delta
    if sums:  # empty if another compaction holds them all
        rows = [{"name": name, "delta": delta} for name, delta in sums.items()]
        await session.execute(insert(Tally), rows)
    return len(gone)


async def _count_by_status(session: AsyncSession, *statuses: str) -> dict[str, int]:
    """Count the unfinished rows, which are few, and sum the tallies of the finished ones."""
    tallies = await _read_tallies(session) if set(statuses) & set(FINISHED) else {}
    counts = {}
    for status in map(str, statuses):
        if status in FINISHED:
            counts[status] = tallies.get(status, 0)
        else:
            is_wanted = Generation.status == written(status)
            live = select(func.count()).select_from(Generation).where(is_wanted)
            counts[status] = await session.scalar(live) or 0
    return counts


async def _read_tallies(session: AsyncSession) -> dict[str, int]:
    rows = await session.execute(select(Tally.name, func.sum(Tally.delta)).group_by(Tally.name))
    return {name: int(total) for name, total in rows.all()}
