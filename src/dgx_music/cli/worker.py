"""``dgx-music worker``, the daemon, and ``dgx-music workers``, who is at work."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Annotated, Any, Literal

import typer

from dgx_music.cli.database import opened
from dgx_music.cli.options import AsJson, DatabaseUrl, Output, complete_model, given, setting
from dgx_music.cli.output import distance, print_json, print_table, tell
from dgx_music.config import AudioFormat, EngineName, Loudness, load_settings
from dgx_music.storage.workers import get_workers

_MODEL, _AUDIO, _TIMING = "Model", "Audio", "Timing"


def worker(
    drain: Annotated[bool, typer.Option("--drain", help="Stop when the queue is empty.")] = False,
    database_url: DatabaseUrl = None,
    model: Annotated[str | None, setting("model", autocompletion=complete_model, rich_help_panel=_MODEL)] = None,
    revision: Annotated[str | None, setting("revision", rich_help_panel=_MODEL)] = None,
    engine: Annotated[EngineName | None, setting("engine", rich_help_panel=_MODEL)] = None,
    device: Annotated[str | None, setting("device", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, setting("dtype", rich_help_panel=_MODEL)
    ] = None,
    slots: Annotated[int | None, setting("slots", rich_help_panel=_MODEL)] = None,
    output: Output = None,
    audio_format: Annotated[AudioFormat | None, setting("audio_format", rich_help_panel=_AUDIO)] = None,
    loudness: Annotated[Loudness | None, setting("loudness", rich_help_panel=_AUDIO)] = None,
    lease_seconds: Annotated[float | None, setting("lease_seconds", rich_help_panel=_TIMING)] = None,
    heartbeat_seconds: Annotated[float | None, setting("heartbeat_seconds", rich_help_panel=_TIMING)] = None,
    poll_seconds: Annotated[float | None, setting("poll_seconds", rich_help_panel=_TIMING)] = None,
    grace_seconds: Annotated[float | None, setting("grace_seconds", rich_help_panel=_TIMING)] = None,
    deadline_floor_seconds: Annotated[float | None, setting("deadline_floor_seconds", rich_help_panel=_TIMING)] = None,
    deadline_factor: Annotated[float | None, setting("deadline_factor", rich_help_panel=_TIMING)] = None,
    backoff_base_seconds: Annotated[float | None, setting("backoff_base_seconds", rich_help_panel=_TIMING)] = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"] | None, setting("log_level")] = None,
) -> None:
    """Run the daemon that makes the queue's music.

    Every option is also a variable of the environment, named beside it.

    SIGTERM or Ctrl-C lets running generations finish within the grace, a second one
    gives them back to the queue at once. Either way the exit code is 0.
    """
    settings = load_settings(
        **given(
            database_url=database_url,
            model=model,
            revision=revision,
            engine=engine,
            device=device,
            dtype=dtype,
            slots=slots,
            output=output,
            audio_format=audio_format,
            loudness=loudness,
            lease_seconds=lease_seconds,
            heartbeat_seconds=heartbeat_seconds,
            poll_seconds=poll_seconds,
            grace_seconds=grace_seconds,
            deadline_floor_seconds=deadline_floor_seconds,
            deadline_factor=deadline_factor,
            backoff_base_seconds=backoff_base_seconds,
            log_level=log_level,
        )
    )
    from dgx_music.daemon import configure_logging, run_worker

    configure_logging(settings.log_level)
    asyncio.run(run_worker(settings, drain=drain))


def workers(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the workers, and when each was last heard of."""
    rows = asyncio.run(_workers(database_url))
    if as_json:
        print_json(rows)
    elif rows:
        print_table(
            ("STATE", "MODEL", "DEVICE", "RUNNING", "HEARD", "HOST", "PID", "WORKER"), [_as_line(row) for row in rows]
        )
    else:
        tell("No worker is running; start one with: dgx-music worker")


def _as_line(row: dict[str, Any]) -> tuple[object, ...]:
    return (
        "alive" if row["is_alive"] else "silent",
        row["model_name"],
        row["device"],
        f"{row['running_count']} of {row['slots']}",
        distance(datetime.fromisoformat(row["heartbeat_at"])),
        row["host"],
        row["pid"],
        row["id"],
    )


async def _workers(database_url: str | None) -> list[dict[str, Any]]:
    async with opened(database_url) as database, database.session(read_only=True) as session:
        return await get_workers(session)
