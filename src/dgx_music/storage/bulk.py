"""Changes of many rows: the transitions of by_hand.py and the labels, for a chunk of ids at a time.

A chunk is one transaction. It locks its rows in the order of their ids, and waits for those that
others have locked: none is passed over. Each coroutine works in the session that it is given and
leaves the commit to whoever opened it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    bindparam,
    false,
    not_,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import BatchNotFoundError
from dgx_music.statuses import CANCELLED, PROCESSING, GenerationStatus
from dgx_music.storage.by_hand import cancelling, retrying
from dgx_music.storage.filters import Filters, conditions
from dgx_music.storage.generation import Generation, g, generations, words_of_labels
from dgx_music.storage.leases import is_one_of
from dgx_music.storage.models import Batch
from dgx_music.storage.schema import rechecked
from dgx_music.validation import MAX_TAGS

CHUNK = 1_000
MAX_REFUSALS = 100
"""So many refusals are kept with their reasons; all are counted."""
NOT_THERE = "there is no such generation"
NOT_MEANT = "it does not fit the filters"
TOO_MANY_TAGS = f"it would have more than {MAX_TAGS} tags"


@dataclass(frozen=True)
class Refusal:
    """A generation that was not changed, and why."""

    generation_id: str
    status: GenerationStatus | None
    """``None`` if there is no such generation."""
    reason: str


@dataclass(frozen=True)
class BulkResult:
    """What a change of many generations has done."""

    changed: int = 0
    unchanged: int = 0
    """Those that were as asked for before."""
    running: int = 0
    """Those of ``changed`` that run until their workers have stopped them."""
    refused_count: int = 0
    refused: tuple[Refusal, ...] = ()
    """The first 100 of those refused, each with the reason."""

    def __add__(self, other: BulkResult) -> BulkResult:
        return BulkResult(
            self.changed + other.changed,
            self.unchanged + other.unchanged,
            self.running + other.running,
            self.refused_count + other.refused_count,
            (self.refused + other.refused)[:MAX_REFUSALS],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "refused": [asdict(refusal) for refusal in self.refused]}


@dataclass(frozen=True)
class Change:
    """A change of rows: its UPDATE without ids, which returns id and status."""

    statement: Any
    is_so: ColumnElement[bool]
    """Which rows are as asked for already."""
    wanted: GenerationStatus | None = None
    """The status that it leads to; ``None`` if it suits every status."""


def cancels() -> Change:
    """Return the change that cancels rows; see ``by_hand.cancel``."""
    is_asked = and_(rechecked(g.status) == PROCESSING, g.cancel_requested)
    is_so = or_(rechecked(g.status) == CANCELLED, is_asked)
    return Change(cancelling(), is_so, GenerationStatus.CANCELLED)


def retries() -> Change:
    """Return the change that makes rows pending again; see ``by_hand.retry``."""
    return Change(retrying(), false(), GenerationStatus.PENDING)


def stars(*, is_starred: bool) -> Change:
    """Return the change that gives rows a star, or takes it away."""
    statement = update(generations).values(is_starred=is_starred).returning(g.id, g.status)
    return Change(statement, g.is_starred if is_starred else not_(g.is_starred))


async def find_ids(session: AsyncSession, ids: Sequence[str] | None, filters: Filters) -> list[str]:
    """Return the ids of all rows that fit the filters, in order; only among ``ids`` if given.

    Raises ``BatchNotFoundError`` if the filters name a batch that is not there.
    """
    fitting = conditions(filters, Generation, is_found=False)
    if (batch := filters.get("batch")) is not None:
        await _check_batch(session, batch)
    if ids is None:
        return sorted(await session.scalars(select(Generation.id).where(*fitting)))
    found: list[str] = []
    for start in range(0, len(ids), CHUNK):
        found += await session.scalars(_meant(ids[start : start + CHUNK], filters))
    return sorted(found)


async def make_change(
    session: AsyncSession, *, change: Change, ids: Collection[str], filters: Filters
) -> BulkResult:
    """Change those of these rows that fit the filters, in one statement; return what was done."""
    statement = change.statement.where(is_one_of(_locked(ids, filters)), not_(change.is_so))
    moved = {row.id: row.status for row in (await session.execute(statement)).all()}
    is_cancel = change.wanted == GenerationStatus.CANCELLED
    running = sum(status == PROCESSING for status in moved.values()) if is_cancel else 0
    rest = await explain(session, change, [each for each in ids if each not in moved], filters)
    return BulkResult(changed=len(moved), running=running) + rest


async def change_tags(
    session: AsyncSession,
    *,
    ids: Collection[str],
    filters: Filters,
    add: Collection[str],
    remove: Collection[str],
) -> BulkResult:
    """Add and remove these tags; return what was done.

    Tags and searched words are written together, from the row as it was locked.
    """
    columns = (Generation.status, Generation.title, Generation.notes, Generation.tags)
    query = _locked(ids, filters).add_columns(*columns)
    rows = {row.id: row for row in (await session.execute(query)).all()}
    wanted = {row.id: sorted({*(row.tags or ()), *add} - {*remove}) for row in rows.values()}
    full = [each for each in wanted if len(wanted[each]) > MAX_TAGS]
    changes = [
        {
            "row": row.id,
            "new_tags": wanted[row.id] or None,
            "new_words": words_of_labels(row.title, row.notes, wanted[row.id]),
        }
        for row in rows.values()
        if row.id not in full and wanted[row.id] != (row.tags or [])
    ]
    if changes:
        await session.execute(_SET_TAGS, changes)
    done = BulkResult(changed=len(changes), unchanged=len(rows) - len(full) - len(changes))
    done += refusals(Refusal(each, rows[each].status, TOO_MANY_TAGS) for each in full)
    return done + await explain(session, None, [each for each in ids if each not in rows], filters)


async def read_again(session: AsyncSession, *, ids: Collection[str]) -> None:
    """Read those of these rows again that the session has as objects."""
    objects = session.identity_map.keys()
    if known := {key for kind, (key, *_), _ in objects if kind is Generation} & {*ids}:
        query = select(Generation).where(Generation.id.in_(known))
        await session.execute(query.execution_options(populate_existing=True))


def refusals(refused: Iterable[Refusal]) -> BulkResult:
    """Return the result of these refusals."""
    all_of_them = tuple(refused)
    return BulkResult(refused_count=len(all_of_them), refused=all_of_them[:MAX_REFUSALS])


async def explain(
    session: AsyncSession, change: Change | None, ids: Collection[str], filters: Filters
) -> BulkResult:
    """Return which of these rows need no change, and why the others were refused."""
    if not ids:
        return BulkResult()
    is_so = change.is_so if change else false()
    fits = and_(true(), *conditions(filters, Generation))
    query = select(Generation.id, Generation.status, is_so.label("is_so"), fits.label("fits"))
    found = await session.execute(query.where(Generation.id.in_(ids)))
    rows = {row.id: row for row in found.all()}
    done = [each for each in ids if each in rows and rows[each].is_so and rows[each].fits]
    rest = [each for each in ids if each not in {*done}]
    refused = refusals(_refusal(each, rows.get(each), change) for each in rest)
    return BulkResult(unchanged=len(done)) + refused


def _refusal(generation_id: str, row: Any, change: Change | None) -> Refusal:
    if row is None:
        return Refusal(generation_id, None, NOT_THERE)
    reason = NOT_MEANT
    if row.fits and change and change.wanted:
        reason = f"it is {row.status} and cannot become {change.wanted}"
    return Refusal(generation_id, row.status, reason)


async def _check_batch(session: AsyncSession, batch_id: str) -> None:
    if await session.scalar(select(Batch.id).where(Batch.id == batch_id)) is None:
        raise BatchNotFoundError(batch_id)


def _meant(ids: Collection[str], filters: Filters) -> Select[Any]:
    return select(Generation.id).where(Generation.id.in_(ids), *conditions(filters, Generation))


def _locked(ids: Collection[str], filters: Filters) -> Select[Any]:
    """Return the query that locks those of these rows that fit the filters."""
    in_order = _meant(ids, filters).order_by(Generation.id)
    return in_order.with_for_update(of=Generation, key_share=True)


_SET_TAGS = (
    update(generations)
    .where(g.id == bindparam("row"))
    .values(tags=bindparam("new_tags"), search_text=bindparam("new_words"))
)
"""Writes the tags of one row, and the words by which it is found."""
