"""``dgx-music search``: generations by the words of prompts, titles, notes and tags."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.filter_options import FILTER_OPTIONS, filters_of, find_filters
from dgx_music.cli.options import AsJson, DatabaseUrl, taking
from dgx_music.cli.output import (
    distance,
    print_json,
    print_table,
    prompt_in_words,
    status_in_words,
    tell,
    tell_untrained,
)

if TYPE_CHECKING:
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
    hits = asyncio.run(_search(" ".join(words), limit, filters, database_url))
    if as_json:
        print_json(
            [
                hit.generation.to_dict() | {"rank": hit.rank, "used_count": hit.used_count}
                for hit in hits
            ]
        )
    elif hits:
        headings = ("ID", "STATUS", "USED", "CREATED", "PROMPT")
        print_table(headings, [_as_line(hit) for hit in hits], numbers=["USED"])
    else:
        tell("Nothing was found.")
    tell_untrained([hit.generation for hit in hits])


def _as_line(hit: SearchHit) -> tuple[object, ...]:
    row = hit.generation
    return (
        row.id,
        status_in_words(row),
        hit.used_count,
        distance(row.created_at),
        prompt_in_words(row),
    )


async def _search(
    words: str,
    limit: int,
    filters: Filters,
    database_url: str | None,
) -> list[SearchHit]:
    from dgx_music.cli.opening import opened
    from dgx_music.storage import search_generations

    async with opened(database_url) as database:
        found = await find_filters(database, filters)
        return await database.transact(
            lambda session: search_generations(session, words, limit=limit, **found),
            read_only=True,
            may_lag=True,
        )
