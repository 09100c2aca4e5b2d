"""FLAC: the number of samples in its header is taken out; libFLAC then reads to the end, and reports a frame cut short."""

from __future__ import annotations

from dgx_music.containers.interface import DamagedError, Source

_STREAMINFO = slice(18, 26)  # rate (20 bits), channels (3), bits (5), samples (36)
_SAMPLES = (1 << 36) - 1


def open_source(content: bytes) -> Source:
    """Return the file with its length left open."""
    facts = int.from_bytes(content[_STREAMINFO], "big")
    rate, promised = facts >> 44, facts & _SAMPLES
    if len(content) < _STREAMINFO.stop or not rate:
        raise DamagedError("is FLAC whose header is damaged")
    header = content[: _STREAMINFO.start] + (facts & ~_SAMPLES).to_bytes(8, "big")
    return Source([header + content[_STREAMINFO.stop :]], promised / rate if promised else None)
