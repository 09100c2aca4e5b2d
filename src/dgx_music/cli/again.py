"""``dgx-music again`` and ``continue``: new generations from one that is there."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, GenerationId, given, taking
from dgx_music.cli.output import print_json, tell
from dgx_music.cli.request_options import CHANGE_OPTIONS
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import shown

if TYPE_CHECKING:
    from dgx_music.client.again import Continuation
    from dgx_music.storage import Generation

_CHANGES_BUT_START = {
    name: option
    for name, option in CHANGE_OPTIONS.items()
    if name not in ("duration", "continuation")
}
Seed = Annotated[
    str | None,
    typer.Option(metavar="new|same|N", help="Of the first one; the next ones follow; default new."),
]
Count = Annotated[int, typer.Option("--count", help="How many, at most 16; several are a batch.")]
NewPrompt = Annotated[str | None, typer.Option("--prompt", help="Another prompt.")]
LongerThanClip = Annotated[
    float,
    typer.Option(
        "--duration", "-d", help="Seconds of audio, at most 300, with what it starts with."
    ),
]


@taking(CHANGE_OPTIONS, before="database_url")
def again(
    generation_id: GenerationId,
    seed: Seed = None,
    count: Count = 1,
    prompt: NewPrompt = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Make a generation again, with another seed or other options.

    What is not given is as it was. Not repeated are priority, start, attempts, title, notes, tags
    and star; the seed is new unless --seed says otherwise. Prints the new ids on stdout;
    `dgx-music show` says which one they were made from.
    """
    changes = _changes(seed, prompt, options)
    rows = asyncio.run(_again(generation_id, count, changes, database_url))
    _print(rows, as_json=as_json)


@taking(_CHANGES_BUT_START, before="database_url")
def continue_(
    generation_id: GenerationId,
    duration: LongerThanClip,
    seed: Seed = None,
    count: Count = 1,
    prompt: NewPrompt = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Make music that goes on from a completed generation.

    It starts with the last 30 s of that audio, or with all of it if it is not longer. What is not
    given is as it was. Not repeated are priority, start, attempts, title, notes, tags and star; the
    seed is new unless --seed says otherwise. Prints the new ids on stdout.
    """
    changes = _changes(seed, prompt, options) | {"duration": duration}
    made = asyncio.run(_continue(generation_id, count, changes, database_url))
    if as_json:
        print_json(made.to_dict())
        return
    _print(made.generations, as_json=False)
    whole = f"{made.parent_seconds:g} s of the audio"
    what = f"the last {made.clip_seconds:g} of the {whole}" if made.is_cut else f"all {whole}"
    tell(f"It starts with {what}; its {duration:g} s count from there.")


def _changes(seed: str | None, prompt: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from dgx_music.cli.prompt_file import parse_metadata

    return parse_metadata(given(prompt=prompt, seed=_seed(seed), **options))


def _seed(text: str | None) -> str | int | None:
    if text in (None, "new", "same"):
        return text
    try:
        return int(str(text))
    except ValueError:
        problem = f"is {shown(text)}"
        raise InvalidRequestError("--seed", problem, "use new, same, or a whole number") from None


def _print(rows: list[Generation], *, as_json: bool) -> None:
    from dgx_music.cli.prompt_to_audio import how_to_follow, show_ids

    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    show_ids(rows)
    tell(f"Enqueued; follow {'it' if len(rows) == 1 else 'them'} with: {how_to_follow(rows)}")


async def _again(
    wanted: str, count: int, changes: dict[str, Any], database_url: str | None
) -> list[Generation]:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.client.again import again_generation

    async with opened(database_url) as database:
        parent = await find_generation(database, wanted)
        return await again_generation(parent.id, count=count, **changes)


async def _continue(
    wanted: str, count: int, changes: dict[str, Any], database_url: str | None
) -> Continuation:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.client.again import continue_generation

    async with opened(database_url) as database:
        parent = await find_generation(database, wanted)
        return await continue_generation(parent.id, count=count, **changes)
