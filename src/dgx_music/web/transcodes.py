"""Finished audio in other formats than the stored one: made once, and kept for who asks again."""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import AsyncGenerator
from typing import TypeAlias

from anyio import CapacityLimiter, Lock, to_thread

from dgx_music.artifacts.interface import CHUNK_BYTES
from dgx_music.client.content import content_of
from dgx_music.storage import Generation
from dgx_music.validation import AudioFormat
from dgx_music.web.options import MOST_TRANSCODES, TRANSCODED_BYTES, TRANSCODED_FILES

Key: TypeAlias = tuple[str, str | None, AudioFormat, str | None]
"""The row, the hash of its file, the format, and the title: all that the new file depends on."""


class Transcode:
    """One file in another format: a temporary file without a name, so nothing is ever left over."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)  # once nobody reads it any more

    async def read(self, start: int, length: int) -> AsyncGenerator[bytes, None]:
        """Yield so many bytes from there on."""
        end = start + length
        while start < end:
            count = min(CHUNK_BYTES, end - start)
            chunk = await to_thread.run_sync(os.pread, self._file, count, start)
            start += len(chunk)
            yield chunk


class Transcodes:
    """The files that were made last, within a limit of bytes; a new process begins without any."""

    def __init__(self, most_bytes: int = TRANSCODED_BYTES) -> None:
        self.limiter = CapacityLimiter(MOST_TRANSCODES)
        """For all work that turns audio into another format."""
        self._most_bytes = most_bytes
        self._kept: dict[Key, Transcode] = {}
        self._making: weakref.WeakValueDictionary[Key, Lock] = weakref.WeakValueDictionary()

    async def get(self, row: Generation, audio_format: AudioFormat) -> Transcode:
        """Return a completed row's audio in this format; those who ask at once share one file.

        Raises ``ArtifactError`` if the stored audio is not there or damaged, and ``OSError`` if
        there is no room.
        """
        key = (row.id, row.sha256, audio_format, row.title)
        async with self._making.setdefault(key, Lock()):
            found = self._kept.pop(key, None) or await self._make(row, audio_format)
            self._kept[key] = found  # as the one that was used last
        self._forget_oldest()
        return found

    async def _make(self, row: Generation, audio_format: AudioFormat) -> Transcode:
        async with self.limiter:
            data = b"".join([chunk async for chunk in content_of(row, audio_format)])
            return await to_thread.run_sync(Transcode, data)

    def _forget_oldest(self) -> None:
        while (
            len(self._kept) > TRANSCODED_FILES
            or sum(each.size for each in self._kept.values()) > self._most_bytes
        ):
            del self._kept[next(iter(self._kept))]
