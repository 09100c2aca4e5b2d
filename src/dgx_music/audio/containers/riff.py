"""WAV and RF64: the end of the samples is found from what follows them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from dgx_music.audio.containers import mpeg
from dgx_music.audio.containers.interface import (
    OTHER_AUDIO,
    READABLE,
    DamagedError,
    Source,
    skip_id3,
)

_BEGINNINGS = (b"RIFF", b"RIFX", b"RF64")
_UNKNOWN_BYTES = 0x7F00_0000
"""A program that cannot go back to write a size writes one like this, or none."""
_NO_SIZE = 0xFFFF_FFFF
"""It is said elsewhere, or not known."""
_MPEG_TAGS = (0x50, 0x55)
_PLAIN, _EXTENSIBLE = (1, 3), 0xFFFE
"""Formats whose frames all have the same size: integer, float, and extensible."""
_SECOND = re.compile(rb"(?:RIFF|RIFX|RF64)....WAVE", re.DOTALL)
_AUDIO_CHUNKS = (b"data", b"RIFF", b"RIFX", b"RF64")
_MOST_PADDING = 1_024
"""Bytes of nothing that are looked over for another file behind them."""
_HEADER_BYTES = 8


def find_source(content: bytes, longest_seconds: float) -> Source | None:
    """Return the file with the true size of its data; ``None`` if it is neither WAV nor RF64.

    Raises ``DamagedError`` if it was cut.
    """
    if not content.startswith(_BEGINNINGS):
        return None
    order = ">" if content.startswith(b"RIFX") else "<"
    chunks = {name: (start, size) for name, start, size in _chunks_before_data(content, order)}
    if b"data" not in chunks or b"fmt " not in chunks:
        raise DamagedError("is not audio that can be read", READABLE)
    start, size = chunks[b"data"]
    riff_size = _read(content, f"{order}I", 4)
    if b"ds64" in chunks:
        sizes = chunks[b"ds64"][0]
        riff_size = _read(content, "<Q", sizes) if riff_size == _NO_SIZE else riff_size
        size = _read(content, "<Q", sizes + 8) if size == _NO_SIZE else size
    end = _find_end(content, start, size, riff_size, order)
    at, length = chunks[b"fmt "]
    fmt = content[at : at + length]
    if _read(fmt, f"{order}H", 0) in _MPEG_TAGS:
        inner = mpeg.find_source(content[start:end], longest_seconds)
        if inner is None:
            raise DamagedError("is not audio that can be read", READABLE)
        return inner
    _check_format(fmt, order)
    bytes_per_second = _read(fmt, f"{order}I", 8)
    is_told = bytes_per_second and 0 < size < end - start
    return Source(
        [_make_file(order, fmt, content[start:end])], size / bytes_per_second if is_told else None
    )


def _check_format(fmt: bytes, order: str) -> None:
    """Raise if the numbers of the format contradict each other: one of them is wrong."""
    form, channels, rate, per_second, per_frame, bits = struct.unpack(
        f"{order}HHIIHH", fmt[:16].ljust(16, b"\0")
    )
    form = _read(fmt, f"{order}H", 24) if form == _EXTENSIBLE else form
    if form not in _PLAIN:
        return
    given = channels * ((bits + 7) // 8)
    if per_frame != given:
        problem = f"says {per_frame:,} bytes a frame, but its channels and bits give {given:,}"
        raise DamagedError(problem, "use a file whose header is right")
    if per_second != rate * per_frame:
        wanted = f"but its sample rate and frame size give {rate * per_frame:,}"
        problem = f"says {per_second:,} bytes a second, {wanted}"
        raise DamagedError(problem, "use a file whose header is right")


def _chunks_before_data(content: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield each chunk's name, the start of its content, and its size; the last is ``data``."""
    start = 12
    while start + _HEADER_BYTES <= len(content):
        name, size = content[start : start + 4], _read(content, f"{order}I", start + 4)
        start += _HEADER_BYTES
        yield name, start, size
        if name == b"data":
            return
        start += size + size % 2


def _find_end(content: bytes, start: int, size: int, riff_size: int, order: str) -> int:
    """Return the end of the samples: the header's, if only chunks follow, else the file's."""
    end = start + size
    if end > len(content):
        # If the size of the whole is right, the size of the data is wrong.
        is_whole = abs(riff_size + _HEADER_BYTES - len(content)) <= 1
        if size < _UNKNOWN_BYTES and not is_whole:
            raise DamagedError("ends in the middle")
    else:
        if size:
            _check_no_file(content, end)
        if any(_are_chunks(content, at, order) for at in (end, end + size % 2)):
            return end
    if _SECOND.search(content, start):
        raise DamagedError("holds something else after its audio")
    return len(content)


def _check_no_file(content: bytes, start: int) -> None:
    """Raise if another file begins here, or after some padding."""
    start = skip_id3(content, start)
    padding = content[start : start + _MOST_PADDING]
    start += len(padding) - len(padding.lstrip(b"\0"))
    if OTHER_AUDIO.match(content, start) or mpeg.is_run(content, start):
        raise DamagedError("holds something else after its audio")


def _are_chunks(content: bytes, start: int, order: str) -> bool:
    """Return whether nothing else begins here; a few bytes are too short for a chunk and a sound.

    Raises ``DamagedError`` if one of the chunks holds audio too.
    """
    names = set()
    while start + _HEADER_BYTES <= len(content):
        name, size = content[start : start + 4], _read(content, f"{order}I", start + 4)
        start += _HEADER_BYTES + size
        if start > len(content) or not all(0x20 <= byte < 0x7F for byte in name):
            return False
        names.add(name)
        start += size % 2
    if names.intersection(_AUDIO_CHUNKS):
        raise DamagedError("holds something else after its audio")
    return True


def _make_file(order: str, fmt: bytes, samples: bytes) -> bytes:
    """Return a file of RIFF's plain kind with nothing but these two chunks."""
    chunks = b"WAVE" + b"".join(
        name + struct.pack(f"{order}I", len(data)) + data
        for name, data in ((b"fmt ", fmt), (b"data", samples))
    )
    return (b"RIFX" if order == ">" else b"RIFF") + struct.pack(f"{order}I", len(chunks)) + chunks


def _read(content: bytes, form: str, start: int) -> int:
    """Return the number that is stored there, 0 if the file is too short."""
    size = struct.calcsize(form)
    number: int = struct.unpack(form, content[start : start + size].ljust(size, b"\0"))[0]
    return number
