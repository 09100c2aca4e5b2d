"""Ogg (RFC 3533): its pages are walked and their checksums verified, and what was chained is taken apart.

libogg leaves out in silence each page that is damaged, and libsndfile whatever comes after the first stream of a chain.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from dgx_music.containers.interface import DamagedError, Source

_MAGIC = b"OggS"
_HEADER_BYTES = 27
_FIRST, _LAST = 2, 4
_NO_POSITION = 2**64 - 1
_FAR = 1 << 40
"""Frames: more than any file has, so that no position ends a stream early."""
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True)
class _Page:
    start: int
    data: bytes

    @property
    def is_first(self) -> bool:
        return bool(self.data[5] & _FIRST)

    @property
    def position(self) -> int:
        return int.from_bytes(self.data[6:14], "little")

    @property
    def serial(self) -> bytes:
        return self.data[14:18]

    @property
    def number(self) -> int:
        return int.from_bytes(self.data[18:22], "little")

    @property
    def is_sound(self) -> bool:
        return _checksum(self.data) == int.from_bytes(self.data[22:26], "little")

    @property
    def ends_packet(self) -> bool:
        return any(size < 255 for size in self.data[_HEADER_BYTES : _HEADER_BYTES + self.data[26]])

    def closing(self, position: int) -> bytes:
        """Return the page as the last one of a stream that ends at this position."""
        data = self.data[:5] + bytes([self.data[5] | _LAST]) + position.to_bytes(8, "little") + self.data[14:]
        return data[:22] + _checksum(data).to_bytes(4, "little") + data[26:]


@dataclass
class _Link:
    """One file of a chain; streams that run side by side belong to the same."""

    pages: list[_Page] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)
    is_open: bool = True
    """Whether all pages so far begin a stream."""

    def add(self, page: _Page) -> None:
        if page.number != self.numbers.get(page.serial, page.number - 1) + 1:
            raise DamagedError("is damaged: a page of it is missing")
        self.numbers[page.serial] = page.number
        self.is_open = self.is_open and page.is_first
        self.pages.append(page)

    def content(self) -> bytes:
        """Return the pages, the stream closed, and its end moved away where it lies before what the pages hold."""
        *others, last = self.pages
        before = max((page.position for page in others if page.position != _NO_POSITION), default=0)
        is_early = last.position <= before or last.position == _NO_POSITION
        position = before + _FAR if is_early and last.ends_packet else last.position
        return b"".join(page.data for page in others) + last.closing(position)


def open_source(content: bytes) -> Source:
    """Return the links of the chain, one file each; raises ``DamagedError``."""
    links: list[_Link] = []
    for page in _walk(content):
        if not links or (page.is_first and not links[-1].is_open):
            links.append(_Link())
        links[-1].add(page)
    return Source([link.content() for link in links])


def _walk(content: bytes) -> Iterator[_Page]:
    start = 0
    while content.startswith(_MAGIC, start):
        sizes = content[start + _HEADER_BYTES :][: content[start + 26]] if start + 26 < len(content) else b""
        end = start + _HEADER_BYTES + len(sizes) + sum(sizes)
        if end > len(content) or start + _HEADER_BYTES > len(content) or len(sizes) < content[start + 26]:
            raise DamagedError("ends in the middle")
        page = _Page(start, content[start:end])
        if not page.is_sound:
            raise DamagedError("is damaged: a page of it does not have its checksum")
        yield page
        start = end
    if content.find(_MAGIC, start) != -1:
        raise DamagedError("is damaged: something else stands among its pages")


def _checksum(page: bytes) -> int:
    """Return Ogg's CRC of a page, whose own field counts as zero: zlib's, of the bits in the other order."""
    bare = page[:22] + bytes(4) + page[26:]
    mirrored = zlib.crc32(bare.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{mirrored:032b}"[::-1], 2)
