"""The end of a finished file's audio, for music that goes on from it.

Synchronous: call it in a thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dgx_music.audio import wav
from dgx_music.audio.containers.interface import DamagedError
from dgx_music.audio.decoding import decode_quietly, open_stream
from dgx_music.audio.formats import open_source
from dgx_music.audio.samples import Audio
from dgx_music.catalog import WINDOW_SECONDS
from dgx_music.errors import ArtifactError

_LONGEST_SECONDS = 86_400.0


@dataclass(frozen=True)
class Ending:
    """The last seconds of some audio, as a WAV file."""

    data: bytes
    seconds: float
    whole_seconds: float
    """The length of all of the audio."""


def end_of(content: bytes, path: str) -> Ending:
    """Return the last 30 s of a file's audio, or all of it if it is not longer.

    Raises ``ArtifactError``, which names the path, if the file cannot be read.
    """
    kept: deque[Audio] = deque()
    count = dropped = 0
    try:
        for block in _blocks_of(content):
            kept.append(block)
            count += block.samples.shape[1]
            first = kept[0].samples.shape[1]
            if count - dropped - first >= WINDOW_SECONDS * block.sample_rate:
                kept.popleft()
                dropped += first
    except DamagedError as error:
        raise ArtifactError(f"{path} {error.problem}.") from None
    if not count:
        raise ArtifactError(f"{path} holds no audio.")
    rate = kept[0].sample_rate
    samples = np.concatenate([block.samples for block in kept], axis=1)  # [channel, frame]
    # A lossy decoder may pass full scale.
    samples = np.clip(samples[:, -round(WINDOW_SECONDS * rate) :], -1, 1)
    return Ending(wav.encode(samples, rate), samples.shape[1] / rate, count / rate)


def _blocks_of(content: bytes) -> Iterator[Audio]:
    container = open_source(content, _LONGEST_SECONDS)
    for part in container.parts:
        if container.is_mpeg:
            yield decode_quietly(part)
        else:
            with open_stream(part) as file:
                yield from file.audio_blocks()
