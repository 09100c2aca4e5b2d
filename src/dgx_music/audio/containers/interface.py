"""What every container comes to, and the tags that players put around any of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dgx_music.validation import AUDIO_FORMATS, one_of

READABLE = f"use {one_of([name.upper() for name in AUDIO_FORMATS])}"

OTHER_AUDIO = re.compile(
    rb"fLaC\0|OggS\0|(?:RIFF|RIFX|RF64|FORM)....(?:WAVE|AIF[FC])|riff\x2e\x91\xcf\x11|caff\0\x01|\.snd\0\0|....ftyp",
    re.DOTALL,
)
"""How audio files begin, except for MPEG."""

_ID3V1_BYTES = 128
_ID3V2_BYTES = 10
_APE_BYTES = 32
_APE_HAS_HEADER = 1 << 31


@dataclass(frozen=True)
class Source:
    """Files that a decoder reads to their true ends, one after the other."""

    parts: list[bytes]
    promised_seconds: float | None = None
    """The length by the file itself; ``None`` if it gave none, or if it is known to be right."""
    is_mpeg: bool = False
    """Whether its decoder writes complaints to stderr."""
    seconds: float | None = None
    """How long it is, if that can be counted without decoding."""


class DamagedError(Exception):
    """The file cannot be read whole: the problem, to follow the field's name, and the remedy."""

    def __init__(self, problem: str, remedy: str = "use a file that is whole") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


def find_tags(content: bytes) -> tuple[int, int]:
    """Return the end of the tags before the content, and the start of those after it (ID3, APE)."""
    start, end = skip_id3(content, 0), len(content)
    while (shorter := _end_before_tag(content, end)) != end:
        end = shorter
    return min(start, end), end


def skip_id3(content: bytes, start: int) -> int:
    """Return the end of the tags that begin here."""
    while content[start : start + 3] == b"ID3" and len(content) >= start + _ID3V2_BYTES:
        size = content[start + 6 : start + _ID3V2_BYTES]
        if max(size) > 127:
            break
        start += _ID3V2_BYTES + sum(byte << 7 * (3 - place) for place, byte in enumerate(size))
        start += _ID3V2_BYTES if content[start : start + 3] == b"3DI" else 0
    return start


def _end_before_tag(content: bytes, end: int) -> int:
    if end >= _ID3V1_BYTES and content[end - _ID3V1_BYTES : end - _ID3V1_BYTES + 3] == b"TAG":
        return end - _ID3V1_BYTES
    footer = content[max(0, end - _APE_BYTES) : end]
    if footer[:8] == b"APETAGEX":
        size = int.from_bytes(footer[12:16], "little")
        size += _APE_BYTES if int.from_bytes(footer[20:24], "little") & _APE_HAS_HEADER else 0
        return max(0, end - max(size, _APE_BYTES))
    return end
