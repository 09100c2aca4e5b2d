"""``dgx-music show``: all that is known of one generation."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from typing import Any

from dgx_music.artifacts import FileState, look_at_file
from dgx_music.cli.database import find_generation, opened
from dgx_music.cli.estimates import in_words
from dgx_music.cli.options import AsJson, DatabaseUrl, GenerationId
from dgx_music.cli.output import (
    UNCONDITIONAL,
    WAVEFORM_WIDTH,
    distance,
    label,
    make_console,
    print_fields,
    print_json,
    print_line,
    print_table,
    shown,
)
from dgx_music.cli.progress import tell_untrained
from dgx_music.storage import Generation
from dgx_music.storage.clips import clips_of, read_clip_seconds
from dgx_music.storage.estimates import Estimate, estimate
from dgx_music.storage.repository import get_attempts


def show(generation_id: GenerationId, database_url: DatabaseUrl = None, as_json: AsJson = False) -> None:
    """Show all of one generation: fields, attempts, waveform.

    While it waits or runs, also when it will start and be done, as far as anybody can say.
    With --json that is `estimate`: `starts_in_seconds` and `done_in_seconds` are null or have a `low` and a `high`, which
    about 8 of 10 generations keep to, and `unknown_because` says why they are null. `file_is_missing` is null where there is
    no file yet, or nobody can say from here; `file_is_damaged` says whether its size has changed, or is null on the same terms.
    """
    generation, attempts, outlook, clips, file = asyncio.run(_read(generation_id, database_url))
    if as_json:
        more = {"attempts": attempts, "queue_position": outlook.position, "estimate": outlook.to_dict()}
        states = {"file_is_missing": file.is_missing, "file_is_damaged": file.is_damaged}
        print_json({**generation.to_dict(), **states, **more})
        return
    _print_generation(generation, outlook, clips, file)
    print_waveform(generation)
    _print_attempts(attempts)
    tell_untrained([generation])


def _print_generation(generation: Generation, outlook: Estimate, clips: dict[str, float], file: FileState) -> None:
    now = datetime.now(UTC)
    told = generation.to_dict() | {"prompt": generation.prompt or UNCONDITIONAL, **_asked_for(generation, clips)}
    fields = {name: value for name, value in told.items() if value is not None and name != "metadata"}
    lines = [(label(name), shown(name, value, now)) for name, value in fields.items()]
    if file.is_missing:
        lines.append(("file", "missing: it was deleted or moved since, or its disk is not there"))
    if file.is_damaged:
        lines.append(("file", f"damaged: the file {file.damage}"))
    if outlook.position is not None:
        lines.append(("queue position", f"{outlook.position:,}"))
    if words := in_words(outlook):
        lines.append(("estimate", words))
    if generation.generation_time_seconds:
        rtf = generation.generation_time_seconds / generation.duration_seconds
        lines.append(("RTF", f"{rtf:.3g} (run seconds for each second of audio)"))
    metadata = generation.get_metadata()
    facts = _audio_facts(metadata.pop("audio", {}))
    lines += [(f"audio {label(name)}", shown(name, value, now)) for name, value in facts.items()]
    print_fields(lines + [(name, json.dumps(value, ensure_ascii=False)) for name, value in metadata.items()])


def _asked_for(generation: Generation, clips: dict[str, float]) -> dict[str, str | None]:
    """Return what is said of the negative prompt and the clips, in the place of how they are stored."""
    told: dict[str, str | None] = {"negative_prompt": (generation.sampling or {}).get("negative_prompt")}
    for name, sha256 in clips_of(generation).items():
        told |= {f"{name}_sha256": None, name: f"{clips.get(sha256, 0):.4g} s, clip {sha256[:12]}"}
    return told


def _audio_facts(facts: object) -> dict[str, Any]:
    """Return what is worth a line: the waveform is drawn instead."""
    named = facts if isinstance(facts, dict) else {"metadata": facts}
    return {name: value for name, value in named.items() if name != "waveform" and value is not None}


def print_waveform(generation: Generation) -> None:
    """Draw the peaks of a completed generation's audio in one line."""
    facts = generation.get_metadata().get("audio")
    if not isinstance(facts, dict) or not facts.get("waveform"):
        return
    from dgx_music.audio.files import waveform_text

    print_line(waveform_text(facts["waveform"], min(WAVEFORM_WIDTH, make_console().width)))


def _print_attempts(attempts: list[dict[str, Any]]) -> None:
    if not attempts:
        return
    now = datetime.now(UTC)
    print_line()
    print_table(
        ("ATTEMPT", "OUTCOME", "DEVICE", "STARTED", "WORKER", "ERROR"),
        [
            (
                item["attempt"],
                item["outcome"] or "running",
                "" if item["device_seconds"] is None else shown("device_seconds", item["device_seconds"], now),
                distance(datetime.fromisoformat(item["started_at"]), now),
                item["worker_id"],
                item["error_message"] or "",
            )
            for item in attempts
        ],
    )


async def _read(
    wanted: str, database_url: str | None
) -> tuple[Generation, list[dict[str, Any]], Estimate, dict[str, float], FileState]:
    async with opened(database_url) as database:
        generation = await find_generation(database, wanted)
        async with database.session(read_only=True) as session:
            attempts = await get_attempts(session, generation.id)
            outlook = await estimate(session, generation.id)
            clips = await read_clip_seconds(session, clips_of(generation).values())
    path = generation.file_path if generation.is_complete else None
    file = await look_at_file(path, generation.file_size_bytes) if path else FileState(None)
    return generation, [attempt.to_dict() for attempt in attempts], outlook, clips, file
