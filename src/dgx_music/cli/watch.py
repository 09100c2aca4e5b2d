"""``dgx-music watch``: follows one generation, or a batch, to its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, Timeout
from dgx_music.cli.output import print_json, tell
from dgx_music.validation import check_positive

if TYPE_CHECKING:
    from dgx_music.storage import Database, Generation
    from dgx_music.storage.batch_progress import BatchProgress

WatchedId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="The id of a generation or a batch, or any part that fits no other one, or a batch's name.",
    ),
]


def watch(
    wanted: WatchedId,
    timeout: Timeout = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Watch a generation or a batch until it is finished.

    Ends with 1 if it, or one of the batch, failed or was cancelled.
    With --json each change is printed as one line of JSON.
    """
    if timeout is not None:
        check_positive("--timeout", timeout)
    if not asyncio.run(_watch(wanted, timeout, database_url, as_json=as_json)):
        raise typer.Exit(1)


async def _watch(
    wanted: str,
    timeout: float | None,
    database_url: str | None,
    *,
    as_json: bool,
) -> bool:
    """Return True if all is completed in the end."""
    from dgx_music.cli.opening import find_generation_or_batch, opened

    async with opened(database_url) as database:
        found = await find_generation_or_batch(database, wanted)
        if isinstance(found, str):
            return await _watch_batch(found, timeout, as_json=as_json)
        return await _watch_generation(database, found, timeout, as_json=as_json)


async def _watch_generation(
    database: Database, generation: Generation, timeout: float | None, *, as_json: bool
) -> bool:
    from dgx_music.cli.progress import follow, tell_outcome
    from dgx_music.cli.service import ServiceTeller

    teller, show = ServiceTeller(database, [generation]), _print_as_line if as_json else None
    rows = await follow([generation.id], timeout=timeout, show=show, teller=teller)
    return rows[0].is_complete if as_json else tell_outcome(rows)


async def _watch_batch(batch_id: str, timeout: float | None, *, as_json: bool) -> bool:
    from dgx_music.cli.batch_progress import follow_batch, of_counts

    show = of_counts(_print_as_line) if as_json else None
    batch = await follow_batch(batch_id, timeout=timeout, show=show)
    completed = batch.counts["completed"]
    if not as_json:
        tell(f"{completed:,} of {batch.total:,} completed.")
    return completed == batch.total


def _print_as_line(state: Generation | BatchProgress) -> None:
    print_json(state.to_dict(), indent=None)
