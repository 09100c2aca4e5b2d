"""Ogg (RFC 3533): pages are followed, checksums verified, and chained streams taken apart.

libogg leaves out each damaged page without an error, and libsndfile all streams of a chain but the
first. Both believe the positions in the pages, and cut the audio to them: for Vorbis and Opus the
positions are counted here again.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from dgx_music.audio.containers import packets
from dgx_music.audio.containers.interface import DamagedError, Source

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

    @property
    def is_last(self) -> bool:
        return bool(self.data[5] & _LAST)

    def pieces(self) -> Iterator[tuple[bytes, bool]]:
        """Yield the page's parts of packets, each with whether its packet ends there."""
        sizes = self.data[_HEADER_BYTES : _HEADER_BYTES + self.data[26]]
        start = _HEADER_BYTES + len(sizes)
        for size in sizes:
            yield self.data[start : start + size], size < 255
            start += size

    def placed(self, position: int, *, is_last: bool) -> bytes:
        """Return the page as one that ends at this position, and with it its stream or not."""
        flags = self.data[5] & ~_LAST | (_LAST if is_last else 0)
        data = self.data[:5] + bytes([flags]) + position.to_bytes(8, "little") + self.data[14:]
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
        """Return the pages, positions counted; raises ``DamagedError`` if the end is missing."""
        if not all(page.is_last for page in {page.serial: page for page in self.pages}.values()):
            raise DamagedError("is cut: its end is missing")
        found = list(self._packets()) if len(self.numbers) == 1 else []
        lengths = packets.lengths([packet for packet, _ in found])
        return (
            self._move_end()
            if lengths is None
            else self._count_anew(lengths, [page for _, page in found])
        )

    def _packets(self) -> Iterator[tuple[bytes, int]]:
        """Yield each packet and the number of the page that it ends on."""
        packet: list[bytes] = []
        for number, page in enumerate(self.pages):
            for piece, is_end in page.pieces():
                packet.append(piece)
                if is_end:
                    yield b"".join(packet), number
                    packet.clear()
        if packet:
            raise DamagedError("ends in the middle")

    def _count_anew(self, lengths: list[int], ends_on: list[int]) -> bytes:
        counts = Counter[int]()
        for length, number in zip(lengths, ends_on, strict=True):
            counts[number] += length
        positions, total = [], 0
        for number in range(len(self.pages)):
            total += counts[number]
            positions.append(total)
        positions[-1] -= self._silence_after(positions, longest=2 * max(lengths, default=0))
        last = len(self.pages) - 1
        return b"".join(
            page.placed(position if number in counts else _NO_POSITION, is_last=number == last)
            for number, (page, position) in enumerate(zip(self.pages, positions, strict=True))
        )

    def _silence_after(self, counted: list[int], longest: int) -> int:
        """Return how many samples the encoder added to the last packet.

        That is computed from the last page's position.
        """
        shifts = Counter(
            page.position - count
            for page, count in zip(self.pages[:-1], counted, strict=False)
            if count and page.position != _NO_POSITION
        )
        shift = shifts.most_common(1)[0][0] if shifts else 0
        left_out = counted[-1] + shift - self.pages[-1].position
        return left_out if 0 <= left_out <= min(longest, counted[-1]) else 0

    def _move_end(self) -> bytes:
        """Return the pages of an unknown codec; an end that is too early is moved."""
        *others, last = self.pages
        before = max((page.position for page in others if page.position != _NO_POSITION), default=0)
        is_early = last.position <= before or last.position == _NO_POSITION
        position = before + _FAR if is_early and last.ends_packet else last.position
        return b"".join(page.data for page in others) + last.placed(position, is_last=True)


def find_source(content: bytes, _longest_seconds: float) -> Source | None:
    """Return the links of the chain, one file each; ``None`` if it is no Ogg.

    Raises ``DamagedError``.
    """
    if not content.startswith(_MAGIC):
        return None
    links: list[_Link] = []
    for page in _walk(content):
        if not links or (page.is_first and not links[-1].is_open):
            links.append(_Link())
        links[-1].add(page)
    return Source([link.content() for link in links])


def _walk(content: bytes) -> Iterator[_Page]:
    start = 0
    while content.startswith(_MAGIC, start):
        head = start + _HEADER_BYTES
        sizes = content[head : head + content[head - 1]] if head <= len(content) else b""
        end = start + _HEADER_BYTES + len(sizes) + sum(sizes)
        if (
            end > len(content)
            or start + _HEADER_BYTES > len(content)
            or len(sizes) < content[start + 26]
        ):
            raise DamagedError("ends in the middle")
        page = _Page(start, content[start:end])
        if not page.is_sound:
            raise DamagedError("is damaged: a page of it does not have its checksum")
        yield page
        start = end
    if content.find(_MAGIC, start) != -1:
        raise DamagedError("is damaged: something else stands among its pages")
    if content[start:].strip(b"\0"):
        raise DamagedError("holds something else after its audio")


def _checksum(page: bytes) -> int:
    """Return Ogg's CRC of a page, its own field as zero: zlib's CRC with the bits reversed."""
    bare = page[:22] + bytes(4) + page[26:]
    mirrored = zlib.crc32(bare.translate(_REVERSED), 0xFFFF_FFFF) ^ 0xFFFF_FFFF
    return int(f"{mirrored:032b}"[::-1], 2)
