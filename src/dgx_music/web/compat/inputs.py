"""The inputs of MusicGen as Replicate names them, and what each of them is here."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from dgx_music.catalog import MAX_DURATION_SECONDS, MIN_DURATION_SECONDS, MODELS, WINDOW_SECONDS
from dgx_music.client.uploads import add_part, add_upload, find_uploads
from dgx_music.errors import InvalidRequestError
from dgx_music.storage.models import Upload
from dgx_music.validation import (
    AUDIO_FORMATS,
    MAX_PROMPT_CHARACTERS,
    MELODY_SECONDS,
    check_between,
    check_boolean,
    check_name,
    shown,
)
from dgx_music.web.access import Access
from dgx_music.web.compat.fields import check_absent, check_one_of, renaming
from dgx_music.web.problems import NOT_FOUND, ProblemError
from dgx_music.web.requests import check_only
from dgx_music.web.site import site_of

_STRATEGIES = ("loudness", "clip", "peak", "rms")
_FAMILY = "musicgen-"
_VERSIONS = [name.removeprefix(_FAMILY) for name in MODELS]
_SECONDS = {"type": "integer", "minimum": 0}
INPUTS: Mapping[str, dict[str, Any]] = {
    "prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS},
    "duration": {
        "type": "number",
        "minimum": MIN_DURATION_SECONDS,
        "maximum": MAX_DURATION_SECONDS,
        "default": 8,
    },
    "model_version": {
        "enum": _VERSIONS,
        "description": "For `meta/musicgen`; the server's own model if it is not given.",
    },
    "input_audio": {
        "type": "string",
        "format": "uri",
        "description": "What `POST files` answers as `urls.get`, or a `data:` URI. A melody to "
        "follow or, with `continuation`, the music's beginning.",
    },
    "continuation": {"type": "boolean", "default": False},
    "continuation_start": {**_SECONDS, "description": "Of the part of `input_audio` that counts."},
    "continuation_end": {"type": "integer", "minimum": -1, "description": "-1 is its end."},
    "temperature": {"type": "number", "minimum": 0, "maximum": 5, "default": 1},
    "top_k": {"type": "integer", "minimum": 0, "default": 250},
    "top_p": {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 0,
        "description": "0 is off; any other value replaces `top_k`.",
    },
    "classifier_free_guidance": {"type": "number", "minimum": 1, "maximum": 20, "default": 3},
    "seed": {"type": "integer", "minimum": -1, "description": "-1 is a random one."},
    "output_format": {"enum": [*AUDIO_FORMATS], "default": "wav"},
    "normalization_strategy": {
        "enum": [*_STRATEGIES],
        "description": "Changes nothing: the worker's setting decides.",
    },
    "multi_band_diffusion": {"enum": [False], "description": "True is not possible here."},
}
"""Each with its schema, without null, which every one may be."""
_DEFAULT_SECONDS = 8
_DEFAULT_FORMAT = "wav"
_OPTIONS = {
    "prompt": "prompt",
    "duration": "duration",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "classifier_free_guidance": "guidance_scale",
    "seed": "seed",
    "output_format": "audio_format",
}
"""Their inputs that are options of ours, nearly as they are."""
NAMES: Mapping[str, str] = {
    **{ours: theirs for theirs, ours in _OPTIONS.items()},
    "model": "model_version",
    **dict.fromkeys(("continuation", "melody", "file"), "input_audio"),
}
"""What our fields are called in errors."""
_IMPOSSIBLE = {"multi_band_diffusion": "cannot be done here"}
_UPLOAD = re.compile(r"(?:https?://[^?#]+/v1/files/)?(up_[A-Za-z0-9_-]{32})", re.ASCII)
_DATA = re.compile(r"data:[^,]{0,100};base64,", re.ASCII | re.IGNORECASE)
_OTHERS_REMEDY = "send the file to `POST files`, or as a data: URI"


async def read_input(
    given: object, model: str | None, request: Request, access: Access
) -> dict[str, Any]:
    """Return the options of an input; audio in it is stored as an upload, and its id is the option.

    ``model`` is our name of the model, or ``None`` if ``model_version`` says which. Raises
    ``InvalidRequestError`` and ``ProblemError``, with the names of the input.
    """
    fields = _checked(given)
    options = {"prompt": "", "duration": _DEFAULT_SECONDS, "audio_format": _DEFAULT_FORMAT}
    options |= {ours: fields[theirs] for theirs, ours in _OPTIONS.items() if theirs in fields}
    if options.get("seed") == -1:
        del options["seed"]
    if options.get("top_p") == 0:
        del options["top_p"]
    elif "top_p" in options:
        options["top_k"] = 0
    if (name := _model(fields, model)) is not None:
        options["model"] = name
    options |= await _clip(fields, request, access)
    return options


def _checked(given: object) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidRequestError("input", f"is {shown(given)}", "send an object")
    fields = {name: value for name, value in given.items() if value is not None}
    check_only(fields, *INPUTS)
    check_absent(fields, _IMPOSSIBLE)
    check_boolean("continuation", fields.get("continuation", False))
    strategy = fields.get("normalization_strategy", _STRATEGIES[0])
    check_one_of("normalization_strategy", strategy, _STRATEGIES)
    return fields


def _model(fields: Mapping[str, Any], model: str | None) -> str | None:
    """Return the name of the model that is meant, or ``None`` for the server's own."""
    if "model_version" not in fields:
        return model
    version = check_name("model_version", fields["model_version"])
    name = version if version in MODELS else _FAMILY + version
    if name not in MODELS:
        remedy = f"use one of {', '.join(_VERSIONS)}"
        raise InvalidRequestError("model_version", f"{shown(version)} is not known", remedy)
    if model not in (None, name):
        problem = f"is {shown(version)}, and the model is {model}"
        raise InvalidRequestError("model_version", problem, "leave it out")
    return name


async def _clip(fields: Mapping[str, Any], request: Request, access: Access) -> dict[str, str]:
    """Return the option that names the input audio, if there is any."""
    if "input_audio" not in fields:
        for name in ("continuation", "continuation_start", "continuation_end"):
            if fields.get(name) not in (None, False, 0, -1):
                raise InvalidRequestError(name, "needs input_audio", "add it, or leave this out")
        return {}
    with renaming(NAMES):
        upload = await _upload(fields["input_audio"], request, access)
    kept, channels = (WINDOW_SECONDS, None) if fields.get("continuation") else (MELODY_SECONDS, 1)
    start, end = _part(fields, upload.duration_seconds, kept)
    if (start, end) != (0, upload.duration_seconds):
        decodes = site_of(request).decodes
        upload = await add_part(upload, start, end, channels=channels, decodes=decodes)
    return {"continuation" if fields.get("continuation") else "melody": upload.id}


async def _upload(given: object, request: Request, access: Access) -> Upload:
    """Return the upload that is named, or that is made of a ``data:`` URI; opens no other URL."""
    if isinstance(given, str) and (named := _UPLOAD.fullmatch(given)):
        found = await find_uploads([named[1]], tenant=access.tenant)
        if named[1] not in found:
            detail = "input_audio is no file that is here, or it has expired; send it again."
            raise ProblemError(NOT_FOUND, detail, field="input_audio")
        return found[named[1]]
    content = io.BytesIO(_decoded(given))
    return await add_upload(content, tenant=access.tenant, decodes=site_of(request).decodes)


def _decoded(given: object) -> bytes:
    start = _DATA.match(given) if isinstance(given, str) else None
    if start is None:
        problem = "is neither a file that was sent here nor a data: URI with base64"
        raise InvalidRequestError("input_audio", problem, _OTHERS_REMEDY)
    try:
        return base64.b64decode(start.string[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        problem = "has base64 that cannot be decoded"
        raise InvalidRequestError("input_audio", problem, _OTHERS_REMEDY) from None


def _part(fields: Mapping[str, Any], seconds: float, kept: float) -> tuple[float, float]:
    """Return the start and the end, in seconds, of the part of the input audio that counts.

    Of the audio, so many seconds are ``kept`` for this use.
    """
    start = check_between("continuation_start", fields.get("continuation_start", 0), 0, seconds)
    wanted = fields.get("continuation_end", -1)
    end = seconds if wanted == -1 else check_between("continuation_end", wanted, 0, seconds)
    if start == 0 and end == seconds:
        return 0, seconds
    if start >= end:
        problem = f"is {start:g}, and the part ends at {end:g} s"
        raise InvalidRequestError("continuation_start", problem, "use an earlier start")
    if end > kept and wanted == -1:
        problem = f"is not given, and the part from {start:g} s on goes to {end:g} s"
        remedy = f"give one of at most {kept:g}, or send only the part that counts"
        raise InvalidRequestError("continuation_end", problem, remedy)
    if end > kept:
        problem = f"is {end:g}, and only the first {kept:g} s of a file are kept for this"
        raise InvalidRequestError("continuation_end", problem, "send only the part that counts")
    return start, end
