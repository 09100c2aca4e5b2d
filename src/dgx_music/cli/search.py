"""``dgx-music search``: generations by the words of prompts, titles, notes and tags."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.columns import short_id, titled_prompt
from dgx_music.cli.filter_options import FILTER_OPTIONS, filters_of, find_filters
from dgx_music.cli.options import AsJson, DatabaseUrl, taking
from dgx_music.cli.output import (
    distance,
    print_json_rows,
    print_table,
    status_in_words,
    tell,
    tell_untrained,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dgx_music.storage import Filters, SearchHit


@taking(FILTER_OPTIONS, before="limit")
def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS...", help="What it is about.")],
    limit: Annotated[int, typer.Option(min=0, help="How many to print at most.")] = 20,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Find words in prompts, titles, notes and tags, best first.

    A prompt is shown once, by its newest generation.

    In one argument, "quoted words" must follow one another and -words must not be there:
    dgx-music search '"lofi rain" -vocals'
    """
    filters = filters_of(options)
    hits, characters = asyncio.run(_search(" ".join(words), limit, filters, database_url))
    if as_json:
        print_json_rows(
            hit.generation.to_summary() | {"rank": hit.rank, "used_count": hit.used_count}
            for hit in hits
        )
    elif hits:
        headings = ("ID", "STATUS", "USED", "CREATED", "PROMPT")
        print_table(headings, [_as_line(hit, characters) for hit in hits], numbers=["USED"])
    else:
        tell("Nothing was found.")
    tell_untrained([hit.generation for hit in hits])


def _as_line(hit: SearchHit, characters: int | None) -> tuple[object, ...]:
    row = hit.generation
    return (
        short_id(row, characters),
        status_in_words(row),
        hit.used_count,
        distance(row.created_at),
        titled_prompt(row),
    )


async def _search(
    words: str, limit: int, filters: Filters, database_url: str | None
) -> tuple[list[SearchHit], int | None]:
    """Return the hits, and how many characters of their ids to show."""
    from dgx_music.cli.opening import id_characters, opened
    from dgx_music.storage import search_generations

    async def read(session: AsyncSession) -> tuple[list[SearchHit], int | None]:
        hits = await search_generations(session, words, limit=limit, **found)
        return hits, await id_characters(session, [hit.generation for hit in hits])

    async with opened(database_url) as database:
        found = await find_filters(database, filters)
        return await database.transact(read, read_only=True, may_lag=True)
