"""What is sent of a generation's audio: the stored file, or the same music in another format."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

from dgx_music.artifacts import open_place_of
from dgx_music.artifacts.interface import parse_name
from dgx_music.client.content import check_convertible, path_of, stored_format, stream_row
from dgx_music.errors import ArtifactError
from dgx_music.storage import Generation
from dgx_music.validation import AudioFormat
from dgx_music.web.problems import GONE, RETRY_SECONDS, STORAGE_AWAY, ProblemError
from dgx_music.web.rows import has_audio
from dgx_music.web.site import Site

_GONE = "The audio was deleted or moved."
_NO_ROOM = "The server has no room to convert the audio now; try again in some seconds."


@dataclass(frozen=True)
class Content:
    """A file to be sent, whole or in parts."""

    audio_format: str
    size: int
    sha256: str
    read: Callable[[int, int], AsyncGenerator[bytes, None]]
    """Yields bytes; is given the first one and their number."""


async def find_content(site: Site, row: Generation, wanted: AudioFormat | None) -> Content:
    """Return the audio of a completed row, in this format if one is wanted.

    Raises ``ProblemError`` if the audio is gone, or is of a file that is not sent, and
    ``InvalidRequestError`` if this machine cannot write the format.
    """
    if not has_audio(row):
        raise ProblemError(GONE, _GONE)
    size, sha256 = cast("int", row.file_size_bytes), cast("str", row.sha256)
    stored = Content(stored_format(row), size, sha256, partial(stream_row, row))
    if wanted is None or wanted == stored.audio_format:
        return stored
    check_convertible(row, wanted)
    return await _converted(site, row, wanted)


async def begin(
    site: Site, row: Generation, content: Content, start: int, length: int
) -> tuple[bytes, AsyncGenerator[bytes, None]]:
    """Return the first chunk and the rest: so a missing file is noticed before the answer begins."""
    check_sent(site, row)
    chunks = content.read(start, length)
    try:
        first = await anext(chunks, b"")
    except ArtifactError:
        await check_there(row)
        raise
    if length and not first:  # somebody has put a shorter file in its place
        raise ProblemError(GONE, _GONE)
    return first, chunks


async def _converted(site: Site, row: Generation, wanted: AudioFormat) -> Content:
    check_sent(site, row)
    try:
        made = await site.transcodes.get(row, wanted)
    except ArtifactError:
        await check_there(row)
        raise
    except OSError:
        headers = {"Retry-After": str(RETRY_SECONDS)}
        raise ProblemError(STORAGE_AWAY, _NO_ROOM, headers=headers) from None
    return Content(wanted, made.size, made.sha256, made.read)


def check_sent(site: Site, row: Generation) -> None:
    """Raise ``ProblemError`` if the file is of another output, and no worker made it for this row."""
    try:
        path = path_of(row)
    except ArtifactError:
        raise ProblemError(GONE, _GONE) from None
    named = parse_name(path.rpartition("/")[2])
    if not (site.artifacts.holds(path) or (named is not None and named[0] == row.id)):
        raise ProblemError(GONE, _GONE)


async def check_there(row: Generation) -> None:
    """Raise ``ProblemError`` if the file is gone."""
    path = path_of(row)
    if not await open_place_of(path).exists(path):
        raise ProblemError(GONE, _GONE)
