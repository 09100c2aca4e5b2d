"""What the OpenAPI description says of answers: shapes, examples and errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dgx_music.statuses import GenerationStatus
from dgx_music.web.filters import Parameter
from dgx_music.web.problems import KINDS, MEDIA_TYPE, Kind

_ID = "01a21733-54a2-7c39-9a6e-0f7a4be3f0a1"
_SELF = f"/v1/generations/{_ID}"
_HEADER = {"type": "string", "minLength": 1}
_PROBLEM_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence."},
        "field": {"type": "string", "description": "The field at fault, if one is."},
    },
}
_DETAILS: Mapping[int, str] = {
    400: "The body cannot be read.",
    401: "The token is not valid: it is unknown, expired or revoked.",
    403: "This needs the role operate, and the token has read.",
    404: f"There is no generation '{_ID}'; `dgx-music list` shows those that exist.",
    409: f"Generation {_ID} is completed and cannot become cancelled.",
    410: "The audio was deleted or moved.",
    413: "The body has more than 1,048,576 bytes; send less at a time.",
    415: "file is not audio that can be read; use WAV, FLAC, OGG or MP3.",
    416: "The file has 512,044 bytes; ask for some of them.",
    421: "The request's Host is not one of this server; start it with --allowed-hosts.",
    422: "duration is 400 s; use 0.08 to 300 seconds.",
    429: "The token 'shop' makes too many requests; wait a moment.",
    502: f"Generation {_ID} has failed: the engine ran out of memory",
    503: "The database cannot be used now; try again in some seconds.",
    504: f"Generation {_ID} is not finished yet, and goes on; `Location` leads to it.",
}
ROW: Mapping[str, Any] = {
    "id": _ID,
    "prompt": "lofi rain",
    "model_name": "musicgen-small",
    "duration_seconds": 16.0,
    "sample_rate": 32_000,
    "channels": 1,
    "sampling": {
        "guidance_scale": 3.0,
        "temperature": 1.0,
        "top_k": 250,
        "top_p": None,
        "seed": "4711",
    },
    "status": "processing",
    "progress": 0.42,
    "attempt": 1,
    "created_at": "2026-11-26T09:32:50.185000+00:00",
    "completed_at": None,
    "error_message": None,
    "metadata": {"order": 7},
    "starred": False,
    "urls": {
        "self": _SELF,
        "audio": None,
        "waveform": None,
        "preview": f"{_SELF}/preview",
        "events": f"{_SELF}/events",
        "cancel": f"{_SELF}/cancel",
        "retry": None,
    },
}
_ROW_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": [*ROW],
    "properties": {
        "id": {"type": "string"},
        "prompt": {"type": "string"},
        "status": {"enum": [str(each) for each in GenerationStatus]},
        "progress": {"type": "number", "minimum": 0, "maximum": 1},
        "attempt": {"type": "integer", "minimum": 0},
        "created_at": {"type": "string", "format": "date-time"},
        "completed_at": {"type": ["string", "null"], "format": "date-time"},
        "sampling": {
            "type": ["object", "null"],
            "properties": {"seed": {"type": ["string", "null"]}},
        },
        "metadata": {"type": ["object", "null"]},
        "starred": {"type": "boolean"},
        "urls": {"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    },
}
_ATTEMPT = {
    "attempt": 1,
    "started_at": "2026-11-26T09:32:51.020000+00:00",
    "finished_at": None,
    "outcome": None,
    "error_message": None,
    "device_seconds": None,
}
_ESTIMATE = {
    "status": "processing",
    "position": None,
    "starts_in_seconds": None,
    "done_in_seconds": {"low": 4.1, "high": 6.3},
    "unknown_because": None,
}
_LISTS = {"type": "array", "items": _ROW_SCHEMA}

BYTES = {"schema": {"type": "string", "format": "binary"}, "example": "RIFF…WAVEfmt …"}
ONE = {"schema": _ROW_SCHEMA, "example": ROW}
MANY = {
    "schema": {
        "type": "object",
        "required": ["generations"],
        "properties": {"generations": _LISTS},
    },
    "example": {"generations": [ROW]},
}
PAGE = {
    "schema": {
        "type": "object",
        "required": ["generations", "next"],
        "properties": {"generations": _LISTS, "next": {"type": ["string", "null"]}},
    },
    "example": {"generations": [ROW], "next": "MjAyNi0xMS0yNlQwOTozMjo1MC4xODUwMDArMDA6MDAg"},
}
UPLOAD = {
    "schema": {
        "type": "object",
        "required": ["id", "duration_seconds", "expires_at"],
        "properties": {
            "id": {"type": "string"},
            "duration_seconds": {"type": "number", "description": "Of the whole file."},
            "expires_at": {"type": "string", "format": "date-time"},
        },
    },
    "example": {
        "id": "up_Jr0bqz0ZoBvYcyM0rPnXkqk1a7o2mYVb",
        "duration_seconds": 12.5,
        "expires_at": "2026-11-27T09:32:50.185000+00:00",
    },
}
DETAIL = {
    "schema": {**_ROW_SCHEMA, "required": [*ROW, "attempts", "estimate"]},
    "example": {**ROW, "attempts": [_ATTEMPT], "estimate": _ESTIMATE},
}


def example(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of a JSON object that has the fields of this example."""
    return {"schema": {"type": "object", "required": [*value]}, "example": value}


def stream(text: str) -> dict[str, Any]:
    """Return the description of a stream of events, with this example."""
    return {"text/event-stream": {"schema": {"type": "string"}, "example": text}}


def answers(
    contents: Mapping[int, tuple[str, Mapping[str, Any] | None]], errors: Iterable[int] = ()
) -> dict[int | str, dict[str, Any]]:
    """Return what OpenAPI says of a route's answers.

    ``contents`` has a description and the JSON of each success; ``errors`` are further statuses,
    besides those that each route can have.
    """
    told: dict[int | str, dict[str, Any]] = {}
    for status, (description, content) in contents.items():
        told[status] = {"description": description}
        if content is not None:
            told[status]["content"] = {"application/json": dict(content)}
    for status in sorted({400, 401, 403, 413, 421, 422, 429, 503, *errors}):
        told[status] = problem(KINDS[status])
    return told


def problem(kind: Kind) -> dict[str, Any]:
    """Return what OpenAPI says of a problem."""
    content = {
        "type": f"urn:dgx-music:{kind.name}",
        "title": kind.title,
        "status": kind.status,
        "detail": _DETAILS[kind.status],
    }
    if kind.status == 422:
        content["field"] = "duration"
    media = {"schema": _PROBLEM_SCHEMA, "example": content}
    return {"description": kind.title, "content": {MEDIA_TYPE: media}}


def parameters(*known: Parameter) -> dict[str, Any]:
    """Return what OpenAPI says of a route's parameters."""
    return {"parameters": [each.described for each in known]}


def headers(known: Mapping[str, str]) -> dict[str, Any]:
    """Return what OpenAPI says of the headers that a route reads, each with its meaning."""
    told = [
        {"name": name, "in": "header", "schema": _HEADER, "description": meaning}
        for name, meaning in known.items()
    ]
    return {"parameters": told}
