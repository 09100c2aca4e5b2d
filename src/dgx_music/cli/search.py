"""``dgx-music search``: prompts by their words."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from dgx_music.cli.database import opened
from dgx_music.cli.generations import status_of
from dgx_music.cli.options import AsJson, Before, DatabaseUrl, ModelName, Since, Status, Tenant, filters_of
from dgx_music.cli.output import distance, print_json, print_table, prompt_in_words, tell
from dgx_music.cli.progress import tell_untrained
from dgx_music.storage import Filters, SearchHit, search_generations


def search(
    words: Annotated[list[str], typer.Argument(metavar="WORDS...", help="What the prompt is about.")],
    status: Status = None,
    model: ModelName = None,
    tenant: Tenant = None,
    since: Since = None,
    before: Before = None,
    limit: Annotated[int, typer.Option(min=0, help="How many to print at most.")] = 20,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Find prompts by their words, best first, each by its newest generation.

    In one argument, "quoted words" must follow one another and -words must not be there:
    dgx-music search '"lofi rain" -vocals'
    """
    hits = asyncio.run(_search(" ".join(words), limit, filters_of(status, model, tenant, since, before), database_url))
    if as_json:
        print_json([hit.generation.to_dict() | {"rank": hit.rank, "used_count": hit.used_count} for hit in hits])
    elif hits:
        print_table(("ID", "STATUS", "USED", "CREATED", "PROMPT"), [_as_line(hit) for hit in hits], numbers=["USED"])
    else:
        tell("No prompt was found.")
    tell_untrained([hit.generation for hit in hits])


def _as_line(hit: SearchHit) -> tuple[object, ...]:
    row = hit.generation
    return row.id, status_of(row), hit.used_count, distance(row.created_at), prompt_in_words(row)


async def _search(words: str, limit: int, filters: Filters, database_url: str | None) -> list[SearchHit]:
    async with opened(database_url) as database:
        return await database.transact(
            lambda session: search_generations(session, words, limit=limit, **filters), read_only=True, may_lag=True
        )
