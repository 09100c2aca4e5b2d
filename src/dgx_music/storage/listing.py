"""Lists of generations, page by page: a page costs the same however far back it is.

A page starts after the last row of the page before it (keyset pagination), so that nothing is
skipped or repeated while rows come and go.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple, Unpack, cast, get_args

from sqlalchemy import ColumnElement, Select, literal, select, tuple_, union_all
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from dgx_music import validation
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.filters import CheckedFilters, Filters, Sort, check_filters, choices, moments
from dgx_music.storage.models import Generation, Tag
from dgx_music.storage.schema import dialect_of

MAX_ROWS = 2**31 - 1

_MAX_CURSOR_CHARACTERS = 400
_MANY_TAGGED = 10_000
"""To sort so many rows takes as long as to pass over some 200,000."""
_SORTED_BY_INDEX = ("created", "finished", "bpm")


@dataclass(frozen=True)
class Page:
    """Some generations, newest first, and the place at which the next ones start."""

    generations: list[Generation]
    next: str | None
    """The cursor to give as ``after``; ``None`` if there are no more."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the summaries of the generations, and ``next``."""
        rows = [generation.to_summary() for generation in self.generations]
        return {"generations": rows, "next": self.next}


class _Order(NamedTuple):
    """By which value a list is sorted, and in which direction."""

    sort: Sort
    is_reversed: bool

    @property
    def column(self) -> Any:
        return self.value_of(Generation)

    def value_of(self, row: Any) -> Any:
        return getattr(row, _COLUMNS[self.sort])

    @property
    def prefix(self) -> str:
        """What a cursor begins with; empty for the usual order, newest first."""
        if self == ("created", False):
            return ""
        return f"{'reverse ' if self.is_reversed else ''}{self.sort} "

    def by(self, row: Any = Generation) -> list[ColumnElement[Any]]:
        """Return what to sort by; the id decides between equal values."""
        keys = (self.value_of(row), row.id)
        return [key.asc() if self.is_reversed else key.desc() for key in keys]

    def after(self, cursor: _Cursor) -> ColumnElement[bool]:
        """Return the condition on the rows that come later in the list."""
        here = tuple_(self.column, Generation.id)
        place = tuple_(literal(cursor.value, self.column.type), literal(cursor.id))
        return here > place if self.is_reversed else here < place


_COLUMNS: dict[str, str] = {
    "created": "created_at",
    "finished": "completed_at",
    "duration": "duration_seconds",
    "bpm": "bpm",
    "run-time": "generation_time_seconds",
}


async def list_generations(
    session: AsyncSession,
    *,
    limit: int = 100,
    after: str | None = None,
    sort: Sort = "created",
    reverse: bool = False,
    **filters: Unpack[Filters],
) -> Page:
    """Return a page of at most ``limit`` generations that fit the filters, newest first.

    ``after`` is the ``next`` of an earlier page, to be used with the same filters and order. Other
    orders: ``sort`` by ``finished`` (the time), ``duration``, ``bpm`` or ``run-time``, the largest
    value first; a generation without such a value is left out. ``reverse`` turns any order round.

    By ``created``, ``finished`` and ``bpm`` the rows are read from an index in order, past those
    that do not fit; by ``duration`` and ``run-time`` all that fit are read and sorted.

    A ``batch`` or a ``parent`` that is not there is no error: no row fits. ``get_batch`` says
    whether there is such a batch. Raises ``InvalidRequestError``.
    """
    limit = validation.check_integer("limit", limit, 0, MAX_ROWS)
    order = _Order(_check_sort(sort), reverse)
    start = None if after is None else _Cursor.parse(after, order)
    asked = await _without_large_sorts(session, check_filters(filters), order)
    query = _page_query(asked, order, start, limit + 1)
    rows: list[Generation] = list(await session.scalars(query))
    page = rows[:limit]
    has_more = len(rows) > limit > 0
    return Page(page, _Cursor.at(page[-1], order).text(order) if has_more else None)


async def _without_large_sorts(
    session: AsyncSession, asked: CheckedFilters, order: _Order
) -> CheckedFilters:
    """Return the filters for SQLite with the tags noted that very many rows have.

    To pass over the rows without such a tag in the order of the list is then cheaper than to find
    and sort all rows with it. PostgreSQL knows how many they are.
    """
    if dialect_of(session) == "postgresql" or order.sort not in _SORTED_BY_INDEX:
        return asked
    frequent = [tag for tag in asked.tags if await _is_frequent(session, tag)]
    return replace(asked, frequent_tags=tuple(frequent))


async def _is_frequent(session: AsyncSession, tag: str) -> bool:
    beyond = select(Tag.name).where(Tag.name == tag).offset(_MANY_TAGGED).limit(1)
    return await session.scalar(beyond) is not None


def _page_query(
    asked: CheckedFilters, order: _Order, start: _Cursor | None, limit: int
) -> Select[Any]:
    """Return the query of a page, read from an index in order.

    Several statuses are not next to each other in an index: each has a query of its own.
    """
    if not asked.are_statuses_split or order.sort == "bpm":
        return _ordered(select(Generation), asked, order, start, limit)
    parts = [
        _ordered(select(Generation), replace(asked, statuses=(each,)), order, start, limit)
        for each in asked.statuses
    ]
    found = aliased(Generation, union_all(*(select(part.subquery()) for part in parts)).subquery())
    return select(found).order_by(*order.by(found)).limit(limit)


def _ordered(
    query: Select[Any], asked: CheckedFilters, order: _Order, start: _Cursor | None, limit: int
) -> Select[Any]:
    fitting = [*choices(asked, Generation, sort=order.sort), *_bounds(asked, order, start)]
    if order.column.nullable:
        fitting.append(order.column.is_not(None))
    return query.where(*fitting).order_by(*order.by()).limit(limit)


def limited(query: Any, limit: int, offset: int = 0) -> Any:
    """Return the query with this limit and offset; raises ``InvalidRequestError``."""
    return query.limit(validation.check_integer("limit", limit, 0, MAX_ROWS)).offset(
        validation.check_integer("offset", offset, 0, MAX_ROWS)
    )


class _Cursor(NamedTuple):
    """The last row of a page; callers see it as opaque text."""

    value: datetime | float
    id: str

    @classmethod
    def at(cls, row: Generation, order: _Order) -> _Cursor:
        return cls(order.value_of(row), row.id)

    def text(self, order: _Order) -> str:
        value = self.value.isoformat() if isinstance(self.value, datetime) else repr(self.value)
        plain = f"{order.prefix}{value} {self.id}"
        return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str, order: _Order) -> _Cursor:
        try:
            if len(text) > _MAX_CURSOR_CHARACTERS:
                raise ValueError
            padded = text + "=" * (-len(text) % 4)
            plain = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
            return cls._read(plain, order)
        except (TypeError, ValueError, binascii.Error):
            remedy = (
                "give the next page's as an earlier page of the same order returned it, or none "
                "to begin with the first"
            )
            raise InvalidRequestError("after", "is not a page's cursor", remedy) from None

    @classmethod
    def _read(cls, plain: str, order: _Order) -> _Cursor:
        if not plain.startswith(order.prefix):
            raise ValueError
        value, _, generation_id = plain.removeprefix(order.prefix).partition(" ")
        is_moment = order.sort in ("created", "finished")
        return cls(
            validation.check_run_at(value) if is_moment else _finite(value),
            validation.check_name("id", generation_id),
        )


def _finite(text: str) -> float:
    return validation.check_between("value", float(text), -1e300, 1e300)


def _check_sort(value: object) -> Sort:
    if value not in get_args(Sort):
        remedy = f"use {', '.join(get_args(Sort))}"
        raise InvalidRequestError("sort", f"is {validation.shown(value)}", remedy)
    return cast("Sort", value)


def _bounds(
    asked: CheckedFilters, order: _Order, start: _Cursor | None
) -> list[ColumnElement[bool]]:
    """Return the conditions on the time of creation, and on the place of the page.

    Of two bounds on one side only the narrower one is used, since an index may be entered at the
    other.
    """
    if start is None:
        return moments(asked, Generation)
    if order.sort != "created":
        return [*moments(asked, Generation), order.after(start)]
    first, end = asked.created_from, asked.created_before
    at = cast("datetime", start.value)
    if order.is_reversed:
        is_first_used = first is not None and first > at
        asked = asked if is_first_used else replace(asked, created_from=None)
        return [*moments(asked, Generation), *([] if is_first_used else [order.after(start)])]
    is_end_used = end is not None and end <= at
    asked = asked if is_end_used else replace(asked, created_before=None)
    return [*moments(asked, Generation), *([] if is_end_used else [order.after(start)])]
