"""``dgx-music enqueue``: prompts in, ids out; with ``--wait`` and ``--out``, audio out."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dgx_music.cli.options import WAITING, AsJson, DatabaseUrl, Timeout, at_home, given, taking
from dgx_music.cli.request_options import REQUEST_OPTIONS

Prompt = Annotated[
    str | None,
    typer.Argument(metavar="PROMPT", help='Describe the music; "" for unconditional music.'),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        "-f",
        help="Enqueue every line of a file, all or none: a prompt, or a JSON object with `prompt` and any of "
        "the options below (with _ for -; paths from here). `-` is stdin. A line that begins with # and a "
        "space is a comment. The generations are a batch.",
        callback=at_home,
    ),
]
BatchName = Annotated[
    str | None,
    typer.Option("--batch", help="The name of their batch; default: that of the file."),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        "-w",
        help="Wait until it is made; ends with 1 if it was not.",
        rich_help_panel=WAITING,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Wait, and write the audio to this file; the suffix of a format converts it.",
        callback=at_home,
        rich_help_panel=WAITING,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Let --out overwrite a file.", rich_help_panel=WAITING)
]


@taking(REQUEST_OPTIONS, before="wait")
def enqueue(
    prompt: Prompt = None,
    file: PromptFile = None,
    batch: BatchName = None,
    wait: Wait = False,
    timeout: Timeout = None,
    out: Out = None,
    force: Force = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
    **options: Any,
) -> None:
    """Add a prompt, or a file of prompts, to the queue.

    Prints the ids on stdout. A file of prompts, and the takes of --variations, are a batch:
    `dgx-music watch BATCH` shows how far it is.
    """
    from dgx_music.cli import prompt_to_audio
    from dgx_music.cli.progress import tell_outcome

    checked = prompt_to_audio.read(prompt, file, batch, given(**options))
    is_waiting = wait or out is not None
    prompt_to_audio.check_waiting(out, timeout, checked, is_waiting=is_waiting, force=force)
    show = (
        partial(prompt_to_audio.show_json, is_list=file is not None or len(checked.rows) > 1)
        if as_json
        else prompt_to_audio.show_ids
    )
    work = prompt_to_audio.enqueue(
        checked, database_url, show, is_waiting=is_waiting, timeout=timeout, as_json=as_json
    )
    rows = asyncio.run(work)
    if is_waiting and not tell_outcome(rows):
        raise typer.Exit(1)
    if out is not None:
        from dgx_music.cli.audio_copy import copy_audio

        copy_audio(rows[0], out, force=force)
