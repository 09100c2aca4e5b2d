"""The rows that somebody watches: which of them have changed, and the queue as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import set_committed_value

from dgx_music.statuses import GenerationStatus
from dgx_music.storage.filters import Filters, conditions
from dgx_music.storage.generation import g
from dgx_music.storage.listing import list_generations
from dgx_music.storage.metadata import AUDIO_KEY
from dgx_music.storage.models import Generation
from dgx_music.storage.statistics import get_database_stats

MOST_NEW = 1_000
"""So many newer rows are counted at most."""

State = tuple[Any, ...]
"""What may change of a row, by which a change is noticed."""

_COLUMNS = [
    g[name]
    for name in (
        *("status", "attempt", "progress", "failures", "cancel_requested", "worker_id"),
        *("completed_at", "error_message", "file_path"),
        *("title", "notes", "tags", "is_starred"),
    )
]


@dataclass(frozen=True)
class Seen:
    """What there is of the rows that were looked for."""

    states: Mapping[str, State]
    """The state of each row that exists, by its id."""
    rows: Mapping[str, Generation]
    """Those whose state is another one than before, without their waveforms."""


async def look_at(session: AsyncSession, ids: Collection[str], known: Mapping[str, State]) -> Seen:
    """Read the states of these rows by their keys, and all of each row whose state is not known."""
    wanted = [each for each in ids if each.isprintable()]  # no driver can send some other text
    states = await _read_states(session, wanted)
    changed = [each for each, state in states.items() if known.get(each) != state]
    return Seen(states, await _read_rows(session, changed))


async def find_news(
    session: AsyncSession, ids: Sequence[str], since: str, filters: Filters
) -> tuple[list[Generation], int]:
    """Return those of these rows that fit the filters, and how many fit that are newer than an id.

    Of the newer ones at most ``MOST_NEW`` are counted. Raises ``InvalidRequestError``.
    """
    fitting = conditions(filters, Generation)
    newer = select(Generation.id).where(Generation.id > since, *fitting).limit(MOST_NEW)
    count = await session.scalar(select(func.count()).select_from(newer.subquery()))
    if not ids:
        return [], count or 0
    some = select(Generation).where(Generation.id.in_(_padded(ids)), *fitting)
    return [*await session.scalars(some)], count or 0


async def read_queue(session: AsyncSession, tenant: str | None) -> dict[str, Any]:
    """Return the id of the newest generation, and how many there are of each status.

    For a tenant: the id of the tenant's newest generation, and no counts, which are everybody's.
    """
    of_tenant = {} if tenant is None else {"tenant": tenant}
    newest = (await list_generations(session, limit=1, **of_tenant)).generations  # type: ignore[arg-type]
    newest_id = newest[0].id if newest else None
    if tenant is not None:
        return {"newest_id": newest_id}
    stats = await get_database_stats(session)
    counts = {str(each): stats[f"{each}_generations"] for each in GenerationStatus}
    return {"newest_id": newest_id, "counts": counts}


async def _read_states(session: AsyncSession, ids: Sequence[str]) -> dict[str, State]:
    if not ids:
        return {}
    query = select(g.id, *_COLUMNS).where(g.id.in_(_padded(ids)))
    return {row[0]: tuple(row[1:]) for row in await session.execute(query)}


async def _read_rows(session: AsyncSession, ids: Sequence[str]) -> dict[str, Generation]:
    if not ids:
        return {}
    rows = await session.scalars(select(Generation).where(Generation.id.in_(_padded(ids))))
    return {row.id: _without_waveform(row) for row in rows}


def _padded(ids: Sequence[str]) -> list[str]:
    """Return the ids, the last one several times, so that there are few lengths of statements.

    A driver prepares each statement once, and keeps only some.
    """
    length = 1 << (len(ids) - 1).bit_length()
    return [*ids, *[ids[-1]] * (length - len(ids))]


def _without_waveform(row: Generation) -> Generation:
    """Return the row without the thousand numbers that would be kept for nobody."""
    audio = (row.metadata_ or {}).get(AUDIO_KEY)
    if isinstance(audio, dict) and "waveform" in audio:
        kept = {name: value for name, value in audio.items() if name != "waveform"}
        set_committed_value(row, "metadata_", {**(row.metadata_ or {}), AUDIO_KEY: kept})
    return row
