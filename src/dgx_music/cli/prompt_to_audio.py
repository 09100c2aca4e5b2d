"""How ``dgx-music enqueue`` reads requests, stores them, and waits for them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dgx_music.cli.estimates import in_words
from dgx_music.cli.opening import opened
from dgx_music.cli.output import print_json, print_line, tell, tell_untrained
from dgx_music.cli.progress import describe, follow
from dgx_music.cli.prompt_file import name_of, parse_metadata, read_requests
from dgx_music.cli.service import ServiceTeller
from dgx_music.client.enqueue import store
from dgx_music.client.generations import estimate_generation
from dgx_music.client.requests import CheckedRequests, plan, read_clips
from dgx_music.errors import DgxMusicError, InvalidRequestError
from dgx_music.storage import Database, Generation
from dgx_music.validation import check_positive

_MAX_IDS_ON_TERMINAL = 20


def read(
    prompt: str | None, file: Path | None, batch: str | None, options: dict[str, Any]
) -> CheckedRequests:
    """Return the checked requests of the prompt or of the file; opens and creates nothing else.

    Those of a file are a batch, by default named after the file.
    """
    options = parse_metadata(options)
    if file is not None and prompt is None:
        if "idempotency_key" in options:
            raise InvalidRequestError(
                "--idempotency-key",
                "is for one prompt",
                "give each line of the file its own",
            )
        return read_requests(file, options).in_batch(name_of(file) if batch is None else batch)
    if prompt is not None and file is None:
        checked = read_clips([plan(prompt, options)])
        return checked.in_batch_if_many() if batch is None else checked.in_batch(batch)
    problem = "is missing" if prompt is None else "and --file are given together"
    raise InvalidRequestError(
        "PROMPT",
        problem,
        "describe the music in quotes, or name a file of prompts with --file",
    )


def check_waiting(
    out: Path | None,
    timeout: float | None,
    checked: CheckedRequests,
    *,
    is_waiting: bool,
    force: bool,
) -> None:
    """Refuse now what would otherwise be noticed only when the audio is there."""
    if timeout is not None:
        check_positive("--timeout", timeout)
        if not is_waiting:
            raise InvalidRequestError(
                "--timeout",
                "is given without --wait",
                "add --wait, or leave it out",
            )
    if out is None:
        return
    if (count := len(checked.rows)) > 1:
        raise InvalidRequestError(
            "--out",
            f"is one file and there are {count:,} generations",
            "use --wait, and then `dgx-music get`",
        )
    if out.is_dir() or not out.absolute().parent.is_dir():
        problem = "is a folder" if out.is_dir() else "is in a folder that does not exist"
        raise InvalidRequestError(
            "--out",
            f"{str(out)!r} {problem}",
            "name a file in a folder that exists",
        )
    if out.exists() and not force:
        raise InvalidRequestError(
            "--out",
            f"{str(out)!r} exists already",
            "choose another name, or add --force",
        )
    from dgx_music.cli.audio_copy import check_holds

    check_holds(out, checked.rows[0]["sample_rate"])


async def enqueue(
    checked: CheckedRequests,
    database_url: str | None,
    show: Callable[[list[Generation]], None],
    *,
    is_waiting: bool,
    timeout: float | None,
    as_json: bool,
) -> list[Generation]:
    """Enqueue, show the rows, wait if asked to, and return the rows as they are then.

    JSON is shown after the wait, also if that fails: the caller must not lose what it has enqueued.
    """
    async with opened(database_url) as database:
        rows = await store(checked)
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
    """Say where the rows stand and which workers are missing.

    The rows are stored already, so an error of the database is printed and not raised.
    """
    try:
        await _tell_of_queue(rows, is_waiting=is_waiting)
        if not is_waiting:  # while waiting, it is said after each change
            await ServiceTeller(database, rows).tell()
    except DgxMusicError as error:
        tell(f"Enqueued; no more can be said of the queue: {error}")


async def _follow(
    database: Database,
    rows: list[Generation],
    timeout: float | None,
) -> list[Generation]:
    try:
        return await follow(
            [row.id for row in rows], timeout=timeout, teller=ServiceTeller(database, rows)
        )
    except asyncio.CancelledError:
        tell(f"Stopped waiting, not making; see: {how_to_follow(rows)}")
        raise


def show_json(rows: list[Generation], *, is_list: bool) -> None:
    """Print the rows as a list, or the only one."""
    print_json([row.to_dict() for row in rows] if is_list else rows[0].to_dict())


def show_ids(rows: list[Generation]) -> None:
    """Print each id, unless there are too many for a terminal."""
    if sys.stdout.isatty() and len(rows) > _MAX_IDS_ON_TERMINAL:
        return
    for row in rows:
        print_line(row.id)
    sys.stdout.flush()  # a script reads the id while we wait for the audio


async def _tell_of_queue(rows: list[Generation], *, is_waiting: bool) -> None:
    tell_untrained(rows)
    if len(rows) > 1:
        tell(f"{len(rows):,} generations enqueued; follow them with: {how_to_follow(rows)}")
    elif rows[0].is_finished:  # the row of an idempotency key
        tell(f"It was made before: {describe(rows[0])}")
    elif not is_waiting:
        tell(f"{await _place_in_words(rows[0])}; follow it with: {how_to_follow(rows)}")


def how_to_follow(rows: list[Generation]) -> str:
    """Return the command that watches the only one, or the batch that all are in."""
    if len(rows) == 1:
        return f"dgx-music watch {rows[0].id}"
    batch_id, *others = {row.batch_id for row in rows}
    return "dgx-music list" if others or batch_id is None else f"dgx-music watch {batch_id}"


async def _place_in_words(row: Generation) -> str:
    outlook = await estimate_generation(row.id)
    at = "Enqueued before, and running" if row.is_processing else "Enqueued"
    if outlook.position:
        at = f"Enqueued, place {outlook.position:,} in the queue"
    return ", ".join(part for part in (at, in_words(outlook)) if part)
