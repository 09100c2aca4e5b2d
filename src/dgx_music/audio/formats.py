"""The formats of audio files: for each, how it is recognised, read and written.

A new format needs an entry in ``FORMATS``, its name in ``validation.AudioFormat``, and a module in
``containers/`` that follows its files to their true ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from dgx_music.audio.containers import flac, mpeg, ogg, riff
from dgx_music.audio.containers.interface import READABLE, DamagedError, Source, find_tags
from dgx_music.validation import AudioFormat

FindSource: TypeAlias = Callable[[bytes, float], Source | None]
"""Returns what a decoder should get of a file's content, of at least the first so many seconds.

Returns ``None`` if the file is of another format; raises ``DamagedError``.
"""


@dataclass(frozen=True)
class Format:
    """One format of audio files."""

    find_source: FindSource
    names: tuple[str, ...]
    """What libsndfile calls its files; none if a process of its own decodes them."""
    encoding: Mapping[str, str | float] | None
    """What libsndfile is told to write one; ``None`` for WAV, which ``wav`` writes."""
    sample_rates: tuple[int, ...] | None = None
    """In Hz; ``None`` if a file can have any."""


FORMATS: Mapping[AudioFormat, Format] = {
    "wav": Format(riff.find_source, ("WAV", "WAVEX", "RF64"), None),
    "flac": Format(flac.find_source, ("FLAC",), {"format": "FLAC", "subtype": "PCM_16"}),
    "ogg": Format(ogg.find_source, ("OGG",), {"format": "OGG", "subtype": "VORBIS"}),
    "mp3": Format(  # the last one: it searches the file for frames
        mpeg.find_source,
        (),
        # LAME's best variable rate: libsndfile's default distorts a chord by 16 dB more
        {
            "format": "MP3",
            "subtype": "MPEG_LAYER_III",
            "bitrate_mode": "VARIABLE",
            "compression_level": 0.0,
        },
        (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
    ),
}

_TAKEN_FOR_MPEG = (b"\xff", b"ID3")
"""libsndfile would hand such a file to libmpg123, which writes to stderr that it is no MP3."""


def find_rate_problem(audio_format: AudioFormat, sample_rate: int) -> tuple[str, str] | None:
    """Return the problem and the remedy if the format cannot hold this rate in Hz."""
    rates = FORMATS[audio_format].sample_rates
    if rates is None or sample_rate in rates:
        return None
    known = ", ".join(f"{rate:,}" for rate in rates)
    return f"cannot hold {sample_rate:,} Hz", f"use one of {known} Hz, or another audio format"


def open_source(content: bytes, longest_seconds: float) -> Source:
    """Return what a decoder should get, of at least the first ``longest_seconds``; raises ``DamagedError``.

    A file of no known format is returned as it is; the decoder then refuses it by name.
    """
    start, end = find_tags(content)
    mpeg.check_tag(content, 0, start)
    mpeg.check_tag(content, end, len(content))
    content = content[start:end]
    for each in FORMATS.values():
        source = each.find_source(content, longest_seconds)
        if source is not None:
            return source
    if content.startswith(_TAKEN_FOR_MPEG):
        raise DamagedError("is not audio that can be read", READABLE)
    return Source([content])
