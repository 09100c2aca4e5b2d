"""``GET generations/{id}/audio`` and ``…/waveform``: the finished audio, whole or in parts."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send

from dgx_music.client.generations import audio_facts
from dgx_music.errors import ArtifactError, InvalidRequestError, NoAudioError
from dgx_music.storage import Generation
from dgx_music.validation import check_integer, shown
from dgx_music.web import documents
from dgx_music.web.access import Access, MayRead
from dgx_music.web.contents import Content, begin, find_content
from dgx_music.web.filters import Parameter, read_flag, read_integer, read_parameters
from dgx_music.web.names import MEDIA_TYPES, disposition, file_name, media_type_of
from dgx_music.web.problems import GONE, NO_SUCH_RANGE, ProblemError
from dgx_music.web.ranges import NoSuchRangeError, is_known, is_same, parse_range
from dgx_music.web.route import MusicRoute
from dgx_music.web.rows import find_row
from dgx_music.web.site import site_of

logger = logging.getLogger(__name__)

MOST_POINTS = 1_000
_DEFAULT_POINTS = 200

router = APIRouter(
    prefix="/generations/{generation_id}", route_class=MusicRoute, tags=["generations"]
)


def _read_format(name: str, text: str) -> str:
    if text not in MEDIA_TYPES:
        raise InvalidRequestError(name, f"is {shown(text)}", f"use {', '.join(MEDIA_TYPES)}")
    return text


_OF_AUDIO = (
    Parameter(
        "format",
        {"enum": [*MEDIA_TYPES]},
        "Converted to this format, if the audio has another one; as it is stored if not given.",
        _read_format,
    ),
    Parameter("download", {"type": "boolean"}, "If true, a browser saves it.", read_flag),
)
_OF_WAVEFORM = (
    Parameter(
        "points",
        {"type": "integer", "minimum": 1, "maximum": MOST_POINTS, "default": _DEFAULT_POINTS},
        "How many peaks at most.",
        read_integer,
    ),
)
_AUDIO_ANSWERS = documents.answers(
    {
        200: ("The file.", None),
        206: ("The bytes that `Range` asks for.", None),
        304: ("The client has this version.", None),
    },
    errors=[404, 409, 410, 416],
)
for _status in (200, 206):
    _AUDIO_ANSWERS[_status]["content"] = dict.fromkeys(MEDIA_TYPES.values(), documents.BYTES)


@router.get(
    "/audio",
    response_class=StreamingResponse,
    responses=_AUDIO_ANSWERS,
    openapi_extra=documents.parameters(*_OF_AUDIO),
)
async def get_audio(generation_id: str, request: Request, access: MayRead) -> Response:
    """Send the audio of a completed generation; players may ask for parts of it."""
    values = read_parameters(request, *_OF_AUDIO)
    row = await _find_completed(generation_id, access)
    content = await find_content(site_of(request), row, values.get("format"))
    name = file_name(row, content.audio_format)
    headers = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",  # to be asked for again by its ETag
        "Content-Disposition": disposition(name, is_attachment=values.get("download", False)),
        "ETag": f'"{content.sha256}"',
    }
    if is_known(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return await send_content(row, content, request, headers)


@router.head("/audio", include_in_schema=False)
async def head_audio(generation_id: str, request: Request, access: MayRead) -> Response:
    """Say what ``get_audio`` would send."""
    return await get_audio(generation_id, request, access)


@router.get(
    "/waveform",
    responses=documents.answers(
        {
            200: (
                "The peak of each of so many equal parts; full scale is 1.",
                documents.example({"duration_seconds": 16.0, "peaks": [0.1, 0.8, 0.5]}),
            )
        },
        errors=[404, 409, 410],
    ),
    openapi_extra=documents.parameters(*_OF_WAVEFORM),
)
async def get_waveform(generation_id: str, request: Request, access: MayRead) -> Response:
    """Send the peaks of a completed generation's audio, to be drawn."""
    values = read_parameters(request, *_OF_WAVEFORM)
    points = check_integer("points", values.get("points", _DEFAULT_POINTS), 1, MOST_POINTS)
    facts = audio_facts(await _find_completed(generation_id, access))
    if facts is None:
        raise ProblemError(GONE, "The generation was completed without a waveform.")
    peaks = _reduced([float(peak) for peak in facts.waveform], points)
    return JSONResponse({"duration_seconds": facts.duration_seconds, "peaks": peaks})


async def _find_completed(generation_id: str, access: Access) -> Generation:
    row = await find_row(generation_id, access)
    if not row.is_complete:
        raise NoAudioError(row.id, row.status)
    return row


async def send_content(
    row: Generation, content: Content, request: Request, headers: dict[str, str]
) -> Response:
    """Return the answer with the file, or the part of it that the request asks for.

    Of the headers, ``ETag`` must be given.
    """
    size, part = content.size, None
    if is_same(request.headers.get("if-range"), headers["ETag"]):
        part = _find_part(request.headers.get("range"), size)
    start, length = part or (0, size)
    headers |= {"Content-Length": str(length)}
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    is_head = request.method == "HEAD"  # one byte says that the file is there
    first, rest = await begin(
        site_of(request), row, content, start, min(length, 1) if is_head else length
    )
    status, media_type = 200 if part is None else 206, media_type_of(content.audio_format)
    if is_head:
        await rest.aclose()
        return Response(None, status, headers, media_type)
    return PartOfFile(_joined(first, rest), length, status, headers, media_type)


def _find_part(header: str | None, size: int) -> tuple[int, int] | None:
    try:
        return parse_range(header, size)
    except NoSuchRangeError:
        detail = f"The file has {size:,} bytes; ask for some of them."
        headers = {"Content-Range": f"bytes */{size}"}
        raise ProblemError(NO_SUCH_RANGE, detail, headers=headers) from None


class PartOfFile(StreamingResponse):
    """Sends so many bytes; if there are fewer, the connection ends, and the client notices it."""

    def __init__(self, content: AsyncIterator[bytes], length: int, *args: Any) -> None:
        super().__init__(content, *args)
        self._length = length

    async def stream_response(self, send: Send) -> None:
        """Send the answer; one that is broken off is told to the log only."""
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        left, why = self._length, "it is shorter than its row says"
        try:
            async for chunk in self.body_iterator:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                left -= len(chunk)
        except ArtifactError as error:
            why = str(error)
        if left:
            logger.warning("web: audio is broken off in the middle: %s", why)
            return  # the server below then ends the connection
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(rest):
        yield first
        async for chunk in rest:
            yield chunk


def _reduced(peaks: list[float], points: int) -> list[float]:
    """Return at most so many peaks, each the highest of its part."""
    count = min(points, len(peaks))
    starts = [part * len(peaks) // count for part in range(count)]
    ends = [*starts[1:], len(peaks)]
    return [max(peaks[start:end]) for start, end in zip(starts, ends, strict=True)]
