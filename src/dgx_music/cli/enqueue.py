"""``dgx-music enqueue``: prompts in, ids out; with ``--wait`` and ``--out``, audio out."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dgx_music.artifacts import open_place_of
from dgx_music.cli.database import opened
from dgx_music.cli.estimates import in_words
from dgx_music.cli.options import WAITING, AsJson, DatabaseUrl, Timeout, at_home, complete_model, given
from dgx_music.cli.output import print_json, print_line, tell
from dgx_music.cli.progress import describe, follow, tell_outcome, tell_untrained
from dgx_music.cli.prompt_file import parse_object, read_requests
from dgx_music.cli.service import ServiceTeller
from dgx_music.client.enqueue import store
from dgx_music.client.generations import estimate_generation
from dgx_music.client.requests import Batch, plan, read_clips
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError, DgxMusicError, InvalidRequestError
from dgx_music.modes import file_mode
from dgx_music.storage import Database, Generation
from dgx_music.validation import check_positive

_MAX_IDS_ON_TERMINAL = 20
_MUSIC, _QUEUEING = "Music", "Queueing"


def enqueue(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help='Describe the music; "" for unconditional music.')
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="Enqueue every line of a file, all or none: a prompt, or a JSON object with `prompt` and any of the "
            "options below (with _ for -; paths from here). `-` is stdin.",
            callback=at_home,
        ),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option("--duration", "-d", help="Seconds of audio, at most 300; default 10.", rich_help_panel=_MUSIC),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A model's name, or a local folder's absolute path; default DGX_MUSIC_MODEL, else musicgen-small.",
            autocompletion=complete_model,
            rich_help_panel=_MUSIC,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the music must not be like.", rich_help_panel=_MUSIC)
    ] = None,
    continuation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Start with this audio, at most 30 s, and go on; the duration counts from its start.",
            rich_help_panel=_MUSIC,
        ),
    ] = None,
    melody: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Follow the tune of this audio's first 30 s; for musicgen-melody and its like.",
            rich_help_panel=_MUSIC,
        ),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 or 2; default: the model's own, 1 for a local folder.", rich_help_panel=_MUSIC)
    ] = None,
    sample_rate: Annotated[
        int | None,
        typer.Option(
            help="Hz in the file, 8000 to 192000; default: the model's own, 32000 for a local folder.",
            rich_help_panel=_MUSIC,
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="How closely to keep to the prompt, 1 to 20; default 3.", rich_help_panel=_MUSIC),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="How adventurous, 0 to 5; default 1.", rich_help_panel=_MUSIC)
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Choose among so many likeliest tokens, 0 for all; default 250.", rich_help_panel=_MUSIC),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Among those of --top-k, only the likeliest of this total probability; default off. With --top-k 0: among "
            "all tokens, as audiocraft has it.",
            rich_help_panel=_MUSIC,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed makes the same audio; default: from the id.", rich_help_panel=_MUSIC),
    ] = None,
    priority: Annotated[
        int | None,
        typer.Option(
            "--priority",
            "-p",
            help="Higher goes first, a point being worth a minute of waiting; default 0.",
            rich_help_panel=_QUEUEING,
        ),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="For whom: workers may limit each tenant's share.", rich_help_panel=_QUEUEING)
    ] = None,
    run_at: Annotated[
        str | None, typer.Option(help="Not before this time, such as 2026-01-31T12:00:00Z.", rich_help_panel=_QUEUEING)
    ] = None,
    max_attempts: Annotated[
        int | None,
        typer.Option(
            help="Failures that it takes to give up, lost workers included; default 10.", rich_help_panel=_QUEUEING
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="The same request under the same key is enqueued only once.", rich_help_panel=_QUEUEING),
    ] = None,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="An object of your own to keep with it.", rich_help_panel=_QUEUEING),
    ] = None,
    wait: Annotated[
        bool,
        typer.Option(
            "--wait", "-w", help="Wait until it is made; ends with 1 where it was not.", rich_help_panel=WAITING
        ),
    ] = False,
    timeout: Timeout = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Wait, and copy the audio to this file.", callback=at_home, rich_help_panel=WAITING
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Let --out overwrite a file.", rich_help_panel=WAITING)
    ] = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Add a prompt, or a file of prompts, to the queue.

    Prints the ids on stdout.
    """
    options = given(
        duration=duration,
        model=model,
        negative_prompt=negative_prompt,
        continuation=continuation,
        melody=melody,
        channels=channels,
        sample_rate=sample_rate,
        guidance_scale=guidance_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        priority=priority,
        tenant=tenant,
        run_at=run_at,
        max_attempts=max_attempts,
        idempotency_key=idempotency_key,
        metadata=None if metadata is None else parse_object("metadata", metadata, '{"bpm": 140}'),
    )
    batch = _read(prompt, file, options)
    is_waiting = wait or out is not None
    _check_waiting(out, timeout, len(batch.rows), is_waiting=is_waiting, force=force)
    show = partial(_print_json, is_list=file is not None) if as_json else _print_ids
    rows = asyncio.run(_enqueue(batch, database_url, show, is_waiting=is_waiting, timeout=timeout, as_json=as_json))
    if is_waiting and not tell_outcome(rows):
        raise typer.Exit(1)
    if out is not None:
        _copy_audio(rows[0], out, force=force)


def _read(prompt: str | None, file: Path | None, options: dict[str, Any]) -> Batch:
    """Return the checked requests; nothing has been opened or created yet."""
    if file is not None and prompt is None:
        if "idempotency_key" in options:
            raise InvalidRequestError("--idempotency-key", "is for one prompt", "give each line of the file its own")
        return read_requests(file, options)
    if prompt is not None and file is None:
        return read_clips([plan(prompt, options)])
    problem = "is missing" if prompt is None else "and --file are given together"
    raise InvalidRequestError("PROMPT", problem, "describe the music in quotes, or name a file of prompts with --file")


def _check_waiting(out: Path | None, timeout: float | None, count: int, *, is_waiting: bool, force: bool) -> None:
    """Refuse now what would only be noticed when the audio is there."""
    if timeout is not None:
        check_positive("--timeout", timeout)
        if not is_waiting:
            raise InvalidRequestError("--timeout", "is given without --wait", "add --wait, or leave it out")
    if out is None:
        return
    if count > 1:
        raise InvalidRequestError(
            "--out", f"is one file and there are {count:,} prompts", "use --wait and `dgx-music show`"
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        problem = "is a folder" if out.is_dir() else "is in a folder that does not exist"
        raise InvalidRequestError("--out", f"{str(out)!r} {problem}", "name a file in a folder that exists")
    if out.exists() and not force:
        raise InvalidRequestError("--out", f"{str(out)!r} exists already", "choose another name, or add --force")


async def _enqueue(
    batch: Batch,
    database_url: str | None,
    show: Callable[[list[Generation]], None],
    *,
    is_waiting: bool,
    timeout: float | None,
    as_json: bool,
) -> list[Generation]:
    """Enqueue, show it, wait where that is asked for, and return the rows as they are then.

    JSON is shown after a wait, and after one that failed too: what is enqueued must not be lost to who has enqueued it.
    """
    async with opened(database_url) as database:
        rows = await store(batch)
        if not (is_waiting and as_json):
            show(rows)
        try:
            await _advise(database, rows, is_waiting=is_waiting)
            if is_waiting:
                rows = await _follow(database, rows, timeout)
        finally:
            if is_waiting and as_json:
                show(rows)
        return rows


async def _advise(database: Database, rows: list[Generation], *, is_waiting: bool) -> None:
    """Say where the rows stand and who is missing; where that cannot be had they are enqueued all the same."""
    try:
        await _tell_of_queue(rows, is_waiting=is_waiting)
        if not is_waiting:  # who waits is told again and again
            await ServiceTeller(database, rows).tell()
    except DgxMusicError as error:
        tell(f"Enqueued; no more can be said of the queue: {error}")


async def _follow(database: Database, rows: list[Generation], timeout: float | None) -> list[Generation]:
    try:
        return await follow([row.id for row in rows], timeout=timeout, teller=ServiceTeller(database, rows))
    except asyncio.CancelledError:
        tell(f"Stopped waiting, not making; see: dgx-music watch {rows[0].id}")
        raise


def _print_json(rows: list[Generation], *, is_list: bool) -> None:
    print_json([row.to_dict() for row in rows] if is_list else rows[0].to_dict())


def _print_ids(rows: list[Generation]) -> None:
    """Print every id, unless they would flood a terminal."""
    if sys.stdout.isatty() and len(rows) > _MAX_IDS_ON_TERMINAL:
        return
    for row in rows:
        print_line(row.id)
    sys.stdout.flush()  # a script reads the id while we wait for the audio


async def _tell_of_queue(rows: list[Generation], *, is_waiting: bool) -> None:
    tell_untrained(rows)
    if len(rows) > 1:
        tell(f"{len(rows):,} generations enqueued; `dgx-music list` shows them.")
        return
    if rows[0].is_finished:  # an idempotency key's
        tell(f"It was made before: {describe(rows[0])}")
    elif not is_waiting:
        outlook = await estimate_generation(rows[0].id)
        place = (
            f"Enqueued, place {outlook.position:,} in the queue" if outlook.position else "Enqueued before, and running"
        )
        words = ", ".join(part for part in (place, in_words(outlook)) if part)
        tell(f"{words}; follow it with: dgx-music watch {rows[0].id}")


def _copy_audio(row: Generation, out: Path, *, force: bool) -> None:
    source = row.file_path or ""
    try:
        asyncio.run(_copy(source, out, "wb" if force else "xb"))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ArtifactError(f"{source} cannot be copied to {out}: {why}.") from error
    tell(f"Copied to {out}.")
    suffix = Path(source).suffix
    if out.suffix.lower() != suffix:
        tell(f"Note: {out.name} holds {suffix[1:].upper()} audio, whatever its name says.")


async def _copy(source: str, out: Path, mode: Literal["wb", "xb"]) -> None:
    """Copy from wherever the audio is; the file is opened once there is something to write, and never left half-written."""
    chunks = open_place_of(source).stream(source)
    first = await anext(chunks, b"")
    access = file_mode(is_private=load_settings().is_private)
    opener = partial(os.open, mode=access)
    with open(out, mode, opener=opener) as target, _removed_on_failure(out):  # noqa: ASYNC230 - nothing else runs here
        target.write(first)
        async for chunk in chunks:
            target.write(chunk)


@contextmanager
def _removed_on_failure(file: Path) -> Iterator[None]:
    """Leave no half-written file behind; a device or a pipe is not ours to remove."""
    try:
        yield
    except BaseException:
        if file.is_file():
            file.unlink()
        raise
