"""WAV files of 16 bits, without libsndfile: for a short clip, opening a file there costs most of all."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dgx_music.audio.samples import Samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEADER = struct.Struct("<4sI4s 4sIHHIIHH")
_DATA_HEADER = struct.Struct("<4sI")
_BYTES_AFTER_SIZE = 36
"""What the two headers hold after the size of the whole."""
_PCM = 1
_PART_FRAMES = 65_536
"""So many are converted at once: on its way, a sample takes six times the memory."""
_SAMPLE_BYTES = 2
_FULL_SCALE = np.float32(2**31)
_LARGEST = np.float32(2**31 - 2**7)
"""The float32 before full scale, which int32 cannot hold."""


def encode(samples: Samples, sample_rate: int, tags: bytes = b"") -> bytes:
    """Return samples within ±1 as a file's content: the bytes that libsndfile writes.

    ``tags`` is a chunk to put before the samples.
    """
    file = io.BytesIO()  # grows without a second copy, which joined parts would need
    file.write(header(sample_rate, len(samples), samples.size * _SAMPLE_BYTES, tags))
    file.writelines(_parts(samples))
    return file.getvalue()


def to_pcm(samples: Samples) -> bytes:
    """Return the samples as a file holds them, without a header; what exceeds ±1 is cut off."""
    return b"".join(_parts(np.clip(samples, -1, 1)))


def _parts(samples: Samples) -> Iterator[bytes]:
    for start in range(0, samples.shape[1], _PART_FRAMES):
        yield _to_16_bits(samples[:, start : start + _PART_FRAMES]).T.tobytes()  # frame by frame


def _to_16_bits(samples: Samples) -> NDArray[Any]:
    """Return the upper half of each sample's 32 bits, as libsndfile does: rounded, then cut off."""
    scaled = samples * _FULL_SCALE
    np.rint(scaled, out=scaled)
    np.minimum(scaled, _LARGEST, out=scaled)
    return (scaled.astype(np.int32) >> 16).astype("<i2")


def header(sample_rate: int, channels: int, size: int, tags: bytes = b"") -> bytes:
    """Return what stands before so many bytes of samples."""
    frame_bytes = channels * _SAMPLE_BYTES
    form = _PCM, channels, sample_rate, sample_rate * frame_bytes, frame_bytes, 8 * _SAMPLE_BYTES
    whole = _BYTES_AFTER_SIZE + len(tags) + size
    start = _HEADER.pack(b"RIFF", whole, b"WAVE", b"fmt ", 16, *form)
    return start + tags + _DATA_HEADER.pack(b"data", size)
