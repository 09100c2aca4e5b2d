"""Requests that wait for their generation: a while, and no longer than their client is there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import Response

from dgx_music.client.content import Encoding, content_of, encoded_content, stored_format
from dgx_music.client.generations import watch_generation
from dgx_music.errors import ArtifactError
from dgx_music.statuses import FAILED
from dgx_music.storage import Generation
from dgx_music.web import documents
from dgx_music.web.access import Access
from dgx_music.web.compat.encodings import MEDIA_TYPES, media_type_of
from dgx_music.web.compat.fields import renaming
from dgx_music.web.contents import check_sent, check_there
from dgx_music.web.enqueue import enqueue_one
from dgx_music.web.filters import Parameter
from dgx_music.web.problems import (
    GENERATION_FAILED,
    GONE,
    NOT_FINISHED,
    WRONG_STATUS,
    Kind,
    ProblemError,
)
from dgx_music.web.requests import prepared
from dgx_music.web.rows import base_of, has_audio, url_of
from dgx_music.web.site import Site, site_of

HELD_SECONDS = 230.0
"""How long a request for bytes is held; the client of ElevenLabs gives up after 240 s."""


def as_bytes(*known: Parameter) -> dict[str, Any]:
    """Return what FastAPI is told of a route that answers with audio: it reads these parameters."""
    told = documents.answers({200: ("The audio.", None)}, errors=[409, 410, 502, 504])
    told[200]["content"] = dict.fromkeys(MEDIA_TYPES, documents.BYTES)
    key = {"Idempotency-Key": "The same request again gets the same audio."}
    read = [*documents.parameters(*known)["parameters"], *documents.headers(key)["parameters"]]
    return {
        "response_class": Response,
        "responses": told,
        "openapi_extra": {"parameters": read},
    }


async def enqueue_as(
    options: dict[str, Any], request: Request, access: Access, names: Mapping[str, str]
) -> Generation:
    """Add the generation of these options, whose errors call fields by these names."""
    if (key := request.headers.get("idempotency-key")) is not None:
        options = {**options, "idempotency_key": key}
    with renaming(names):
        row, _ = await enqueue_one(await prepared(options, access), access)
    return row


async def hold(request: Request, row: Generation, seconds: float) -> Generation:
    """Return the latest row: when it is finished, the time is up, or the client has hung up.

    The generation goes on in any case.
    """
    with _connected(request), site_of(request).stops.waiting(seconds):
        async for latest in watch_generation(row.id):
            row = latest
    return row


async def answer_bytes(
    options: dict[str, Any],
    request: Request,
    access: Access,
    encoding: Encoding,
    names: Mapping[str, str],
) -> Response:
    """Enqueue what these options ask for, wait, and return the answer with the audio's bytes.

    Raises ``ProblemError`` if there is no audio by then; its ``Location`` leads to the row.
    """
    row = await enqueue_as(options, request, access, names)
    row = await hold(request, row, HELD_SECONDS)
    location = url_of(row, base_of(request))
    _check_completed(row, location)
    content = await _content(site_of(request), row, encoding)
    headers = {"Content-Location": f"{location}/audio"}
    return Response(content, 200, headers, media_type_of(encoding, row))


def _check_completed(row: Generation, location: str) -> None:
    if row.status == FAILED:
        detail = f"Generation {row.id} has failed: {row.error_message}"
        raise _without_audio(GENERATION_FAILED, detail, location)
    if row.is_finished and not row.is_complete:
        raise _without_audio(WRONG_STATUS, f"Generation {row.id} was cancelled.", location)
    if not row.is_finished:
        detail = f"Generation {row.id} is not finished yet, and goes on; `Location` leads to it."
        raise _without_audio(NOT_FINISHED, detail, location)
    if not has_audio(row):
        raise _without_audio(GONE, "The audio was deleted or moved.", location)


def _without_audio(kind: Kind, detail: str, location: str) -> ProblemError:
    return ProblemError(kind, detail, headers={"Location": location})


async def _content(site: Site, row: Generation, encoding: Encoding) -> bytes:
    """Return the stored bytes if they are in this encoding, else the encoded ones."""
    check_sent(site, row)
    try:
        if encoding == Encoding(encoding.codec) and encoding.codec == stored_format(row):
            return b"".join([chunk async for chunk in content_of(row)])
        async with site.transcodes.limiter:
            return await encoded_content(row, encoding)
    except ArtifactError:
        await check_there(row)
        raise


@contextmanager
def _connected(request: Request) -> Iterator[None]:
    """Do what is inside only as long as the client is there."""
    with anyio.CancelScope() as scope:
        listener = asyncio.create_task(_cancel_after_hang_up(request, scope))
        try:
            yield
        finally:
            listener.cancel()


async def _cancel_after_hang_up(request: Request, scope: anyio.CancelScope) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
