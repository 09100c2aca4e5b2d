"""Lists of generations, page by page: a page costs the same however far back it is.

A page starts after the last row of the page before it (keyset pagination), so that nothing is
skipped or repeated while rows come and go.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, TypedDict, Unpack

from sqlalchemy import ColumnElement, literal, literal_column, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.errors import InvalidRequestError
from dgx_music.statuses import COMPLETED, GenerationStatus
from dgx_music.storage.models import Generation
from dgx_music.storage.schema import UtcDateTime, check_status, unindexed

MAX_ROWS = 2**31 - 1

_MAX_CURSOR_CHARACTERS = 400


class Filters(TypedDict, total=False):
    """Which generations: those that fit all filters given; ``None`` is not a filter."""

    status: GenerationStatus | str | None
    model: str | None
    tenant: str | None
    """If empty: generations without a tenant."""
    created_from: datetime | str | None
    """Created at this moment or later; a datetime with a time zone, or ISO 8601 text."""
    created_before: datetime | str | None
    """Created earlier than this moment."""


@dataclass(frozen=True)
class Page:
    """Some generations, newest first, and the place at which the next ones start."""

    generations: list[Generation]
    next: str | None
    """The cursor to give as ``after``; ``None`` if there are no more."""


async def list_generations(
    session: AsyncSession,
    *,
    limit: int = 100,
    after: str | None = None,
    **filters: Unpack[Filters],
) -> Page:
    """Return a page of at most ``limit`` generations, newest first, that fit the filters.

    ``after`` is the ``next`` of an earlier page, to be used with the same filters. The rows are
    read from an index in order; nothing is sorted. Raises ``InvalidRequestError``.
    """
    limit = validation.check_integer("limit", limit, 0, MAX_ROWS)
    start = None if after is None else _Cursor.parse(after)
    equalities, bounds = (
        _equalities(filters, Generation, is_found=False),
        _bounds(filters, start, Generation),
    )
    newest_first = (Generation.created_at.desc(), Generation.id.desc())
    query = select(Generation).where(*equalities, *bounds).order_by(*newest_first).limit(limit + 1)
    rows = list(await session.scalars(query))
    page = rows[:limit]
    has_more = len(rows) > limit > 0
    return Page(page, str(_Cursor(page[-1].created_at, page[-1].id)) if has_more else None)


def conditions(filters: Filters, row: Any) -> list[ColumnElement[bool]]:
    """Return the filters' conditions on a row that another condition finds.

    Raises ``InvalidRequestError``.
    """
    return [*_equalities(filters, row, is_found=True), *_bounds(filters, None, row)]


def limited(query: Any, limit: int, offset: int = 0) -> Any:
    """Return the query with this limit and offset; raises ``InvalidRequestError``."""
    return query.limit(validation.check_integer("limit", limit, 0, MAX_ROWS)).offset(
        validation.check_integer("offset", offset, 0, MAX_ROWS)
    )


class _Cursor(NamedTuple):
    """The last row of a page; callers see it as opaque text."""

    created_at: datetime
    id: str

    def __str__(self) -> str:
        plain = f"{self.created_at.isoformat()} {self.id}"
        return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> _Cursor:
        try:
            if len(text) > _MAX_CURSOR_CHARACTERS:
                raise ValueError
            padded = text + "=" * (-len(text) % 4)
            plain = base64.b64decode(padded, altchars=b"-_", validate=True).decode()
            moment, _, generation_id = plain.partition(" ")
            return cls(validation.check_run_at(moment), validation.check_name("id", generation_id))
        except (TypeError, ValueError, binascii.Error):
            remedy = "give the next page's as an earlier page returned it, or none to begin with the newest"
            raise InvalidRequestError("after", "is not a page's cursor", remedy) from None


def _equalities(filters: Filters, row: Any, *, is_found: bool) -> list[ColumnElement[bool]]:
    """Return the conditions that a column equals a value.

    Unless the rows are found by another condition, the first one may choose an index. PostgreSQL
    has statistics of the values and chooses by them. SQLite has none, so the condition that is
    likely to fit the fewest rows comes first here: a tenant, a status other than completed, a
    model.
    """
    for name in filters.keys() - Filters.__annotations__.keys():
        raise TypeError(f"there is no filter {name!r}; use {', '.join(Filters.__annotations__)}")
    tenant, model, status = filters.get("tenant"), filters.get("model"), filters.get("status")
    status = None if status is None else check_status(status)
    wanted = [
        (row.tenant, validation.check_name("tenant", tenant) if tenant else None),
        (row.status, status if status != COMPLETED else None),
        (row.model_name, None if model is None else validation.check_name("model", model)),
        (row.status, status if status == COMPLETED else None),
    ]
    asked = [(column, value) for column, value in wanted if value is not None]
    equal = [column == value for column, value in asked[: not is_found]]
    equal += [unindexed(column) == value for column, value in asked[not is_found :]]
    if tenant and not is_found:
        equal.append(row.tenant != literal_column("''"))  # the index has no empty ones
    if tenant == "":
        equal.append(unindexed(row.tenant) == "")
    return equal


def _bounds(filters: Filters, after: _Cursor | None, row: Any) -> list[ColumnElement[bool]]:
    """Return the conditions on the time of creation.

    Of two upper ends only the lower one is used, since an index may be entered at the other.
    """
    start, end = filters.get("created_from"), filters.get("created_before")
    asked: list[ColumnElement[bool]] = []
    if start is not None:
        asked.append(row.created_at >= validation.check_run_at(start, "created_from"))
    last = None if end is None else validation.check_run_at(end, "created_before")
    if last is not None and (after is None or last <= after.created_at):
        asked.append(row.created_at < last)
    elif after is not None:
        place = tuple_(literal(after.created_at, UtcDateTime), literal(after.id))
        asked.append(tuple_(row.created_at, row.id) < place)
    return asked
