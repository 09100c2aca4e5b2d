"""A generation as Replicate's prediction."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from typing import Any

from anyio import to_thread
from starlette.requests import Request

from dgx_music.catalog import short_name
from dgx_music.client.content import content_of, stored_format
from dgx_music.errors import ArtifactError
from dgx_music.statuses import CANCELLED, COMPLETED, FAILED, PENDING, PROCESSING
from dgx_music.storage import Generation
from dgx_music.web.compat.hosted_models import reference_of, version_id
from dgx_music.web.contents import check_sent
from dgx_music.web.names import media_type_of
from dgx_music.web.problems import ProblemError
from dgx_music.web.rows import ROOT, base_of, has_audio, url_of
from dgx_music.web.site import site_of

METADATA_KEY = "replicate"
"""The key of the metadata under which a generation remembers how it was asked for."""
_STATUSES = {
    PENDING: "starting",
    PROCESSING: "processing",
    COMPLETED: "succeeded",
    FAILED: "failed",
    CANCELLED: "canceled",
}
_HELD = "starting"
"""What a request that waits is answered if it is not finished: after any other status the client
takes the output, which is not there yet."""
_FRAMES_PER_SECOND = 50
_BAR = 10
_MOST_INLINE_BYTES = 16_000_000
"""The largest audio that is sent inside an answer."""

logger = logging.getLogger(__name__)


def root_of(request: Request) -> str:
    """Return the address of the API as the client calls it, with the slash at its end."""
    return f"{_origin(request)}{base_of(request)}{ROOT}"


def is_cancelled(row: Generation) -> bool:
    """Return True also while a worker stops it: it ends cancelled in any case."""
    return row.status == CANCELLED or (row.cancel_requested and not row.is_finished)


async def as_prediction(row: Generation, request: Request, *, held: bool = False) -> dict[str, Any]:
    """Return the row as a prediction; ``held`` if the client waited for this answer.

    The output is the URL of the audio. The client makes a file only of a URL with https, or of
    a ``data:`` URI. So on plain http it is the latter, if the client of this generation waited.
    """
    told = as_list_prediction(row, request)
    if held and not (row.is_finished or is_cancelled(row)):
        told["status"] = _HELD
    is_inline = _origin_of(row).get("wait") and request.url.scheme == "http"
    if is_inline and told["output"] and (row.file_size_bytes or 0) <= _MOST_INLINE_BYTES:
        told["output"] = await _inline(request, row) or told["output"]
    return told


def as_list_prediction(row: Generation, request: Request) -> dict[str, Any]:
    """Return the row as a prediction of a list; its output is a URL in any case."""
    own = f"{root_of(request)}predictions/{row.id}"
    asked = _origin_of(row)
    return {
        "id": row.id,
        "model": _text(asked.get("model")) or "/".join(reference_of(row.model_name)),
        "version": _text(asked.get("version")) or version_id(row.model_name),
        "status": "canceled" if is_cancelled(row) else _STATUSES[row.status],
        "input": _input(row),
        "output": _audio_url(row, request) if has_audio(row) else None,
        "logs": _logs(row),
        "error": row.error_message if row.status == FAILED else None,
        "metrics": _metrics(row),
        "created_at": row.created_at.isoformat(),
        "started_at": row.started_at.isoformat() if row.started_at else None,
        "completed_at": row.completed_at.isoformat() if row.completed_at else None,
        "urls": {"get": own, "cancel": f"{own}/cancel"},
    }


def _origin(request: Request) -> str:
    return f"{request.url.scheme}://{request.url.netloc}"


def _origin_of(row: Generation) -> Mapping[str, Any]:
    """Return what the request said of itself, if it was one for a prediction."""
    found = row.get_metadata().get(METADATA_KEY)
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str | None:
    """Return the value if it is text: a caller may have written other metadata under this key."""
    return value if isinstance(value, str) else None


def _audio_url(row: Generation, request: Request) -> str:
    return f"{_origin(request)}{url_of(row, base_of(request))}/audio"


async def _inline(request: Request, row: Generation) -> str | None:
    try:
        check_sent(site_of(request), row)
        data = b"".join([chunk async for chunk in content_of(row)])
    except (ArtifactError, ProblemError) as error:
        logger.warning("web: %s", error)
        return None
    text = (await to_thread.run_sync(base64.b64encode, data)).decode()
    return f"data:{media_type_of(stored_format(row))};base64,{text}"


def _input(row: Generation) -> dict[str, Any]:
    sampling = row.sampling or {}
    values = {
        "prompt": row.prompt,
        "duration": row.duration_seconds,
        "model_version": short_name(row.model_name).removeprefix("musicgen-"),
        "temperature": sampling.get("temperature"),
        "top_k": sampling.get("top_k"),
        "top_p": sampling.get("top_p"),
        "classifier_free_guidance": sampling.get("guidance_scale"),
        "seed": sampling.get("seed"),
        "output_format": row.audio_format,
    }
    return {name: value for name, value in values.items() if value is not None}


def _logs(row: Generation) -> str:
    """Return the progress as the bar that the client finds it by; nothing before the first attempt."""
    if not row.attempt:
        return ""
    total = max(1, round(row.duration_seconds * _FRAMES_PER_SECOND))
    percent, bar = int(row.progress * 100), "█" * int(row.progress * _BAR)
    return f"{percent:3}%|{bar:{_BAR}}| {int(row.progress * total)}/{total}\n"


def _metrics(row: Generation) -> dict[str, float]:
    seconds = row.generation_time_seconds
    return {} if seconds is None else {"predict_time": seconds}
