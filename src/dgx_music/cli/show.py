"""``dgx-music show``: all that is known of one generation."""

from __future__ import annotations

import asyncio
import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, GenerationId
from dgx_music.cli.output import (
    UNCONDITIONAL,
    distance,
    in_order,
    label,
    print_fields,
    print_json,
    print_line,
    print_table,
    print_waveform,
    shown,
    tell_untrained,
)

if TYPE_CHECKING:
    from dgx_music.artifacts import FileState
    from dgx_music.storage import Family, Generation
    from dgx_music.storage.estimates import Estimate


_FIRST = ("id", "title", "prompt", "notes", "tags", "starred")


class _Known(NamedTuple):
    """All that is known of one generation."""

    generation: Generation
    attempts: list[dict[str, Any]]
    estimate: Estimate
    clips: dict[str, str]
    """What was given as ``continuation`` or ``melody``, in words."""
    file: FileState
    family: Family


def show(
    generation_id: GenerationId,
    play: Annotated[
        bool, typer.Option("--play", help="Play it too: by ffplay, mpv, aplay or afplay.")
    ] = False,
    waveform: Annotated[
        bool, typer.Option("--waveform", help="With --json: keep the waveform, about 7 kB.")
    ] = False,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show all of one generation: fields, labels, attempts, waveform.

    While it waits or runs, it also shows when it will start and be done, as far as that is known.
    With --json that is `estimate`: `starts_in_seconds` and `done_in_seconds` are null or have a
    `low` and a `high`, which about 8 of 10 generations keep to, and `unknown_because` says why they
    are null. `file_is_missing` is null if there is no file yet, or if it cannot be seen from here;
    `file_is_damaged` says whether its size has changed, and is null in the same cases. `family` has
    the generation that it was made from, and those that were made from it.
    """
    known = asyncio.run(_read(generation_id, database_url))
    if as_json:
        print_json(_as_json(known, with_waveform=waveform))
    else:
        _print(known)
    if play:
        from dgx_music.cli import play as player

        player.play(known.generation)


def _print(known: _Known) -> None:
    print_fields(_lines(known))
    print_waveform(known.generation)
    _print_attempts(known.attempts)
    tell_untrained([known.generation])
    sys.stdout.flush()  # before somebody listens to it


def _as_json(known: _Known, *, with_waveform: bool) -> dict[str, Any]:
    file, outlook = known.file, known.estimate
    states = {"file_is_missing": file.is_missing, "file_is_damaged": file.is_damaged}
    more = {
        "attempts": known.attempts,
        "queue_position": outlook.position,
        "estimate": outlook.to_dict(),
        "family": known.family.to_dict(),
    }
    row = known.generation.to_dict(with_waveform=with_waveform)
    return {**row, **states, **more}


def _lines(known: _Known) -> list[tuple[str, str]]:
    """Return names and values to print: the row, its file, its place, its audio, its metadata."""
    now = datetime.now(UTC)
    metadata = known.generation.get_metadata()
    facts = _audio_facts(metadata.pop("audio", {}))
    return [
        *((label(name), shown(name, value, now)) for name, value in _fields(known).items()),
        *_family_lines(known.family),
        *_file_lines(known.file),
        *_queue_lines(known),
        *((f"audio {label(name)}", shown(name, value, now)) for name, value in facts.items()),
        *((name, json.dumps(value, ensure_ascii=False)) for name, value in metadata.items()),
    ]


def _fields(known: _Known) -> dict[str, Any]:
    """Return the row's fields that are worth a line, with clips in words instead of hashes."""
    row = known.generation
    told = row.to_dict() | {"prompt": row.prompt or UNCONDITIONAL}
    told |= {"starred": row.is_starred or None, "parent_id": None}
    told |= {"negative_prompt": (row.sampling or {}).get("negative_prompt")}
    for name, text in known.clips.items():
        told |= {f"{name}_sha256": None, name: text}
    told = {name: told[name] for name in _FIRST} | told
    return {name: value for name, value in told.items() if value is not None and name != "metadata"}


def _family_lines(family: Family) -> list[tuple[str, str]]:
    lines = [("child", _relative(child)) for child in family.children]
    if family.is_parent_deleted:
        lines.insert(0, ("parent", f"{family.parent_id} (deleted)"))
    elif family.parent is not None:
        lines.insert(0, ("parent", _relative(family.parent)))
    return lines


def _relative(row: Generation) -> str:
    seed = (row.sampling or {}).get("seed")
    told = [row.status, f"{row.duration_seconds:g} s", *([] if seed is None else [f"seed {seed}"])]
    return f"{row.id} ({', '.join(told)})"


def _file_lines(file: FileState) -> list[tuple[str, str]]:
    lines = []
    if file.is_missing:
        lines.append(("file", "missing: it was deleted or moved since, or its disk is not there"))
    if file.is_damaged:
        lines.append(("file", f"damaged: the file {file.damage}"))
    return lines


def _queue_lines(known: _Known) -> list[tuple[str, str]]:
    from dgx_music.cli.estimates import in_words

    row, lines = known.generation, []
    if known.estimate.position is not None:
        lines.append(("queue position", f"{known.estimate.position:,}"))
    if words := in_words(known.estimate):
        lines.append(("estimate", words))
    if row.generation_time_seconds:
        rtf = row.generation_time_seconds / row.duration_seconds
        lines.append(("RTF", f"{rtf:.3g} (run seconds for each second of audio)"))
    return lines


def _audio_facts(facts: object) -> dict[str, Any]:
    """Return the facts that are worth a line; the waveform is drawn instead."""
    from dgx_music.audio.facts import AudioFacts

    named = facts if isinstance(facts, dict) else {"metadata": facts}
    return {
        name: value
        for name, value in in_order(named, AudioFacts).items()
        if name != "waveform" and value is not None
    }


def _print_attempts(attempts: list[dict[str, Any]]) -> None:
    if attempts:
        now = datetime.now(UTC)
        print_line()
        headings = ("ATTEMPT", "OUTCOME", "DEVICE", "STARTED", "WORKER", "ERROR")
        print_table(headings, [_attempt_line(item, now) for item in attempts])


def _attempt_line(item: dict[str, Any], now: datetime) -> tuple[object, ...]:
    seconds = item["device_seconds"]
    return (
        item["attempt"],
        item["outcome"] or "running",
        "" if seconds is None else shown("device_seconds", seconds, now),
        distance(datetime.fromisoformat(item["started_at"]), now),
        item["worker_id"],
        item["error_message"] or "",
    )


async def _read(wanted: str, database_url: str | None) -> _Known:
    from dgx_music.artifacts import FileState, look_at_file
    from dgx_music.cli.opening import find_generation, opened
    from dgx_music.storage.clips import clips_of, read_clip_seconds
    from dgx_music.storage.estimates import estimate
    from dgx_music.storage.families import get_family
    from dgx_music.storage.repository import get_attempts

    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        async with database.session(read_only=True) as session:
            attempts = await get_attempts(session, generation.id)
            outlook = await estimate(session, generation.id)
            family = await get_family(session, generation.id)
            hashes = clips_of(generation)
            seconds = await read_clip_seconds(session, hashes.values())
    clips = {name: f"{seconds.get(sha, 0):.4g} s, clip {sha[:12]}" for name, sha in hashes.items()}
    path = generation.file_path if generation.is_complete else None
    file = await look_at_file(path, generation.file_size_bytes) if path else FileState(None)
    told = [attempt.to_dict() for attempt in attempts]
    return _Known(generation, told, outlook, clips, file, family)
