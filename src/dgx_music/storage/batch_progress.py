"""How far batches are: their generations by status, and when the last of them will be done."""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import and_, case, func, not_, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import BatchNotFoundError, InvalidRequestError
from dgx_music.forecast import Range
from dgx_music.statuses import FINISHED, PENDING, GenerationStatus
from dgx_music.storage.due import CLAIM_ORDER
from dgx_music.storage.estimates import Estimate, estimate
from dgx_music.storage.generation import g
from dgx_music.storage.listing import limited
from dgx_music.storage.models import Batch
from dgx_music.storage.schema import unindexed, written


@dataclass(frozen=True)
class BatchProgress:
    """A batch, and how far it is."""

    id: str
    name: str | None
    created_at: datetime
    counts: dict[str, int]
    """How many of its generations have each status; those that were deleted do not count."""
    done_in: Range | None = None
    """Seconds from now until the last one is finished; ``None`` if that is unknown."""
    unknown_because: str | None = None
    """The reason, in a few words; ``None`` if nobody asked, or if all are finished."""

    @property
    def total(self) -> int:
        """How many generations it has."""
        return sum(self.counts.values())

    @property
    def finished(self) -> int:
        """How many are completed, failed or cancelled."""
        return sum(self.counts[status] for status in FINISHED)

    @property
    def is_finished(self) -> bool:
        """True when all are completed, failed or cancelled."""
        return self.finished == self.total

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the range is an object with ``low`` and ``high``."""
        return {
            "id": self.id,
            "name": self.name,
            "created_at": self.created_at.isoformat(),
            "total": self.total,
            "finished": self.finished,
            "counts": self.counts,
            "done_in_seconds": None if self.done_in is None else vars(self.done_in),
            "unknown_because": self.unknown_because,
        }


@dataclass(frozen=True)
class BatchPage:
    """Some batches, newest first, and the place at which the next ones start."""

    batches: list[BatchProgress]
    next: str | None
    """The cursor to give as ``after``; ``None`` if there are no more."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the batches, and ``next``."""
        return {"batches": [batch.to_dict() for batch in self.batches], "next": self.next}


async def list_batches(session: AsyncSession, *, limit: int, after: str | None) -> BatchPage:
    """Return a page of at most ``limit`` batches, newest first, without estimates.

    ``after`` is the ``next`` of an earlier page. Raises ``InvalidRequestError``.
    """
    query = limited(select(Batch).order_by(Batch.id.desc()), limit)
    if after is not None:
        query = query.where(Batch.id < _check_cursor(after))
    rows = list(await session.scalars(query))
    counts = await _count(session, [row.id for row in rows])
    page = [_progress(row, counts[row.id]) for row in rows]
    return BatchPage(page, page[-1].id if len(page) == limit > 0 else None)


async def read_batches(session: AsyncSession, ids: Collection[str]) -> list[BatchProgress]:
    """Return these batches, newest first, without estimates."""
    query = select(Batch).where(Batch.id.in_(ids)).order_by(Batch.id.desc())
    counts = await _count(session, ids)
    return [_progress(row, counts[row.id]) for row in await session.scalars(query)]


def _check_cursor(after: str) -> str:
    try:
        return str(uuid.UUID(after))
    except (AttributeError, TypeError, ValueError):
        remedy = "give the next page's as an earlier page returned it, or none to begin"
        raise InvalidRequestError("after", "is not a page's cursor", remedy) from None


async def read_batch(session: AsyncSession, batch_id: str) -> BatchProgress:
    """Return the batch with an estimate; raises ``BatchNotFoundError``.

    The estimate is that of the generation of each model that comes last, as ``estimate`` has it.
    """
    row = await session.get(Batch, batch_id)
    if row is None:
        raise BatchNotFoundError(batch_id)
    counts = (await _count(session, [batch_id]))[batch_id]
    outlooks = [await estimate(session, each) for each in await _find_last(session, batch_id)]
    return _progress(row, counts, outlooks)


def _progress(
    row: Batch, counts: Mapping[str, int], outlooks: Collection[Estimate] = ()
) -> BatchProgress:
    all_counts = {status.value: counts.get(status, 0) for status in GenerationStatus}
    unknown = next((each.unknown_because for each in outlooks if each.unknown_because), None)
    known = [each.done_in for each in outlooks if each.done_in is not None]
    latest = (
        Range(max(each.low for each in known), max(each.high for each in known)) if known else None
    )
    done_in = None if unknown else latest
    return BatchProgress(row.id, row.name, row.created_at, all_counts, done_in, unknown)


async def _count(session: AsyncSession, ids: Collection[str]) -> Mapping[str, dict[str, int]]:
    """Return the counts of each batch, by its id and by status."""
    query = select(g.batch_id, g.status, func.count().label("rows"))
    query = query.where(g.batch_id.in_(ids)).group_by(g.batch_id, g.status)
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for row in await session.execute(query):
        counts[row.batch_id][row.status] = row.rows
    return counts


async def _find_last(session: AsyncSession, batch_id: str) -> list[str]:
    """Return one unfinished generation of each model, the one that is likely to end last."""
    is_unfinished = (g.batch_id == batch_id, unindexed(g.status).not_in(FINISHED))
    models = await session.scalars(select(g.model_name).where(*is_unfinished).distinct())
    # What waits comes after what runs; among what runs, the one of which most is left. Of one that
    # is being cancelled, or was taken by hand, nobody knows when it ends.
    is_waiting = g.status == written(PENDING)
    place = case((is_waiting, CLAIM_ORDER), else_=g.duration_seconds * (1 - g.progress))
    is_known = and_(g.worker_id.is_not(None), not_(g.cancel_requested))
    last_first = (is_waiting.desc(), is_known.desc(), place.desc(), g.id.desc())
    queries = [
        select(g.id)
        .where(*is_unfinished, unindexed(g.model_name) == model)
        .order_by(*last_first)
        .limit(1)
        for model in models
    ]
    found = [await session.scalar(query) for query in queries]
    return [each for each in found if each is not None]
