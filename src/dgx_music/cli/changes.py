"""``dgx-music cancel``, ``retry``, ``delete``, ``star`` and ``tag``: changes of one or of many."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.chosen import Chosen, Question, change_chosen, report
from dgx_music.cli.filter_options import FILTER_OPTIONS, filters_of
from dgx_music.cli.options import AsJson, DatabaseUrl, Output, Yes, given, taking
from dgx_music.cli.output import print_json, tell

if TYPE_CHECKING:
    from dgx_music.storage import Generation
    from dgx_music.storage.bulk import BulkResult

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="ID", help="The generations' ids, or parts of them."),
]
_by_filters = taking(FILTER_OPTIONS, before="yes")


@_by_filters
def cancel(
    ids: Ids = None,
    yes: Yes = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Cancel generations: by their ids, or by filters.

    A generation that waits is cancelled at once. One that runs is cancelled as soon as its worker
    has stopped it. With filters it first says how many it would cancel, and asks; without a
    terminal it then needs --yes.
    """
    from dgx_music.client.bulk import cancel_generations
    from dgx_music.client.generations import cancel_generation

    chosen = Chosen(ids or [], filters_of(options))
    if not chosen.is_one:
        question = Question("cancel", "Cancelled")
        _change(chosen, question, cancel_generations, database_url, yes=yes, as_json=as_json)
        return
    generation = asyncio.run(_change_one(chosen, cancel_generation, database_url))
    if as_json:
        print_json(generation.to_dict())
    elif generation.is_processing:
        tell(f"Generation {generation.id} is running; its worker has been asked to stop it.")
    else:
        tell(f"Generation {generation.id} is {generation.status}.")


@_by_filters
def retry(
    ids: Ids = None,
    yes: Yes = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Put failed or cancelled generations back into the queue: by their ids, or by filters.

    Their failures count from 0 again; their attempts keep counting. A completed generation never
    runs again. With filters it first says how many it would retry, and asks; without a terminal it
    then needs --yes.
    """
    from dgx_music.client.bulk import retry_generations
    from dgx_music.client.generations import retry_generation

    chosen = Chosen(ids or [], filters_of(options))
    if not chosen.is_one:
        question = Question("retry", "Put back into the queue:")
        _change(chosen, question, retry_generations, database_url, yes=yes, as_json=as_json)
        return
    row = asyncio.run(_change_one(chosen, retry_generation, database_url))
    if as_json:
        print_json(row.to_dict())
    else:
        tell(f"Generation {row.id} is {row.status} again; follow it with: dgx-music watch {row.id}")


@_by_filters
def delete(
    ids: Ids = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also what is running: cancel it, and wait until it stops."),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(help="How many seconds to wait for what is running (60).", show_default=False),
    ] = None,
    yes: Yes = False,
    output: Output = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Delete generations with their audio for good: by their ids, or by filters.

    First it says how many it would delete, and asks; without a terminal it needs --yes. The audio
    goes first, then the row: broken off and repeated, it leaves nothing behind. What is running is
    refused without --force. The prompt's text and its count stay in `dgx-music prompts`.
    """
    from dgx_music.artifacts import open_output
    from dgx_music.client.delete import delete_generations
    from dgx_music.config import load_settings

    chosen = Chosen(ids or [], filters_of(options))
    artifacts = open_output(load_settings(**given(output=output)).output)
    work = partial(delete_generations, force=force, artifacts=artifacts, **given(timeout=timeout))
    question = Question("delete", "Deleted", ", audio included", is_asked_for_ids=True)
    _change(chosen, question, work, database_url, yes=yes, as_json=as_json)


@_by_filters
def star(
    ids: Ids = None,
    off: Annotated[bool, typer.Option("--off", help="Take the star away.")] = False,
    yes: Yes = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Give generations a star, or take it away: by their ids, or by filters.

    With filters it first says how many are meant, and asks; without a terminal it then needs --yes.
    """
    from dgx_music.client.bulk import star_generations

    chosen = Chosen(ids or [], filters_of(options))
    work = partial(star_generations, off=off)
    words = ("take the star from", "Took the star from") if off else ("star", "Starred")
    question = Question(*words)
    _change(chosen, question, work, database_url, yes=yes, as_json=as_json)


@_by_filters
def tag(
    ids: Ids = None,
    add: Annotated[
        list[str] | None, typer.Option("--add", help="Add this tag; give it again for more.")
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option("--remove", help="Remove this tag; give it again for more.")
    ] = None,
    yes: Yes = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Add tags to generations, and remove others: by their ids, or by filters.

    With filters it first says how many are meant, and asks; without a terminal it then needs --yes.
    """
    from dgx_music.client.bulk import check_tag_changes, tag_generations

    chosen = Chosen(ids or [], filters_of(options))
    added, removed = check_tag_changes("--add", add or [], "--remove", remove or [])
    work = partial(tag_generations, add=added, remove=removed)
    words = " and ".join(
        f"{verb} {', '.join(tags)}" for verb, tags in (("add", added), ("remove", removed)) if tags
    )
    question = Question(f"change the tags ({words}) of", "Changed the tags of")
    _change(chosen, question, work, database_url, yes=yes, as_json=as_json)


def _change(
    chosen: Chosen,
    question: Question,
    change: Callable[..., Awaitable[BulkResult]],
    database_url: str | None,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    """Change what was chosen, and print what was done."""

    async def work() -> BulkResult:
        from dgx_music.cli.opening import opened

        async with opened(database_url) as database:
            return await change_chosen(database, chosen, question, change, is_agreed=yes)

    chosen.check()
    report(asyncio.run(work()), chosen, question, as_json=as_json)


async def _change_one(
    chosen: Chosen, change: Callable[[str], Awaitable[object]], database_url: str | None
) -> Generation:
    """Change the one generation that is named, and return its row."""
    from dgx_music.cli.opening import find_generation, opened

    chosen.check()
    async with opened(database_url) as database:
        generation = await find_generation(database, chosen.ids[0])
        await change(generation.id)
        return await find_generation(database, generation.id)
