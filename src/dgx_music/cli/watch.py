"""``dgx-music watch``: follows one generation to its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, GenerationId, Timeout
from dgx_music.cli.output import print_json
from dgx_music.validation import check_positive

if TYPE_CHECKING:
    from dgx_music.storage import Generation


def watch(
    generation_id: GenerationId,
    timeout: Timeout = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Watch a generation until it is finished.

    Ends with 1 if it failed or was cancelled.
    With --json each change of the row is printed as one line of JSON.
    """
    from dgx_music.cli.progress import tell_outcome

    if timeout is not None:
        check_positive("--timeout", timeout)
    generation = asyncio.run(_watch(generation_id, timeout, database_url, as_json=as_json))
    is_completed = generation.is_complete if as_json else tell_outcome([generation])
    if not is_completed:
        raise typer.Exit(1)


async def _watch(
    wanted: str,
    timeout: float | None,
    database_url: str | None,
    *,
    as_json: bool,
) -> Generation:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.cli.progress import follow
    from dgx_music.cli.service import ServiceTeller

    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        teller, show = ServiceTeller(database, [generation]), _print_as_line if as_json else None
        return (await follow([generation.id], timeout=timeout, show=show, teller=teller))[0]


def _print_as_line(row: Generation) -> None:
    print_json(row.to_dict(), indent=None)
