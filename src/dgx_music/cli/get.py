"""``dgx-music get``: the audio of finished generations, as files with names of their own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.chosen import Chosen
from dgx_music.cli.filter_options import FILTER_OPTIONS, filters_of
from dgx_music.cli.options import AsJson, DatabaseUrl, taking
from dgx_music.cli.output import fail, near, print_json, print_line, tell, tell_untrained_models
from dgx_music.errors import DgxMusicError, InvalidRequestError
from dgx_music.statuses import COMPLETED
from dgx_music.validation import AudioFormat, at_home

if TYPE_CHECKING:
    from dgx_music.client.audio_out import Saved, Saving
    from dgx_music.storage import Database, Filters

_STDOUT = "-"

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", help="The generations' ids, or parts of them."),
]
Out = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        metavar="PATTERN",
        help="A folder that exists, or a name with {title}, {prompt}, {bpm}, {key}, {seed}, {take}, "
        "{id}, {short_id}, {date}, {model}; with the suffix of a format it converts. `-` is stdout. "
        "Default: {title}_take{take}_{key}_{bpm}bpm_{short_id}, here.",
        show_default=False,
    ),
]
Format = Annotated[
    AudioFormat | None,
    typer.Option(
        "--audio-format", "--format", help="Convert to this format; default: as it is stored."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there.")]


@dataclass
class _Outcome:
    """What became of each generation that was asked for."""

    saved: dict[str, Saved] = field(default_factory=dict)
    """The files, by the ids of their generations."""
    models: set[str] = field(default_factory=set)
    """The models that made them."""
    refused: dict[str, DgxMusicError] = field(default_factory=dict)
    """Why there is no file, by what was asked for."""
    without_audio: int = 0
    """How many fit the filters and are not completed."""


@taking(FILTER_OPTIONS, before="out")
def get(
    ids: Ids = None,
    out: Out = ".",
    audio_format: Format = None,
    force: Force = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Save the audio of generations to files: by their ids, or by filters such as --batch.

    A name says what the file is, and is safe on every file system. Placeholders without a value
    leave nothing behind, and files that would have the same name are numbered. Prints the paths on
    stdout.

    If some are refused, the others are saved all the same; the exit code is that of the first
    refusal. With filters, what is not completed is left out and counted.
    """
    wanted, filters = ids or [], filters_of(options)
    Chosen(wanted, filters).check()
    if out == _STDOUT:
        _check_stdout(wanted, is_json=as_json)
        asyncio.run(_write_to_stdout(wanted[0], audio_format, database_url))
        return
    from dgx_music.client.audio_out import Saving

    saving = Saving(at_home("--out", out), audio_format=audio_format, force=force, field="--out")
    outcome = _Outcome()
    try:
        asyncio.run(_save_all(wanted, filters, saving, database_url, outcome))
    finally:
        _show(outcome, as_json=as_json)
    if not (outcome.saved or outcome.refused or outcome.without_audio):
        tell("There are no such generations.")
    if outcome.refused:
        raise typer.Exit(_tell_refused(outcome))


def _check_stdout(ids: list[str], *, is_json: bool) -> None:
    """Refuse what stdout cannot take."""
    if len(ids) != 1:
        raise InvalidRequestError("--out", "is stdout", "give one id, or a folder")
    if is_json:
        raise InvalidRequestError(
            "--json", "is given, and the audio goes to stdout", "leave it out"
        )
    if sys.stdout.isatty():
        problem = "is stdout, which is a terminal"
        raise InvalidRequestError("--out", problem, "send it to a file or to a player")


async def _write_to_stdout(
    wanted: str, audio_format: AudioFormat | None, database_url: str | None
) -> None:
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.client.content import check_convertible, content_of, path_of

    async with opened(database_url) as database:
        row = await find_generation(database, wanted)
    path_of(row)
    if audio_format is not None:
        check_convertible(row, audio_format)
    async for chunk in content_of(row, audio_format):
        sys.stdout.buffer.write(chunk)
    sys.stdout.buffer.flush()
    tell_untrained_models([row.model_name])


async def _save_all(
    ids: list[str],
    filters: Filters,
    saving: Saving,
    database_url: str | None,
    outcome: _Outcome,
) -> None:
    from dgx_music.cli.opening import opened

    async with opened(database_url) as database:
        if filters:
            ids = await _choose(database, filters, outcome)
        with _bar(len(ids)) as step:
            for wanted in dict.fromkeys(ids):
                try:
                    await _save(database, wanted, saving, outcome)
                except DgxMusicError as error:
                    outcome.refused[wanted] = error
                step()


async def _choose(database: Database, filters: Filters, outcome: _Outcome) -> list[str]:
    """Return the ids of the completed generations that fit the filters, oldest first."""
    from dgx_music.cli.filter_options import find_filters
    from dgx_music.client.bulk import choose

    filters = await find_filters(database, filters)
    fitting = await choose(None, None, None, filters)
    made = await choose(None, None, None, {**filters, "status": COMPLETED})
    chosen = sorted({*made} & {*fitting})
    outcome.without_audio = len(fitting) - len(chosen)
    return chosen


async def _save(database: Database, wanted: str, saving: Saving, outcome: _Outcome) -> None:
    from dgx_music.cli.opening import find_generation

    row = await find_generation(database, wanted)
    if row.id not in outcome.saved:
        outcome.saved[row.id] = await saving.save(row)
        outcome.models.add(row.model_name)


@contextmanager
def _bar(count: int) -> Iterator[Callable[[], object]]:
    """Give the function to call after each file; on a terminal it moves a bar."""
    if count < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from dgx_music.cli.output import make_console

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=make_console(sys.stderr), transient=True) as progress:
        bar = progress.add_task("files", total=count)
        yield lambda: progress.advance(bar)


def _show(outcome: _Outcome, *, as_json: bool) -> None:
    if as_json:
        print_json(_as_json(outcome))
    else:
        for saved in outcome.saved.values():
            print_line(near(str(saved.path)))
    if outcome.without_audio:
        tell(f"{outcome.without_audio:,} more are not completed, so they have no audio.")
    tell_untrained_models(outcome.models)


def _as_json(outcome: _Outcome) -> dict[str, Any]:
    return {
        "saved": [
            {
                "id": generation_id,
                "path": str(saved.path),
                "audio_format": saved.audio_format,
                "size_bytes": saved.size_bytes,
            }
            for generation_id, saved in outcome.saved.items()
        ],
        "refused": [
            {"id": wanted, "error": str(error)} for wanted, error in outcome.refused.items()
        ],
        "without_audio": outcome.without_audio,
    }


def _tell_refused(outcome: _Outcome) -> int:
    """Say what was refused and why; return the exit code of the first one."""
    is_alone = len(outcome.refused) + len(outcome.saved) == 1
    for wanted, error in outcome.refused.items():
        is_said = is_alone or wanted in str(error)
        fail(str(error) if is_said else f"{wanted}: {error}", error.exit_code)
    if not is_alone:
        count = len(outcome.refused) + len(outcome.saved)
        tell(f"{len(outcome.saved):,} of {count:,} saved.")
    return next(iter(outcome.refused.values())).exit_code
