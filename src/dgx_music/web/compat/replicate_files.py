"""``POST files`` and ``GET files/{id}``: our uploads, as the ``replicate`` package sends them."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dgx_music.client.uploads import find_uploads
from dgx_music.storage.clips import read_clips
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import Upload
from dgx_music.web import documents
from dgx_music.web.access import MayEnqueue
from dgx_music.web.compat.outputs import root_of
from dgx_music.web.problems import NOT_FOUND, ProblemError
from dgx_music.web.uploads import UploadRoute, keep_upload

router = APIRouter(route_class=UploadRoute, tags=["for clients of Replicate"])

_FIELD = "content"
_ID = "up_Jr0bqz0ZoBvYcyM0rPnXkqk1a7o2mYVb"
_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_FILE = documents.example(
    {
        "id": _ID,
        "name": f"{_ID}.flac",
        "content_type": "audio/flac",
        "size": 512_044,
        "etag": _SHA256,
        "checksums": {"sha256": _SHA256},
        "metadata": {},
        "created_at": "2026-11-26T09:32:50.185000+00:00",
        "expires_at": "2026-11-27T09:32:50.185000+00:00",
        "urls": {"get": f"http://127.0.0.1:8321/v1/files/{_ID}"},
    }
)
_FORM = {
    "type": "object",
    "required": [_FIELD],
    "properties": {_FIELD: {"type": "string", "format": "binary"}, "metadata": {"type": "string"}},
}


@router.post(
    "/files",
    status_code=201,
    responses=documents.answers({201: ("The file, as it is kept.", _FILE)}, errors=[415]),
    openapi_extra={
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
    },
)
async def add_file(request: Request, access: MayEnqueue) -> Response:
    """Keep audio for a day; its URL `urls.get` is what `input_audio` of a prediction takes."""
    upload = await keep_upload(request, access, _FIELD)
    return JSONResponse(await _as_file(upload, request), 201)


@router.get(
    "/files/{file_id}",
    responses=documents.answers({200: ("The file, as it is kept.", _FILE)}, errors=[404]),
)
async def get_file(file_id: str, request: Request, access: MayEnqueue) -> Response:
    """Show what is known of a file; its content is not sent."""
    found = await find_uploads([file_id], tenant=access.tenant)
    if file_id not in found:
        raise ProblemError(NOT_FOUND, "There is no such file here, or it has expired.")
    return JSONResponse(await _as_file(found[file_id], request))


async def _as_file(upload: Upload, request: Request) -> dict[str, Any]:
    """Return the upload as JSON values: the clip that is kept of it, which is FLAC."""
    kept = upload.clip_sha256(None)
    read = partial(read_clips, sha256s=[kept])
    data = (await (await ensure_database()).transact(read, read_only=True))[kept]
    digest = hashlib.sha256(data).hexdigest()
    return {
        "id": upload.id,
        "name": f"{upload.id}.flac",
        "content_type": "audio/flac",
        "size": len(data),
        "etag": digest,
        "checksums": {"sha256": digest},
        "metadata": {},
        "created_at": upload.created_at.isoformat(),
        "expires_at": upload.expires_at.isoformat(),
        "urls": {"get": f"{root_of(request)}files/{upload.id}"},
    }
