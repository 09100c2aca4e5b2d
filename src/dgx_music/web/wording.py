"""What the page says of a generation, in words: its status, its facts, how it was asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from dgx_music.catalog import MODELS, is_untrained
from dgx_music.statuses import FAILED, PENDING, PROCESSING

Row: TypeAlias = Mapping[str, Any]
"""A generation as the API sends it."""

KEYS = (
    ("/", "search"),
    ("n", "new prompt"),
    ("j k", "next and previous row"),
    ("Enter", "details of the row"),
    ("space", "play or pause"),
    ("← →", "5 s back or on"),
    ("s", "star"),
    ("?", "this help"),
    ("Esc", "close"),
)
"""What each key of the page does."""
_NOISE = "noise: the weights are untrained"
_STATUSES = {
    "pending": "waiting",
    "processing": "running",
    "completed": "done",
    "failed": "failed",
    "cancelled": "cancelled",
}


def moment(text: str) -> str:
    """Return a time as it is read without scripts, such as ``26 Nov 09:32 UTC``."""
    return datetime.fromisoformat(text).strftime("%d %b %H:%M UTC")


def seconds(value: float) -> str:
    """Return a length, such as ``9.5 s`` or ``1:05 min``."""
    if value < 60:
        return f"{round(value, 1):g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}:{rest:02} min"


def title_of(row: Row) -> str:
    """Return what a generation is called: its title, or its prompt."""
    return str(row["title"] or row["prompt"] or "(no prompt)")


def status_of(row: Row) -> str:
    """Return the status, and how far a generation is."""
    if row["status"] != PROCESSING:
        return _STATUSES[row["status"]]
    return "stopping" if row["cancel_requested"] else f"running {row['progress']:.0%}"


def facts_of(row: Row) -> list[str]:
    """Return what a row of the list says besides title, status and time."""
    key = row["musical_key"]
    facts = [
        seconds(row["duration_seconds"]),
        row["model_name"],
        row["take"] and f"take {row['take']}",
        row["bpm"] and f"~{row['bpm']:.0f} BPM",
        key and key.replace("#", "♯"),
        *(f"#{tag}" for tag in row["tags"] or ()),
    ]
    return [fact for fact in facts if fact]


def problem_of_row(row: Row) -> str | None:
    """Return why the last attempt failed, if it matters still."""
    return row["error_message"] if row["status"] in (FAILED, PENDING) else None


def sounds_of(row: Row) -> list[tuple[str, str]]:
    """Return where the generation is heard, and what a link to it says; nowhere if it waits."""
    names = {"audio": "Play", "preview": "Listen while it is made"}
    return [(row["urls"][kind], name) for kind, name in names.items() if row["urls"][kind]]


def outlook_of(row: Row) -> str:
    """Return its place in the queue and when it is likely to be done; empty if it is finished."""
    estimate = row["estimate"]
    if row["status"] not in (PENDING, PROCESSING):
        return ""
    place = estimate["position"] and f"number {estimate['position']} in the queue"
    done = estimate["done_in_seconds"]
    end = estimate["unknown_because"]
    if done:
        end = f"done in {math.ceil(done['low'])} to {math.ceil(done['high'])} s"
    return " · ".join(each for each in (place, end) if each)


def request_of(row: Row) -> list[tuple[str, str]]:
    """Return how a generation was asked for, and how it was made: names and values."""
    sampling = row["sampling"] or {}
    model = MODELS.get(row["model_name"])
    licence = model.licence if model else None
    pairs = [
        ("Prompt", row["title"] and row["prompt"]),
        ("Not like", sampling.get("negative_prompt")),
        ("Model", row["model_name"]),
        ("Weights", licence and f"licence {licence}: it may limit what the audio is used for"),
        ("Audio", _warning_of(row)),
        ("Length", seconds(row["duration_seconds"])),
        ("Seed", sampling.get("seed")),
        ("Guidance", sampling.get("guidance_scale")),
        ("Temperature", sampling.get("temperature")),
        ("Took", row["generation_time_seconds"] and seconds(row["generation_time_seconds"])),
        ("Tenant", row["tenant"]),
        ("Id", row["id"]),
    ]
    return [(name, str(value)) for name, value in pairs if value not in (None, "")]


def worker_facts(worker: Row) -> list[tuple[str, str | None]]:
    """Return what a worker is and does: names and values."""
    return [
        ("State", worker["state"] if worker["is_alive"] else "ended"),
        ("Because", worker.get("end_reason")),
        ("Model", worker["model_name"]),
        ("Device", worker["device"]),
        ("In hand", f"{worker['running_count']} of {worker['slots']}"),
    ]


def model_facts(model: Row) -> list[tuple[str, str | None]]:
    """Return who serves a model, and what is to be known of it: names and values."""
    return [
        ("Served", "by a worker" if model["is_served"] else "by none"),
        ("Paused", "yes" if model["is_paused"] else None),
        ("Licence", model["licence"]),
        ("Audio", _NOISE if model["is_untrained"] else None),
    ]


def curl_of(row: Row, address: str) -> str:
    """Return the command that asks for the same from the API at this address."""
    fields = {
        "prompt": row["prompt"],
        "model": row["model_name"],
        "duration": row["duration_seconds"],
        "seed": (row["sampling"] or {}).get("seed"),
    }
    given = {name: value for name, value in fields.items() if value is not None}
    body = json.dumps(given, ensure_ascii=False).replace("'", "'\\''")
    url = urlsplit(address)._replace(path=row["urls"]["self"].rpartition("/")[0], query="")
    return (
        f"curl {url.geturl()} \\\n  -H 'Content-Type: application/json' \\\n  --data-raw '{body}'"
    )


def _warning_of(row: Row) -> str | None:
    if row["model_version"] == "tone":
        return "sine waves for tests, not music"
    return _NOISE if is_untrained(row["model_name"]) else None
