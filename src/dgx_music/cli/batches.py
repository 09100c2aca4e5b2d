"""``dgx-music batches``: what was enqueued together, and how far it is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, Limit
from dgx_music.cli.output import distance, print_json, print_table, tell

if TYPE_CHECKING:
    from dgx_music.storage.batch_progress import BatchPage


def batches(
    limit: Limit = 20,
    after: Annotated[
        str | None,
        typer.Option(
            metavar="CURSOR", help="Start after this one, which the previous page printed."
        ),
    ] = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    as_page: Annotated[
        bool,
        typer.Option(
            "--page", help="Print a JSON object: `batches`, and the cursor `next` or null."
        ),
    ] = False,
) -> None:
    """List batches, newest first, and how far each is.

    A file of prompts and the takes of a request are a batch. `dgx-music watch` follows one.
    """
    from dgx_music.cli.batch_progress import in_words

    page = asyncio.run(_read(limit, after, database_url))
    if as_page:
        print_json(page.to_dict(), indent=None)
    elif as_json:
        print_json([batch.to_dict() for batch in page.batches])
    elif page.batches:
        lines = [
            (each.id, distance(each.created_at), in_words(each), each.name or "")
            for each in page.batches
        ]
        print_table(("ID", "CREATED", "FINISHED", "NAME"), lines)
    elif after is None and limit:
        tell("There are no batches yet; make one with: dgx-music enqueue --file prompts.txt")
    if page.next is not None:
        tell(f"{len(page.batches):,}; the next ones: --after {page.next}")


async def _read(limit: int, after: str | None, database_url: str | None) -> BatchPage:
    from dgx_music.cli.opening import opened
    from dgx_music.client.batches import list_batches

    async with opened(database_url):
        return await list_batches(limit=limit, after=after)
