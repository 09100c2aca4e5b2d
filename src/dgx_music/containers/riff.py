"""WAV, RF64 too: where the samples end, found by what follows them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dgx_music.containers import mpeg
from dgx_music.containers.interface import READABLE, DamagedError, Source

_UNKNOWN_BYTES = 0x7F00_0000
"""Who cannot go back to write a size writes one like this, or none."""
_MPEG_TAGS = (0x50, 0x55)
_HEADER_BYTES = 8


def open_source(content: bytes, longest_seconds: float) -> Source:
    """Return the file with the size of its data as it is; raises ``DamagedError`` where it was cut short."""
    order = ">" if content.startswith(b"RIFX") else "<"
    chunks = {name: (start, size) for name, start, size in _chunks_before_data(content, order)}
    if b"data" not in chunks or b"fmt " not in chunks:
        raise DamagedError("is not audio that can be read", READABLE)
    start, size = chunks[b"data"]
    if size == 0xFFFF_FFFF and b"ds64" in chunks:
        size = _read(content, "<Q", chunks[b"ds64"][0] + 8)
    end = _find_end(content, start, size, _read(content, f"{order}I", 4), order)
    at, length = chunks[b"fmt "]
    fmt = content[at : at + length]
    if _read(fmt, f"{order}H", 0) in _MPEG_TAGS:
        inner = mpeg.find_source(content[start:end], longest_seconds)
        if inner is None:
            raise DamagedError("is not audio that can be read", READABLE)
        return inner
    bytes_per_second = _read(fmt, f"{order}I", 8)
    is_told = bytes_per_second and 0 < size < _UNKNOWN_BYTES and size != end - start
    return Source([_make_file(order, fmt, content[start:end])], size / bytes_per_second if is_told else None)


def _chunks_before_data(content: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Yield the name of each chunk, where its content starts, and the size it says; the data are the last."""
    start = 12
    while start + _HEADER_BYTES <= len(content):
        name, size = content[start : start + 4], _read(content, f"{order}I", start + 4)
        start += _HEADER_BYTES
        yield name, start, size
        if name == b"data":
            return
        start += size + size % 2


def _find_end(content: bytes, start: int, size: int, riff_size: int, order: str) -> int:
    """Return where the samples end: where it is said, if nothing but chunks follows, else at the end of the file."""
    end = start + size
    if end > len(content):
        if riff_size < _UNKNOWN_BYTES and riff_size + _HEADER_BYTES >= end:  # two sizes agree: it was whole once
            raise DamagedError("ends in the middle")
        return len(content)
    return end if any(_are_chunks(content, at, order) for at in (end, end + size % 2)) else len(content)


def _are_chunks(content: bytes, start: int, order: str) -> bool:
    """Return whether nothing else begins here; a few bytes are too short for a chunk and for a sound."""
    while start + _HEADER_BYTES <= len(content):
        name, size = content[start : start + 4], _read(content, f"{order}I", start + 4)
        start += _HEADER_BYTES + size
        if start > len(content) or not all(0x20 <= byte < 0x7F for byte in name):
            return False
        start += size % 2
    return True


def _make_file(order: str, fmt: bytes, samples: bytes) -> bytes:
    """Return a file of RIFF's plain kind with nothing but these two chunks."""
    chunks = b"WAVE" + b"".join(
        name + struct.pack(f"{order}I", len(data)) + data for name, data in ((b"fmt ", fmt), (b"data", samples))
    )
    return (b"RIFX" if order == ">" else b"RIFF") + struct.pack(f"{order}I", len(chunks)) + chunks


def _read(content: bytes, form: str, start: int) -> int:
    """Return the number that is stored there, 0 where the file is too short."""
    size = struct.calcsize(form)
    number: int = struct.unpack(form, content[start : start + size].ljust(size, b"\0"))[0]
    return number
