"""``dgx-music list``, ``stats`` and ``prompts``: what is in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.filter_options import FILTER_OPTIONS, filters_of, find_filters
from dgx_music.cli.options import AsJson, DatabaseUrl, Limit, taking
from dgx_music.cli.output import (
    UNCONDITIONAL,
    distance,
    print_fields,
    print_json,
    print_table,
    prompt_in_words,
    status_in_words,
    tell,
    tell_untrained,
)
from dgx_music.errors import InvalidRequestError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dgx_music.storage import Filters, Generation, Page, Prompt


@taking(FILTER_OPTIONS, before="limit")
def list_generations(
    limit: Limit = 20,
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
    **options: Any,
) -> None:
    """List generations, newest first."""
    filters = filters_of(options)
    statuses = options.get("status") or []
    if offset and (after or filters.keys() - {"status"} or len(statuses) > 1):
        problem = "goes with one --status and --limit only"
        raise InvalidRequestError("--offset", problem, "leave it out and go on with --after")
    page, count = asyncio.run(_list(filters, statuses, limit, offset, after, database_url))
    rows = page.generations
    if as_json:
        print_json([row.to_dict() for row in rows])
    elif rows:
        headings = ("ID", "STATUS", "DURATION", "CREATED", "PROMPT")
        print_table(headings, [_as_line(row) for row in rows], numbers=["DURATION"])
    rest = _rest_of(page, count, after, statuses)
    if rest:
        tell(rest)
    tell_untrained(rows)


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


def _as_line(row: Generation) -> tuple[object, ...]:
    seconds, age = f"{row.duration_seconds:g} s", distance(row.created_at)
    return row.id, status_in_words(row), seconds, age, prompt_in_words(row)


async def _list(
    filters: Filters,
    statuses: Sequence[str],
    limit: int,
    offset: int,
    after: str | None,
    database_url: str | None,
) -> tuple[Page, int | None]:
    """Return a page, and the number of all generations if it is known without reading each."""
    from dgx_music.cli.opening import opened
    from dgx_music.storage import Page, count_generations, get_all_generations, list_generations

    is_counted = not filters.keys() - {"status"}

    async def read(session: AsyncSession) -> tuple[Page, int | None]:
        if offset:
            status = statuses[0] if statuses else None
            page = Page(await get_all_generations(session, limit, offset, status), None)
        else:
            page = await list_generations(session, limit=limit, after=after, **found)
        if not is_counted:
            return page, None
        counts = [await count_generations(session, each) for each in statuses or (None,)]
        return page, sum(counts)

    async with opened(database_url) as database:
        found = await find_filters(database, filters)
        return await database.transact(read, read_only=True, may_lag=True)


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
