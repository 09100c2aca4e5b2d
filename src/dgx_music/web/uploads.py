"""``POST uploads``: audio for ``continuation`` and ``melody``, which requests name by its id."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import BinaryIO

import anyio.to_thread
from fastapi import APIRouter
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dgx_music.client import uploads
from dgx_music.errors import InvalidRequestError, UnreadableAudioError
from dgx_music.storage.models import Upload
from dgx_music.web import documents
from dgx_music.web.access import Access, MayEnqueue
from dgx_music.web.bodies import limited
from dgx_music.web.problems import MALFORMED, NOT_AUDIO, RETRY_SECONDS, STORAGE_AWAY, ProblemError
from dgx_music.web.route import MusicRoute
from dgx_music.web.site import site_of

_FORM_TYPE = "multipart/form-data"
_RAW_TYPES = ("application/octet-stream", "application/ogg")
_MOST_FIELDS = 8
"""How many fields may be beside the file; none of them is read."""
_FIELD_BYTES = 1_024
_WRITTEN_BYTES = 2**20
"""A file is written in such pieces, since each one is a change of the thread."""

_NO_ROOM = "The server has no room for the audio now; try again in some seconds."

logger = logging.getLogger(__name__)

_BINARY = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _BINARY}}
_BODY = {
    "required": True,
    "description": "WAV, FLAC, OGG or MP3: the body itself, or the file of a form.",
    "content": {
        "audio/*": {"schema": _BINARY},
        _FORM_TYPE: {"schema": _FORM},
        **{kind: {"schema": _BINARY} for kind in _RAW_TYPES},
    },
}


class UploadRoute(MusicRoute):
    """A route whose body is audio."""

    is_limited = False


router = APIRouter(route_class=UploadRoute, tags=["uploads"])


@router.post(
    "/uploads",
    status_code=201,
    responses=documents.answers(
        {201: ("The audio can be used until `expires_at`.", documents.UPLOAD)}, errors=[415]
    ),
    openapi_extra={"requestBody": _BODY},
)
async def add_upload(request: Request, access: MayEnqueue) -> Response:
    """Keep audio for a day, to be named by its id as `continuation` or `melody`."""
    upload = await keep_upload(request, access)
    told = {
        "id": upload.id,
        "duration_seconds": upload.duration_seconds,
        "expires_at": upload.expires_at.isoformat(),
    }
    return JSONResponse(told, 201)


async def keep_upload(request: Request, access: Access, field: str = "file") -> Upload:
    """Store the audio of the body, or of this field of a form, and return the upload's row.

    Raises ``ProblemError``, also if it is no audio or cannot be kept.
    """
    site = site_of(request)
    try:
        async with _received(limited(request, site.options.upload_bytes), field) as file:
            return await uploads.add_upload(file, tenant=access.tenant, decodes=site.decodes)
    except UnreadableAudioError as error:
        raise ProblemError(NOT_AUDIO, str(error), field=error.field) from None
    except ClientDisconnect:
        raise ProblemError(MALFORMED, "The body ended too early.") from None
    except OSError as error:
        logger.warning("web: an upload cannot be kept: %s", error)
        headers = {"Retry-After": str(RETRY_SECONDS)}
        raise ProblemError(STORAGE_AWAY, _NO_ROOM, headers=headers) from None


@asynccontextmanager
async def _received(request: Request, field: str) -> AsyncIterator[BinaryIO]:
    """Yield the audio of a body as a temporary file without a name, which ends with the request."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _FORM_TYPE:
        limits = {"max_fields": _MOST_FIELDS, "max_part_size": _FIELD_BYTES}
        async with request.form(max_files=1, **limits) as form:
            part = form.get(field)
            if not isinstance(part, UploadFile):
                remedy = f"send the audio as the file of the form's field `{field}`"
                raise InvalidRequestError(field, "is missing", remedy)
            yield part.file
    elif kind.startswith("audio/") or kind in _RAW_TYPES:
        with tempfile.TemporaryFile() as file:
            await _fill(file, request)
            yield file
    else:
        detail = "The content type is not one of audio; send audio/wav, or another one of audio."
        raise ProblemError(NOT_AUDIO, detail)


async def _fill(file: BinaryIO, request: Request) -> None:
    piece = bytearray()
    async for chunk in request.stream():
        piece += chunk
        if len(piece) >= _WRITTEN_BYTES:
            await anyio.to_thread.run_sync(file.write, bytes(piece))
            piece.clear()
    await anyio.to_thread.run_sync(file.write, bytes(piece))
