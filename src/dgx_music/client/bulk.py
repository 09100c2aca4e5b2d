"""Cancel, retry, star and tag many generations at once: by their ids, or by the filters of a list.

Rows are changed in chunks, each in a transaction of its own, or all in the caller's session.
"""

from __future__ import annotations

from collections.abc import Collection, Coroutine, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Unpack

from dgx_music import validation
from dgx_music.client.transactions import transact
from dgx_music.errors import CountDiffersError, InvalidRequestError, PartlyDoneError
from dgx_music.storage import bulk
from dgx_music.storage.bulk import BulkResult, Change
from dgx_music.storage.filters import Filters, check_filters, conditions
from dgx_music.storage.generation import Generation
from dgx_music.storage.listing import MAX_ROWS

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


class Work(Protocol):
    """Changes these rows, if they fit the filters, in a session."""

    def __call__(
        self, session: AsyncSession, *, ids: Collection[str], filters: Filters
    ) -> Coroutine[Any, Any, BulkResult]:
        """Return what was done."""


async def cancel_generations(
    *,
    ids: Iterable[str] | None = None,
    expected: int | None = None,
    session: AsyncSession | None = None,
    **filters: Unpack[Filters],
) -> BulkResult:
    """Cancel many generations, as ``cancel_generation`` does with one, and return what was done.

    Meant are those of ``ids`` that fit the filters; without ``ids``, all that fit them. If another
    number than ``expected`` is meant, raises ``CountDiffersError`` before anything is changed.
    Completed and failed ones are refused; so are those that no longer fit when they are reached.

    Rows are changed in chunks of 1,000, each in a transaction of its own, or all in the caller's
    session; objects that it has of them are read again. Raises ``InvalidRequestError``,
    ``BatchNotFoundError`` if ``batch`` is not the id of one (a name is none), and
    ``PartlyDoneError`` if it is broken off half-way.
    """
    return await _change(bulk.cancels(), ids, expected, session, filters)


async def retry_generations(
    *,
    ids: Iterable[str] | None = None,
    expected: int | None = None,
    session: AsyncSession | None = None,
    **filters: Unpack[Filters],
) -> BulkResult:
    """Make many generations pending again, as ``retry_generation`` does with one.

    Which are meant, what comes back and what is raised: see ``cancel_generations``. All that are
    neither failed nor cancelled are refused.
    """
    return await _change(bulk.retries(), ids, expected, session, filters)


async def star_generations(
    *,
    off: bool = False,
    ids: Iterable[str] | None = None,
    expected: int | None = None,
    session: AsyncSession | None = None,
    **filters: Unpack[Filters],
) -> BulkResult:
    """Give many generations a star, or take it away with ``off=True``.

    Which are meant, what comes back and what is raised: see ``cancel_generations``. No status is
    refused. ``starred`` is a filter here.
    """
    change = bulk.stars(is_starred=not validation.check_boolean("off", off))
    return await _change(change, ids, expected, session, filters)


async def tag_generations(
    *,
    add: Collection[str] = (),
    remove: Collection[str] = (),
    ids: Iterable[str] | None = None,
    expected: int | None = None,
    session: AsyncSession | None = None,
    **filters: Unpack[Filters],
) -> BulkResult:
    """Add tags to many generations, and remove others.

    Which are meant, what comes back and what is raised: see ``cancel_generations``. No status is
    refused.
    """
    check_filters(filters)  # first: of a misspelt name, the tags would seem to be missing
    added, removed = check_tag_changes("add", add, "remove", remove)
    work = partial(bulk.change_tags, add=added, remove=removed)
    return await carry_out(work, await choose(ids, expected, session, filters), session, filters)


async def choose(
    ids: Iterable[str] | None,
    expected: int | None,
    session: AsyncSession | None,
    filters: Filters,
) -> list[str]:
    """Return the ids of the generations that are meant; with ``ids``, all of these.

    Raises ``CountDiffersError``, ``BatchNotFoundError``, and ``InvalidRequestError`` if there are no ids and every row fits
    the filters: a forgotten filter must not mean all.
    """
    named = None if ids is None else _check_ids(ids)
    if not conditions(filters, Generation) and named is None:
        problem = "are missing, and so are filters that leave any out"
        raise InvalidRequestError("ids", problem, "say which generations are meant")
    if named is not None and expected is None and filters.get("batch") is None:
        return named
    found = await transact(
        session, lambda current: bulk.find_ids(current, named, filters), read_only=True
    )
    if expected is not None:
        validation.check_integer("expected", expected, 0, MAX_ROWS)
        if len(found) != expected:
            raise CountDiffersError(expected, len(found))
    return found if named is None else named


async def carry_out(
    work: Work, ids: Sequence[str], session: AsyncSession | None, filters: Filters
) -> BulkResult:
    """Do the work with each chunk of these ids in turn, and return what was done in all."""
    done = BulkResult()
    for chunk in chunks_of(ids, bulk.CHUNK):
        try:
            done += await transact(session, partial(work, ids=chunk, filters=filters))
        except Exception as error:
            if done.changed and session is None:
                raise PartlyDoneError(done, len(ids), error) from error
            raise
        if session is not None:
            await transact(session, partial(bulk.read_again, ids=chunk))
    return done


def chunks_of(ids: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Yield so many of the ids at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def check_tag_changes(
    add_field: str, add: Collection[str], remove_field: str, remove: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return the tags to add and to remove as they are stored; raises ``InvalidRequestError``."""
    added = validation.check_tags(add, add_field)
    removed = validation.check_tags(remove, remove_field)
    if not (added or removed):
        raise InvalidRequestError(add_field, f"has no tag, and nor has {remove_field}", "name one")
    if both := {*added} & {*removed}:
        problem = f"and {remove_field} both have {min(both)}"
        raise InvalidRequestError(add_field, problem, "name it once")
    return added, removed


async def _change(
    change: Change,
    ids: Iterable[str] | None,
    expected: int | None,
    session: AsyncSession | None,
    filters: Filters,
) -> BulkResult:
    chosen = await choose(ids, expected, session, filters)

    work = partial(bulk.make_change, change=change)
    return await carry_out(work, chosen, session, filters)


def _check_ids(ids: Iterable[str]) -> list[str]:
    """Return the ids in order, each once: so chunks lock their rows in one order."""
    if isinstance(ids, str):
        raise InvalidRequestError("ids", "is one text", "use a list of ids")
    return sorted({validation.check_name("ids", each) for each in ids})
