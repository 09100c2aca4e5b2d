"""A whole audio file, of any program, as samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dgx_music.audio.containers.interface import DamagedError, Source
from dgx_music.audio.decoding import decode_quietly, open_stream
from dgx_music.audio.formats import open_source
from dgx_music.audio.samples import Audio
from dgx_music.errors import InvalidRequestError

LONGEST_SECONDS = 1_200
_MOST_BYTES = 1_000_000_000


def read_file(path: Path) -> Audio:
    """Return the audio of a file of 20 minutes at most; raises ``InvalidRequestError``."""
    try:
        audio = _join(_blocks_of(open_source(_content(path), LONGEST_SECONDS)))
    except DamagedError as error:
        raise InvalidRequestError(str(path), error.problem, error.remedy) from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InvalidRequestError(
            str(path), f"cannot be read ({why})", "name an audio file"
        ) from None
    return audio


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # nor a pipe, which may never end
        raise DamagedError("is not a file", "name an audio file")
    if path.stat().st_size > _MOST_BYTES:
        raise DamagedError(f"has more than {_MOST_BYTES / 1e9:g} GB", "use a smaller file")
    return path.read_bytes()


def _blocks_of(source: Source) -> Iterator[Audio]:
    _check_length(source.seconds or 0)
    for part in source.parts:
        if source.is_mpeg:
            yield decode_quietly(part)
            continue
        with open_stream(part) as file:
            yield from file.audio_blocks()


def _join(blocks: Iterator[Audio]) -> Audio:
    kept: list[Audio] = []
    seconds = 0.0
    for block in blocks:
        kept.append(block)
        if (block.sample_rate, len(block.samples)) != (kept[0].sample_rate, len(kept[0].samples)):
            raise DamagedError("changes its sample rate or channels on the way", "use another file")
        _check_length(seconds := seconds + block.duration)
    if not seconds:
        raise DamagedError("holds no audio", "use another file")
    samples = np.concatenate([block.samples for block in kept], axis=1)
    if not np.isfinite(samples).all():
        raise DamagedError("holds NaN or infinite samples", "use another file")
    return Audio(samples, kept[0].sample_rate)


def _check_length(seconds: float) -> None:
    if seconds > LONGEST_SECONDS:
        raise DamagedError(f"is longer than {LONGEST_SECONDS // 60} min", "use a shorter file")
