"""FLAC (RFC 9639): without the number of samples in the header, libFLAC reads to the true end.

libFLAC reports a frame that is cut, but not frames that are missing as a whole. So their numbers
are followed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from dgx_music.audio.containers.interface import DamagedError, Source

_MAGIC = b"fLaC"
_STREAMINFO = slice(18, 26)  # rate (20 bits), channels (3), bits (5), samples (36)
_SAMPLES = (1 << 36) - 1
_LARGEST_HEADER = 16
_CRC8 = 0x07
_CRC16 = 0x8005
_SYNC = re.compile(rb"\xff[\xf8\xf9]")
_CUT = "is damaged, or ends in the middle"


class _Frame(NamedTuple):
    start: int
    is_counted_in_samples: bool
    number: int
    samples: int

    @property
    def next_number(self) -> int:
        return self.number + (self.samples if self.is_counted_in_samples else 1)


def find_source(content: bytes, _longest_seconds: float) -> Source | None:
    """Return the file without its length; ``None`` if it is no FLAC.

    Raises ``DamagedError`` if frames of it are missing.
    """
    if not content.startswith(_MAGIC):
        return None
    facts = int.from_bytes(content[_STREAMINFO], "big")
    rate, promised = facts >> 44, facts & _SAMPLES
    if len(content) < _STREAMINFO.stop or not rate:
        raise DamagedError("is FLAC whose header is damaged")
    if _count_samples(content) < promised:
        raise DamagedError(_CUT)
    header = content[: _STREAMINFO.start] + (facts & ~_SAMPLES).to_bytes(8, "big")
    return Source([header + content[_STREAMINFO.stop :]], promised / rate if promised else None)


def _count_samples(content: bytes) -> int:
    """Return how many samples the frames hold; raises ``DamagedError`` if frames are missing."""
    count, last, summed_to, checksum = 0, None, 0, 0
    for frame in _frames(content):
        if last is None or frame.number == last.next_number:
            count, last, summed_to, checksum = count + frame.samples, frame, frame.start, 0
            continue
        checksum = _crc(content[summed_to : frame.start], _CRC16, 16, checksum)
        summed_to = frame.start
        if checksum == 0:  # a whole frame ends here, by its own checksum
            raise DamagedError("is damaged: frames of it are missing")
    return count


def _frames(content: bytes) -> Iterator[_Frame]:
    """Yield what looks like a frame's header; by chance some audio does too, with any number."""
    for found in _SYNC.finditer(content, _skip_metadata(content)):
        frame = _read_header(content, found.start())
        if frame is not None:
            yield frame


def _skip_metadata(content: bytes) -> int:
    start, is_last = 4, False
    while not is_last and start < len(content):
        is_last = content[start] >= 0x80
        start += 4 + int.from_bytes(content[start + 1 : start + 4], "big")
    return start


def _read_header(content: bytes, start: int) -> _Frame | None:
    """Return the frame whose header begins here; ``None`` if its checksum is wrong."""
    data = content[start : start + _LARGEST_HEADER]
    if len(data) < 6 or data[2] >> 4 == 0 or data[2] & 15 == 15:
        return None
    # As in UTF-8, the leading ones give the number of bytes.
    length = max(1, 8 - (data[4] ^ 0xFF).bit_length())
    place = 4 + length
    if length == 1:
        number = data[4]
    else:
        number = data[4] & (0x7F >> length)
        for byte in data[5:place]:
            number = number << 6 | byte & 0x3F
    size, rate = data[2] >> 4, data[2] & 15
    samples = _block_size(size, data[place : place + 2])
    place += {6: 1, 7: 2}.get(size, 0) + {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if place >= len(data) or _crc(data[:place], _CRC8, 8) != data[place]:
        return None
    return _Frame(start, bool(data[1] & 1), number, samples)


def _block_size(code: int, extra: bytes) -> int:
    if code == 1:
        return 192
    if code < 6:
        return 144 << code
    if code < 8:
        return int.from_bytes(extra[: code - 5], "big") + 1
    return 1 << code


def _crc(data: bytes, polynomial: int, bits: int, crc: int = 0) -> int:
    table, mask, shift = _TABLES[polynomial], (1 << bits) - 1, bits - 8
    for byte in data:
        crc = (crc << 8 & mask) ^ table[crc >> shift ^ byte]
    return crc


def _make_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = (crc << 1 ^ (polynomial if crc >> bits - 1 else 0)) & (1 << bits) - 1
        table.append(crc)
    return table


_TABLES = {_CRC8: _make_table(_CRC8, 8), _CRC16: _make_table(_CRC16, 16)}
