"""``GET generations/{id}/preview``: the audio of a generation, heard while it is made."""

from __future__ import annotations

import logging
from contextlib import aclosing

import anyio
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dgx_music.artifacts.interface import CHUNK_BYTES
from dgx_music.client.listening import watch_attempt, wav_header
from dgx_music.errors import DgxMusicError, NoAudioError
from dgx_music.statuses import PROCESSING
from dgx_music.storage import Generation
from dgx_music.web import documents
from dgx_music.web.access import MayRead
from dgx_music.web.audio import send_content
from dgx_music.web.contents import find_content
from dgx_music.web.names import MEDIA_TYPES
from dgx_music.web.options import MOST_PREVIEWS
from dgx_music.web.problems import RETRY_SECONDS, TOO_MANY_STREAMS, ProblemError
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import find_row
from dgx_music.web.site import Site, site_of
from dgx_music.web.streams import cancel_when_left

_STREAM_SECONDS = 3_600.0
_END_SECONDS = 1.0
_ANSWERS = documents.answers(
    {
        200: ("A WAV file as a stream.", None),
        206: ("Of a completed generation, the bytes that `Range` asks for.", None),
    },
    errors=[404, 409, 410, 416],
)
for _status in (200, 206):
    _ANSWERS[_status]["content"] = {MEDIA_TYPES["wav"]: documents.BYTES}

logger = logging.getLogger(__name__)
router = APIRouter(
    prefix="/generations/{generation_id}", route_class=MusicRoute, tags=["generations"]
)


@router.get("/preview", response_class=StreamingResponse, responses=_ANSWERS)
async def get_preview(generation_id: str, request: Request, access: MayRead) -> Response:
    """Send the audio from its beginning while it is made, and in the end the rest of it.

    The answer ends with the attempt: if that fails, it is shorter than its header says.
    """
    row, site = await find_row(generation_id, access), site_of(request)
    if row.is_complete:
        return await _send_whole(row, request)
    if row.status != PROCESSING:
        raise NoAudioError(row.id, row.status)
    stream = PreviewStream(site, row)
    try:
        site.listeners.acquire_on_behalf_of_nowait(stream)
    except anyio.WouldBlock:
        detail = f"{MOST_PREVIEWS} generations are being listened to, and no more can be now."
        headers = {"Retry-After": str(RETRY_SECONDS)}
        raise ProblemError(TOO_MANY_STREAMS, detail, headers=headers) from None
    return stream


async def _send_whole(row: Generation, request: Request) -> Response:
    content = await find_content(site_of(request), row, "wav")
    headers = {"Cache-Control": "no-store", "ETag": f'"{content.sha256}"'}
    return await send_content(row, content, request, headers)


class PreviewStream(Response):
    """Sends the audio of one attempt until it ends, the client leaves, or the server stops."""

    media_type = MEDIA_TYPES["wav"]

    def __init__(self, site: Site, row: Generation) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._site = site
        self._row = row

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        is_ended = False
        try:
            with self._site.stops.waiting(_STREAM_SECONDS):
                await send(start)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancel_when_left, receive, tasks.cancel_scope)
                    await self._send_audio(send)
                    await _send_end(send)
                    is_ended = True
                    tasks.cancel_scope.cancel()
        finally:
            self._site.listeners.release_on_behalf_of(self)
        if not is_ended:  # the server stops; a client that reads nothing is not waited for
            with anyio.move_on_after(_END_SECONDS):
                await _send_end(send)

    async def _send_audio(self, send: Send) -> None:
        row = self._row
        await _send_part(send, wav_header(row))
        try:
            async with aclosing(watch_attempt(row.id, row.attempt, self._site.artifacts)) as parts:
                async for part in parts:
                    for at in range(0, len(part.pcm), CHUNK_BYTES):
                        await _send_part(send, part.pcm[at : at + CHUNK_BYTES])
        except NoAudioError:
            return
        except DgxMusicError as error:  # the answer has begun, so it can only end early
            logger.warning("preview of generation %s: %s", self._row.id, error)


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _send_end(send: Send) -> None:
    await send({"type": "http.response.body", "body": b"", "more_body": False})
