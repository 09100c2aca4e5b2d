"""``dgx-music worker``, the daemon, and ``dgx-music workers``, who is at work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import typer

from dgx_music.cli.database import opened
from dgx_music.cli.options import AsJson, DatabaseUrl, Output, complete_model, given, setting, warn_of_password
from dgx_music.cli.output import ID_PREFIX_CHARACTERS, distance, print_json, print_table, tell
from dgx_music.client.fleet import pause as pause_claims
from dgx_music.client.fleet import resume as resume_claims
from dgx_music.config import AudioFormat, EngineName, Loudness, load_settings
from dgx_music.early import see_it_through
from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.pauses import get_pauses
from dgx_music.storage.schema import WorkerState
from dgx_music.storage.workers import get_workers

_MODEL, _AUDIO, _TIMING, _SERVER = "Model", "Audio", "Timing", "PostgreSQL"

ModelToPause = Annotated[
    str | None, typer.Option("--model", help="Only this model; default: everything.", autocompletion=complete_model)
]


def worker(
    drain: Annotated[bool, typer.Option("--drain", help="Stop when the queue is empty.")] = False,
    database_url: DatabaseUrl = None,
    model: Annotated[str | None, setting("model", autocompletion=complete_model, rich_help_panel=_MODEL)] = None,
    models: Annotated[str | None, setting("models", rich_help_panel=_MODEL)] = None,
    model_switch_seconds: Annotated[float | None, setting("model_switch_seconds", rich_help_panel=_MODEL)] = None,
    revision: Annotated[str | None, setting("revision", rich_help_panel=_MODEL)] = None,
    engine: Annotated[EngineName | None, setting("engine", rich_help_panel=_MODEL)] = None,
    device: Annotated[str | None, setting("device", rich_help_panel=_MODEL)] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"] | None, setting("dtype", rich_help_panel=_MODEL)
    ] = None,
    weights: Annotated[Literal["full", "int8"] | None, setting("weights", rich_help_panel=_MODEL)] = None,
    kv_cache: Annotated[Literal["full", "fp8"] | None, setting("kv_cache", rich_help_panel=_MODEL)] = None,
    compile_step: Annotated[Literal["auto", "on", "off"] | None, setting("compile", rich_help_panel=_MODEL)] = None,
    slots: Annotated[str | None, setting("slots", metavar="auto|N", rich_help_panel=_MODEL)] = None,
    tenant_limit: Annotated[int | None, setting("tenant_limit")] = None,
    output: Output = None,
    file_access: Annotated[Literal["owner", "umask"] | None, setting("file_access")] = None,
    audio_format: Annotated[AudioFormat | None, setting("audio_format", rich_help_panel=_AUDIO)] = None,
    loudness: Annotated[Loudness | None, setting("loudness", rich_help_panel=_AUDIO)] = None,
    lease_seconds: Annotated[float | None, setting("lease_seconds", rich_help_panel=_TIMING)] = None,
    heartbeat_seconds: Annotated[float | None, setting("heartbeat_seconds", rich_help_panel=_TIMING)] = None,
    poll_seconds: Annotated[float | None, setting("poll_seconds", rich_help_panel=_TIMING)] = None,
    grace_seconds: Annotated[float | None, setting("grace_seconds", rich_help_panel=_TIMING)] = None,
    deadline_floor_seconds: Annotated[float | None, setting("deadline_floor_seconds", rich_help_panel=_TIMING)] = None,
    deadline_factor: Annotated[float | None, setting("deadline_factor", rich_help_panel=_TIMING)] = None,
    backoff_base_seconds: Annotated[float | None, setting("backoff_base_seconds", rich_help_panel=_TIMING)] = None,
    replica_url: Annotated[
        str | None, setting("replica_url", metavar="URL", callback=warn_of_password, rich_help_panel=_SERVER)
    ] = None,
    pool_size: Annotated[int | None, setting("pool_size", rich_help_panel=_SERVER)] = None,
    connect_timeout_seconds: Annotated[
        float | None, setting("connect_timeout_seconds", rich_help_panel=_SERVER)
    ] = None,
    statement_timeout_seconds: Annotated[
        float | None, setting("statement_timeout_seconds", rich_help_panel=_SERVER)
    ] = None,
    command_timeout_seconds: Annotated[
        float | None, setting("command_timeout_seconds", rich_help_panel=_SERVER)
    ] = None,
    idle_transaction_timeout_seconds: Annotated[
        float | None, setting("idle_transaction_timeout_seconds", rich_help_panel=_SERVER)
    ] = None,
    log_level: Annotated[Literal["debug", "info", "warning", "error"] | None, setting("log_level")] = None,
) -> None:
    """Run the daemon that makes the queue's music.

    Every option is also a variable of the environment, named beside it.

    SIGTERM or Ctrl-C (or SIGHUP, SIGQUIT) lets running generations finish within the
    grace, a second one gives them back to the queue at once. Either way the exit code
    is 0.
    """
    settings = load_settings(
        **given(
            database_url=database_url,
            model=model,
            models=models,
            model_switch_seconds=model_switch_seconds,
            revision=revision,
            engine=engine,
            device=device,
            dtype=dtype,
            weights=weights,
            kv_cache=kv_cache,
            compile=compile_step,
            slots=slots,
            tenant_limit=tenant_limit,
            output=output,
            file_access=file_access,
            audio_format=audio_format,
            loudness=loudness,
            lease_seconds=lease_seconds,
            heartbeat_seconds=heartbeat_seconds,
            poll_seconds=poll_seconds,
            grace_seconds=grace_seconds,
            deadline_floor_seconds=deadline_floor_seconds,
            deadline_factor=deadline_factor,
            backoff_base_seconds=backoff_base_seconds,
            replica_url=replica_url,
            pool_size=pool_size,
            connect_timeout_seconds=connect_timeout_seconds,
            statement_timeout_seconds=statement_timeout_seconds,
            command_timeout_seconds=command_timeout_seconds,
            idle_transaction_timeout_seconds=idle_transaction_timeout_seconds,
            log_level=log_level,
        )
    )
    from dgx_music.worker.daemon import configure_logging, run_worker

    configure_logging(settings.log_level)
    asyncio.run(_see_through(run_worker(settings, drain=drain)))


async def _see_through(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    finally:
        see_it_through()


def workers(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the workers: who is alive, where, on what, with what in hand; and for a day who has ended, and why."""
    rows, pauses = asyncio.run(_workers(database_url))
    if as_json:
        print_json(rows)
        return
    if rows:
        headings = ("STATE", "MODEL", "DEVICE", "RUNNING", "HEARD", "HOST", "PID", "WORKER", "IN HAND, OR WHY IT ENDED")
        print_table(headings, [_as_line(row) for row in rows])
    if not any(row["is_alive"] for row in rows):
        tell("No worker is running; start one with: dgx-music worker")
    tell_pauses(pauses)


def pause(model: ModelToPause = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Let no worker claim anything, or anything of one model.

    It holds at once and for every worker; what runs goes on.
    """
    _print_pauses(asyncio.run(_set_pause(pause_claims, model, database_url)), as_json=as_json)


def resume(model: ModelToPause = None, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Let workers claim again: everything, or what one model has waiting."""
    _print_pauses(asyncio.run(_set_pause(resume_claims, model, database_url)), as_json=as_json)


def tell_pauses(pauses: Sequence[Pause]) -> None:
    """Say what is paused, and how to go on."""
    for item in pauses:
        what = "Everything" if item.model_name == ALL_MODELS else item.model_name
        how = "" if item.model_name == ALL_MODELS else f" --model {item.model_name}"
        tell(f"{what} is paused since {distance(item.paused_at)}; go on with: dgx-music resume{how}")


def _print_pauses(pauses: Sequence[Pause], *, as_json: bool) -> None:
    if as_json:
        print_json([item.to_dict() for item in pauses])
        return
    tell_pauses(pauses)
    if not pauses:
        tell("Nothing is paused.")


def _as_line(row: dict[str, Any]) -> tuple[object, ...]:
    others = [name for name in row["models"] if name != row["model_name"]]
    return (
        state_of(row),
        row["model_name"] + (f" (and {', '.join(others)})" if others else ""),
        row["device"],
        f"{len(row['running'])} of {row['slots']}",
        distance(datetime.fromisoformat(row["heartbeat_at"])),
        row["host"],
        row["pid"],
        row["id"],
        row["end_reason"]
        or ", ".join(f"{item['id'][:ID_PREFIX_CHARACTERS]} {item['progress']:.0%}" for item in row["running"]),
    )


def state_of(row: dict[str, Any]) -> str:
    """Return a worker's state in one word: ``alive``, ``loading``, ``silent``, or ``ended``."""
    if row["state"] == WorkerState.ENDED:
        return "ended"
    if not row["is_alive"]:
        return "silent"
    return "loading" if row["state"] == WorkerState.LOADING else "alive"


async def _workers(database_url: str | None) -> tuple[list[dict[str, Any]], list[Pause]]:
    async with opened(database_url) as database, database.session(read_only=True) as session:
        return await get_workers(session), await get_pauses(session)


async def _set_pause(
    change: Callable[[str | None], Awaitable[list[Pause]]], model: str | None, database_url: str | None
) -> list[Pause]:
    async with opened(database_url):
        return await change(model)
