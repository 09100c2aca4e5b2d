"""``dgx-music list``, ``stats`` and ``prompts``: what is in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from dgx_music.cli.columns import COLUMNS, print_generations, read_columns
from dgx_music.cli.filter_options import FILTER_OPTIONS, filters_of, find_filters
from dgx_music.cli.options import AsJson, DatabaseUrl, Limit, taking
from dgx_music.cli.output import (
    UNCONDITIONAL,
    distance,
    print_fields,
    print_json,
    print_json_rows,
    print_table,
    tell,
    tell_untrained,
)
from dgx_music.errors import InvalidRequestError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dgx_music.storage import Filters, Page, Prompt


Order = Literal["created", "finished", "duration", "bpm", "run-time"]


@taking(FILTER_OPTIONS, before="limit")
def list_generations(
    limit: Limit = 20,
    sort: Annotated[
        Order | None,
        typer.Option(
            help="By what to sort, the largest first; default created. Those without a time of "
            "end, a tempo or a run time are left out.",
        ),
    ] = None,
    reverse: Annotated[
        bool, typer.Option("--reverse", "-r", help="Turn the order round: oldest, shortest first.")
    ] = False,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"Show these columns, of {', '.join(COLUMNS)}."),
    ] = None,
    offset: Annotated[
        int, typer.Option(min=0, help="Leave out this many of the newest; slow far back.")
    ] = 0,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="CURSOR", help="Start after this cursor, which the previous page printed."
        ),
    ] = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    page: Annotated[
        bool,
        typer.Option(
            "--page", help="Print a JSON object: `generations`, and the cursor `next` or null."
        ),
    ] = False,
    **options: Any,
) -> None:
    """List generations, newest first.

    The filters go together:
    dgx-music list -s completed --starred --tag ambient --since yesterday

    On a terminal an id is shown as its shortest end that means it alone.
    Commands take any part of an id that fits no other one.
    """
    names = read_columns(columns)
    wanted = _Wanted(filters_of(options), limit, offset, after, sort or "created", reverse)
    wanted.check()
    listed = asyncio.run(_list(wanted, database_url))
    rows = listed.page.generations
    if page:
        print_json(listed.page.to_dict(), indent=None)
    elif as_json:
        print_json_rows(row.to_summary() for row in rows)
    elif rows:
        print_generations(rows, names, listed.id_characters)
    rest = _rest_of(listed.page, listed.total, after, wanted.statuses)
    if rest:
        tell(rest)
    tell_untrained(rows)


class _Wanted(NamedTuple):
    """What to list."""

    filters: Filters
    limit: int
    offset: int
    after: str | None
    sort: Order
    reverse: bool

    @property
    def statuses(self) -> Sequence[str]:
        return self.filters.get("status") or ()

    @property
    def is_counted(self) -> bool:
        """True if the number of such generations is known without reading each."""
        is_complete = self.sort in ("created", "duration")
        return is_complete and not self.filters.keys() - {"status"}

    def check(self) -> None:
        is_plain = self.is_counted and (self.sort, self.reverse) == ("created", False)
        if self.offset and (self.after or not is_plain or len(self.statuses) > 1):
            problem = "goes with one --status and --limit only"
            raise InvalidRequestError("--offset", problem, "leave it out and go on with --after")


class _Listed(NamedTuple):
    """What there is of it."""

    page: Page
    total: int | None
    """Of all such generations; ``None`` if they were not counted."""
    id_characters: int | None


def stats(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Count generations by status, and distinct prompts."""
    counts = asyncio.run(_stats(database_url))
    if as_json:
        print_json(counts)
    else:
        print_fields((name.replace("_", " "), f"{count:,}") for name, count in counts.items())


def prompts(limit: Limit = 10, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the prompts that are used most."""
    rows = asyncio.run(_prompts(limit, database_url))
    if as_json:
        print_json([row.to_dict() for row in rows])
    elif rows:
        lines = [
            (row.used_count, distance(row.last_used_at), row.text or UNCONDITIONAL) for row in rows
        ]
        print_table(("USED", "LAST", "PROMPT"), lines)
    else:
        tell("There are no prompts yet.")


def _rest_of(
    page: Page,
    count: int | None,
    after: str | None,
    statuses: Sequence[str],
) -> str | None:
    """Return what to say of the generations that are not on the page.

    ``count`` is the number of all generations, or ``None`` if they were not counted.
    """
    shown = len(page.generations)
    if page.next is not None:
        return f"{shown:,}{'' if count is None or after else f' of {count:,}'}; the next ones: --after {page.next}"
    if after or (shown and not count):
        return None
    if count:
        return (
            f"{shown:,} of {count:,}; --limit and --offset show others." if shown < count else None
        )
    if count is None:
        return "There are no such generations"
    kind = (
        f"{' or '.join(statuses)} generations"
        if statuses
        else 'generations yet; add one with: dgx-music enqueue "lofi rain"'
    )
    return f"There are no {kind}"


async def _list(wanted: _Wanted, database_url: str | None) -> _Listed:
    from dgx_music.cli.opening import id_characters, opened

    async def read(session: AsyncSession) -> _Listed:
        page = await _page(session, wanted._replace(filters=found))
        total = await _count(session, wanted) if wanted.is_counted else None
        return _Listed(page, total, await id_characters(session, page.generations))

    async with opened(database_url) as database:
        found = await find_filters(database, wanted.filters)
        return await database.transact(read, read_only=True, may_lag=True)


async def _page(session: AsyncSession, wanted: _Wanted) -> Page:
    from dgx_music.storage import Page, get_all_generations, list_generations

    _, limit, offset, after, sort, reverse = wanted
    if offset:
        status = next(iter(wanted.statuses), None)
        return Page(await get_all_generations(session, limit, offset, status), None)
    return await list_generations(
        session, limit=limit, after=after, sort=sort, reverse=reverse, **wanted.filters
    )


async def _count(session: AsyncSession, wanted: _Wanted) -> int:
    from dgx_music.storage import count_generations

    return sum([await count_generations(session, each) for each in wanted.statuses or (None,)])


async def _stats(database_url: str | None) -> dict[str, int]:
    from dgx_music.cli.opening import opened
    from dgx_music.storage import get_database_stats

    async with opened(database_url) as database:
        return await database.transact(get_database_stats, read_only=True, may_lag=True)


async def _prompts(limit: int, database_url: str | None) -> list[Prompt]:
    from dgx_music.cli.opening import opened
    from dgx_music.storage import get_most_used_prompts

    async with opened(database_url) as database:
        return await database.transact(
            lambda session: get_most_used_prompts(session, limit), read_only=True, may_lag=True
        )
