"""Lists, counts, and the few things a person can do to a generation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.cli.database import find_generation, opened
from dgx_music.cli.options import (
    AsJson,
    Before,
    DatabaseUrl,
    GenerationId,
    Limit,
    ModelName,
    Since,
    Status,
    Tenant,
    Timeout,
    filters_of,
)
from dgx_music.cli.output import distance, print_fields, print_json, print_table, prompt_in_words, tell
from dgx_music.cli.progress import follow, tell_outcome, tell_untrained
from dgx_music.cli.service import ServiceTeller
from dgx_music.client.generations import cancel_generation, retry_generation
from dgx_music.errors import InvalidRequestError
from dgx_music.storage import (
    Filters,
    Generation,
    GenerationStatus,
    Page,
    Prompt,
    count_generations,
    get_all_generations,
    get_database_stats,
    get_most_used_prompts,
)
from dgx_music.storage import list_generations as read_page
from dgx_music.validation import check_positive

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


def list_generations(
    status: Status = None,
    model: ModelName = None,
    tenant: Tenant = None,
    since: Since = None,
    before: Before = None,
    limit: Limit = 20,
    offset: Annotated[int, typer.Option(min=0, help="Leave out this many of the newest; slow far back.")] = 0,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Go on where a page ended: it told the cursor.")
    ] = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """List generations, newest first."""
    if offset and any(value is not None for value in (after, model, tenant, since, before)):
        problem = "goes with --status and --limit only"
        raise InvalidRequestError("--offset", problem, "leave it out and go on with --after")
    filters = filters_of(status, model, tenant, since, before)
    page, count = asyncio.run(_list(filters, limit, offset, after, database_url))
    rows = page.generations
    if as_json:
        print_json([row.to_dict() for row in rows])
    elif rows:
        headings = ("ID", "STATUS", "DURATION", "CREATED", "PROMPT")
        print_table(headings, [_as_line(row) for row in rows], numbers=["DURATION"])
    rest = _rest_of(page, count, after, status)
    if rest:
        tell(rest)
    tell_untrained(rows)


def watch(
    generation_id: GenerationId, timeout: Timeout = None, database_url: DatabaseUrl = None, as_json: AsJson = False
) -> None:
    """Watch a generation until it is finished.

    Ends with 1 where it failed or was cancelled.
    With --json every change of the row is printed as one line of JSON.
    """
    if timeout is not None:
        check_positive("--timeout", timeout)
    generation = asyncio.run(_watch(generation_id, timeout, database_url, as_json=as_json))
    is_completed = generation.is_complete if as_json else tell_outcome([generation])
    if not is_completed:
        raise typer.Exit(1)


def cancel(generation_id: GenerationId, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Cancel a generation.

    One that waits is cancelled at once, one that runs as soon as its worker has stopped it.
    """
    generation = asyncio.run(_cancel(generation_id, database_url))
    if as_json:
        print_json(generation.to_dict())
    elif generation.is_processing:
        tell(f"Generation {generation.id} is running; its worker has been asked to stop it.")
    else:
        tell(f"Generation {generation.id} is {generation.status}.")


def retry(generation_id: GenerationId, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Put a failed or cancelled generation back into the queue.

    It gets a fresh budget of failures; its attempts keep counting. A completed generation never runs again.
    """
    generation = asyncio.run(_retry(generation_id, database_url))
    if as_json:
        print_json(generation.to_dict())
    else:
        tell(
            f"Generation {generation.id} is {generation.status} again; follow it with: dgx-music watch {generation.id}"
        )


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
        print_table(
            ("USED", "LAST", "PROMPT"),
            [(row.used_count, distance(row.last_used_at), prompt_in_words(row)) for row in rows],
        )
    else:
        tell("There are no prompts yet.")


def _print_as_line(row: Generation) -> None:
    print_json(row.to_dict(), indent=None)


def _rest_of(page: Page, count: int | None, after: str | None, status: GenerationStatus | None) -> str | None:
    """Return what to say of generations that are not on the page; ``count`` is of all, ``None`` where nobody counted."""
    shown = len(page.generations)
    if page.next is not None:
        return f"{shown:,}{'' if count is None or after else f' of {count:,}'}; the next ones: --after {page.next}"
    if after or (shown and not count):
        return None
    if count:
        return f"{shown:,} of {count:,}; --limit and --offset show others." if shown < count else None
    if count is None:
        return "There are no such generations"
    kind = f"{status.value} generations" if status else 'generations yet; add one with: dgx-music enqueue "lofi rain"'
    return f"There are no {kind}"


def status_of(row: Generation) -> str:
    """Return the status in words, with how far it has come."""
    return f"{row.status} {row.progress:.0%}" if row.is_processing else row.status


def _as_line(row: Generation) -> tuple[object, ...]:
    return row.id, status_of(row), f"{row.duration_seconds:g} s", distance(row.created_at), prompt_in_words(row)


async def _list(
    filters: Filters, limit: int, offset: int, after: str | None, database_url: str | None
) -> tuple[Page, int | None]:
    """Return a page, and how many there are in all where that is known without looking at each."""
    status = filters.get("status")
    is_counted = not any(value for name, value in filters.items() if name != "status")

    async def read(session: AsyncSession) -> tuple[Page, int | None]:
        if offset:
            page = Page(await get_all_generations(session, limit, offset, status), None)
        else:
            page = await read_page(session, limit=limit, after=after, **filters)
        return page, await count_generations(session, status) if is_counted else None

    async with opened(database_url) as database:
        return await database.transact(read, read_only=True, may_lag=True)


async def _watch(wanted: str, timeout: float | None, database_url: str | None, *, as_json: bool) -> Generation:
    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        teller, show = ServiceTeller(database, [generation]), _print_as_line if as_json else None
        return (await follow([generation.id], timeout=timeout, show=show, teller=teller))[0]


async def _cancel(wanted: str, database_url: str | None) -> Generation:
    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        await cancel_generation(generation.id)
        return await find_generation(database, generation.id)


async def _retry(wanted: str, database_url: str | None) -> Generation:
    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        await retry_generation(generation.id)
        return await find_generation(database, generation.id)


async def _stats(database_url: str | None) -> dict[str, int]:
    async with opened(database_url) as database:
        return await database.transact(get_database_stats, read_only=True, may_lag=True)


async def _prompts(limit: int, database_url: str | None) -> list[Prompt]:
    async with opened(database_url) as database:
        return await database.transact(
            lambda session: get_most_used_prompts(session, limit), read_only=True, may_lag=True
        )
