"""``dgx-music workers``, ``pause`` and ``resume``: who is at work, and on what nobody may work."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, complete_model
from dgx_music.cli.output import distance, end_of_id, print_json, print_table, tell

if TYPE_CHECKING:
    from dgx_music.storage import Pause

_HEADINGS = (
    *("STATE", "MODEL", "DEVICE", "RUNNING", "HEARD", "HOST", "PID", "WORKER"),
    "IN HAND, OR WHY IT ENDED",
)
_EVERYTHING = "everything"
_NEW = timedelta(seconds=5)
ModelToPause = Annotated[
    str | None,
    typer.Option(
        "--model", help="Only this model; default: everything.", autocompletion=complete_model
    ),
]


def workers(database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """List the workers: which are alive, on which host and device, and what they run.

    A worker that has ended is listed for a day, with the reason.
    """
    rows, pauses = asyncio.run(_workers(database_url))
    if as_json:
        print_json(rows)
        return
    if rows:
        print_table(_HEADINGS, [_as_line(row) for row in rows])
    if not any(row["is_alive"] for row in rows):
        tell("No worker is running; start one with: dgx-music worker")
    tell_pauses(pauses)


def pause(
    model: ModelToPause = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Let no worker claim anything, or anything of one model.

    It takes effect at once and for every worker; what runs goes on.
    """
    _print_pauses(asyncio.run(_pause(model, database_url)), as_json=as_json)


def resume(
    model: ModelToPause = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Let workers claim again: everything, or what one model has waiting."""
    before, pauses = asyncio.run(_resume(model, database_url))
    if not as_json:
        left = {item.model_name for item in pauses}
        for item in before:
            if item.model_name not in left:
                tell(f"Resumed: {_paused_in_words(item)}.")
    _print_pauses(pauses, as_json=as_json)


def tell_pauses(pauses: Sequence[Pause]) -> None:
    """Say what is paused, and how to resume it."""
    for item in pauses:
        what = _paused_in_words(item)
        how = f" --model {what}"
        if what == _EVERYTHING:
            what, how = what.capitalize(), ""
        is_new = datetime.now(UTC) - item.paused_at < _NEW
        state = "is paused now" if is_new else f"was paused {distance(item.paused_at)}"
        tell(f"{what} {state}; go on with: dgx-music resume{how}")


def _paused_in_words(item: Pause) -> str:
    from dgx_music.storage.models import ALL_MODELS

    return _EVERYTHING if item.model_name == ALL_MODELS else item.model_name


def _print_pauses(pauses: Sequence[Pause], *, as_json: bool) -> None:
    if as_json:
        print_json([item.to_dict() for item in pauses])
        return
    tell_pauses(pauses)
    if not pauses:
        tell("Nothing is paused.")


def _as_line(row: dict[str, Any]) -> tuple[object, ...]:
    others = [name for name in row["models"] if name != row["model_name"]]
    running = (f"{end_of_id(item['id'])} {item['progress']:.0%}" for item in row["running"])
    return (
        state_of(row),
        row["model_name"] + (f" (and {', '.join(others)})" if others else ""),
        row["device"],
        f"{len(row['running'])} of {row['slots']}",
        distance(datetime.fromisoformat(row["heartbeat_at"])),
        row["host"],
        row["pid"],
        row["id"],
        row["end_reason"] or ", ".join(running),
    )


def state_of(row: dict[str, Any]) -> str:
    """Return a worker's state in one word: ``alive``, ``loading``, ``silent``, or ``ended``."""
    from dgx_music.statuses import WorkerState

    if row["state"] == WorkerState.ENDED:
        return "ended"
    if not row["is_alive"]:
        return "silent"
    return "loading" if row["state"] == WorkerState.LOADING else "alive"


async def _workers(database_url: str | None) -> tuple[list[dict[str, Any]], list[Pause]]:
    from dgx_music.cli.opening import opened
    from dgx_music.storage.pauses import get_pauses
    from dgx_music.storage.workers import get_workers

    async with opened(database_url) as database, database.session(read_only=True) as session:
        return await get_workers(session), await get_pauses(session)


async def _pause(model: str | None, database_url: str | None) -> list[Pause]:
    from dgx_music.cli.opening import opened
    from dgx_music.client.fleet import pause

    async with opened(database_url):
        return await pause(model)


async def _resume(model: str | None, database_url: str | None) -> tuple[list[Pause], list[Pause]]:
    """Return the pauses before and after."""
    from dgx_music.cli.opening import opened
    from dgx_music.client.fleet import resume
    from dgx_music.storage.pauses import get_pauses

    async with opened(database_url) as database:
        before = await database.transact(get_pauses)
        return before, await resume(model)
