"""``dgx-music title`` and ``note``: what a person says about a generation."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, GenerationId
from dgx_music.cli.output import print_json, tell

if TYPE_CHECKING:
    from dgx_music.storage import Generation

Text = Annotated[
    list[str], typer.Argument(metavar="TEXT...", help='What to say; "" takes it away.')
]


def title(
    generation_id: GenerationId,
    text: Text,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Give a generation a title.

    Search finds its words, and list shows it before the prompt.
    """
    row = asyncio.run(_label(generation_id, "title", " ".join(text), database_url))
    if as_json:
        print_json(row.to_dict())
    else:
        what = f"is called {row.title!r}" if row.title else "has no title"
        tell(f"Generation {row.id} {what} now.")


def note(
    generation_id: GenerationId,
    text: Text,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Keep a note with a generation.

    It replaces an earlier one. Search finds its words.
    """
    row = asyncio.run(_label(generation_id, "notes", " ".join(text), database_url))
    if as_json:
        print_json(row.to_dict())
    else:
        tell(f"Generation {row.id} has {'these' if row.notes else 'no'} notes now.")


async def _label(wanted: str, name: str, text: str, database_url: str | None) -> Generation:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.client.labels import label_generation

    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        return await label_generation(generation.id, **{name: text or None})  # type: ignore[arg-type]
