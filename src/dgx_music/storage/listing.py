"""Lists of generations, page by page: however far back a page is, it costs what the first one does.

A page starts where the one before it ended (keyset pagination), so nothing is skipped or repeated while rows come and go.
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
from dgx_music.storage.models import Generation
from dgx_music.storage.repository import check_status
from dgx_music.storage.schema import COMPLETED, GenerationStatus, UtcDateTime, unindexed

MAX_ROWS = 2**31 - 1

_MAX_CURSOR_CHARACTERS = 400


class Filters(TypedDict, total=False):
    """Which generations; each may be left out, or ``None``, and all that are given must fit."""

    status: GenerationStatus | str | None
    model: str | None
    tenant: str | None
    """Empty: those of nobody in particular."""
    created_from: datetime | str | None
    """Created at this moment or later; a datetime with a time zone, or ISO 8601 text."""
    created_before: datetime | str | None
    """Created earlier than this moment."""


@dataclass(frozen=True)
class Page:
    """Some generations, newest first, and where the next ones start."""

    generations: list[Generation]
    next: str | None
    """The cursor to give as ``after``; ``None`` where there are no more."""


async def list_generations(
    session: AsyncSession, *, limit: int = 100, after: str | None = None, **filters: Unpack[Filters]
) -> Page:
    """Return a page of at most ``limit`` generations, newest first, that fit the filters.

    ``after`` is an earlier page's ``next``, to be used with the same filters. Read from an index, in order: nothing is
    sorted. Raises ``InvalidRequestError``.
    """
    limit = validation.check_integer("limit", limit, 0, MAX_ROWS)
    start = None if after is None else _Cursor.parse(after)
    is_wanted = [*_equalities(filters, Generation, is_found=False), *_bounds(filters, start, Generation)]
    newest_first = (Generation.created_at.desc(), Generation.id.desc())
    rows = list(await session.scalars(select(Generation).where(*is_wanted).order_by(*newest_first).limit(limit + 1)))
    page = rows[:limit]
    has_more = len(rows) > limit > 0
    return Page(page, str(_Cursor(page[-1].created_at, page[-1].id)) if has_more else None)


def conditions(filters: Filters, row: Any) -> list[ColumnElement[bool]]:
    """Return what the filters ask of a row that is found by something else; raises ``InvalidRequestError``."""
    return [*_equalities(filters, row, is_found=True), *_bounds(filters, None, row)]


class _Cursor(NamedTuple):
    """The last row of a page, as text that nobody need understand."""

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
            plain = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
            moment, _, generation_id = plain.partition(" ")
            return cls(validation.check_run_at(moment), validation.check_name("id", generation_id))
        except (TypeError, ValueError, binascii.Error):
            remedy = "give the next page's as an earlier page told it, or none to begin with the newest"
            raise InvalidRequestError("after", "is not a page's cursor", remedy) from None


def _equalities(filters: Filters, row: Any, *, is_found: bool) -> list[ColumnElement[bool]]:
    """Ask for the values given: unless rows are found already, for one by its index, for the others among those rows.

    PostgreSQL has counted how frequent each value is and chooses for itself. SQLite has not, so what is likely to be the
    rarest comes first here: a tenant, what is not completed yet, a model.
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
        equal.append(row.tenant != literal_column("''"))  # so that the index, which leaves out the empty one, will do
    if tenant == "":
        equal.append(unindexed(row.tenant) == "")
    return equal


def _bounds(filters: Filters, after: _Cursor | None, row: Any) -> list[ColumnElement[bool]]:
    """Ask for a stretch of time; of two ends only the nearer one, since an index may be entered at the other."""
    start, end = filters.get("created_from"), filters.get("created_before")
    asked: list[ColumnElement[bool]] = []
    if start is not None:
        asked.append(row.created_at >= validation.check_run_at(start, "created_from"))
    last = None if end is None else validation.check_run_at(end, "created_before")
    if last is not None and (after is None or last <= after.created_at):
        asked.append(row.created_at < last)
    elif after is not None:
        asked.append(tuple_(row.created_at, row.id) < tuple_(literal(after.created_at, UtcDateTime), literal(after.id)))
    return asked
