"""The encodings that hosted services name: by bit rate (MP3, Opus) or by sample rate (files, raw)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Codec: TypeAlias = Literal["mp3", "opus", "wav", "flac", "pcm", "ulaw", "alaw"]

_OPUS_RATE = 48_000
_LIBSNDFILE: Mapping[Codec, Mapping[str, str]] = {
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "wav": {"format": "WAV", "subtype": "PCM_16"},
    "flac": {"format": "FLAC", "subtype": "PCM_16"},
    "pcm": {"format": "RAW", "subtype": "PCM_16", "endian": "LITTLE"},
    "ulaw": {"format": "RAW", "subtype": "ULAW"},
    "alaw": {"format": "RAW", "subtype": "ALAW"},
}
_TELEPHONY = ("ulaw", "alaw")
_RAW = ("pcm", *_TELEPHONY)
_MPEG_1_RATE = 32_000
"""From this rate on an MP3 is MPEG-1, which has other bit rates than MPEG-2."""
_MPEG_1_KBPS, _MPEG_2_KBPS = (32, 320), (8, 160)
_OPUS_KBPS = (6, 256)
"""Of each channel."""
_WEAKEST = 0.9999
"""libsndfile refuses a compression level of 1."""


@dataclass(frozen=True)
class Encoding:
    """How audio is written; what is ``None`` stays as it is in the stored file, or as is usual."""

    codec: Codec
    sample_rate: int | None = None
    """In Hz."""
    kbps: int | None = None
    """Of an MP3 or of Opus, all channels together; the nearest that there is."""

    @property
    def is_raw(self) -> bool:
        """True if the bytes are samples alone: of 16 bits, little-endian, or of 8 bits (G.711)."""
        return self.codec in _RAW

    def rate_for(self, stored: int) -> int:
        """Return the sample rate in Hz for audio that is stored at this one."""
        return _OPUS_RATE if self.codec == "opus" else self.sample_rate or stored

    def channels_for(self, stored: int) -> int:
        """Return the channels for audio that is stored with so many: telephony has one."""
        return 1 if self.codec in _TELEPHONY else stored

    def options(self, sample_rate: int, channels: int) -> dict[str, str | float]:
        """Return what libsndfile is told to write this."""
        told: dict[str, str | float] = dict(_LIBSNDFILE[self.codec])
        if self.kbps is not None:
            told["compression_level"] = self._level(self.kbps, sample_rate, channels)
        return told

    def _level(self, kbps: int, sample_rate: int, channels: int) -> float:
        """Return the compression level, which libsndfile makes a bit rate of again."""
        if self.codec == "opus":
            (low, high), wanted = _OPUS_KBPS, kbps / channels
        else:
            low, high = _MPEG_1_KBPS if sample_rate >= _MPEG_1_RATE else _MPEG_2_KBPS
            wanted = kbps
        return min(max((high - wanted) / (high - low), 0.0), _WEAKEST)
