"""Integrated loudness by ITU-R BS.1770-4, in LUFS.

The numbers are pyloudnorm's to the last digit, and so are the filters. pyloudnorm's meter squares
each sample four times, once for each of the overlapping blocks that hold it; this one squares it once.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dgx_music.audio.samples import Samples
from dgx_music.errors import ArtifactError

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_SECONDS = 0.4
"""The length of a gating block, and so of the shortest audio that has a loudness."""
_STEP = 0.25
"""From the start of one block to the next, in blocks."""
_ABSOLUTE_GATE = -70.0
SILENCE_PEAK = 10 ** (_ABSOLUTE_GATE / 20)
"""BS.1770 counts nothing below -70 LUFS, and gain does not turn such noise into music."""
_RELATIVE_GATE = -10.0
"""Below the loudness of all blocks that pass the absolute gate."""
_PART_FRAMES = 32_768
"""How much is filtered at once: the filters' float64 output then stays in the processor's cache."""
_METER_BYTES = 192 * 2**20
_BLAS_THREAD_BYTES = 64 * 2**20
"""Address space that the import of scipy takes, with a margin: 107 MiB were measured, and 40 MiB
for each thread."""
_MOST_BLAS_THREADS = 64


def measure(samples: Samples, sample_rate: int) -> float | None:
    """Return the loudness of 1 or 2 channels; ``None`` for silence, and if it is too short.

    Raises ``ArtifactError`` if there is no memory to import scipy.
    """
    if samples.shape[1] < BLOCK_SECONDS * sample_rate:
        return None
    return _gate(_block_powers(samples, sample_rate))


def import_filters() -> Any:
    """Import scipy, and return pyloudnorm; raises ``ArtifactError`` if there is no memory for it.

    Without enough memory, scipy's OpenBLAS asks for it in an endless loop that nothing can
    interrupt. So this checks first that there is enough.
    """
    if "pyloudnorm" not in sys.modules:
        threads = min(os.cpu_count() or 1, _MOST_BLAS_THREADS)
        try:
            mmap.mmap(
                -1,
                _METER_BYTES + threads * _BLAS_THREAD_BYTES,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            ).close()
        except OSError:
            raise ArtifactError(
                "There is no memory for the loudness meter; raise the limit (`ulimit -v`)."
            ) from None
    import pyloudnorm

    return pyloudnorm


def _square_weighted(samples: Samples, sample_rate: int) -> Iterator[Samples]:
    """Yield the squares of the samples after the K-weighting filters, ``[channel, frame]``."""
    filters = _filters(sample_rate)
    from scipy.signal import lfilter

    states = [np.zeros((len(samples), 2)) for _ in filters]
    for start in range(0, samples.shape[1], _PART_FRAMES):
        part = samples[:, start : start + _PART_FRAMES]
        for number, (numerator, denominator) in enumerate(filters):
            filtered, states[number] = lfilter(numerator, denominator, part, zi=states[number])
            part = filtered.astype(np.float32)
        yield np.square(part)


def _filters(sample_rate: int) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """Return the coefficients of the K-weighting: of a shelf for the head, then of a high-pass."""
    make = import_filters().IIRfilter
    shelf = make(4.0, 1 / np.sqrt(2), 1500.0, sample_rate, "high_shelf")
    high_pass = make(0.0, 0.5, 38.0, sample_rate, "high_pass")
    return [shelf.generate_coefficients(), high_pass.generate_coefficients()]


def _block_powers(samples: Samples, sample_rate: int) -> NDArray[np.float64]:
    """Return the mean square of each gating block, ``[channel, block]``."""
    share = 1.0 / (BLOCK_SECONDS * sample_rate)
    blocks = deque(_blocks(samples.shape[1] / sample_rate, sample_rate))
    powers: list[list[Any]] = []  # [block, channel]
    squares = np.empty((len(samples), 0), np.float32)
    first = 0  # the frame that the squares begin with
    for part in _square_weighted(samples, sample_rate):
        squares = np.concatenate([squares, part], axis=1)
        is_last = first + squares.shape[1] == samples.shape[1]
        while blocks and (is_last or blocks[0][1] <= first + squares.shape[1]):
            start, end = blocks.popleft()
            powers.append([share * row[start - first : end - first].sum() for row in squares])
        if blocks:
            squares, first = squares[:, blocks[0][0] - first :], blocks[0][0]
    return np.array(powers, np.float64).T


def _blocks(seconds: float, sample_rate: int) -> Iterable[tuple[int, int]]:
    """Return the first frame of each gating block, and the one after its last."""
    count = int(np.round((seconds - BLOCK_SECONDS) / (BLOCK_SECONDS * _STEP))) + 1
    offsets = np.arange(count) * _STEP  # in blocks
    starts = (BLOCK_SECONDS * offsets * sample_rate).astype(int)
    ends = (BLOCK_SECONDS * (offsets + 1) * sample_rate).astype(int)
    return zip(starts.tolist(), ends.tolist(), strict=True)


def _gate(powers: NDArray[np.float64]) -> float | None:
    """Return the loudness of the blocks that pass both gates; ``None`` if none does."""
    with np.errstate(divide="ignore"):  # the logarithm of silence
        loudness = _lufs(powers.sum(axis=0))  # [block]
    heard = loudness >= _ABSOLUTE_GATE
    if not heard.any():
        return None
    gate = max(_ABSOLUTE_GATE, _lufs(_mean_power(powers, heard)) + _RELATIVE_GATE)
    counted = loudness > gate
    return float(_lufs(_mean_power(powers, counted))) if counted.any() else None


def _mean_power(powers: NDArray[np.float64], counted: NDArray[np.bool_]) -> float:
    """Return the mean of the counted blocks' powers, summed over the channels."""
    return sum(float(channel[counted].mean()) for channel in powers)


def _lufs(power: Any) -> Any:
    return -0.691 + 10.0 * np.log10(power)
