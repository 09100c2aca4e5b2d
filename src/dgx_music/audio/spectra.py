"""Short pieces of a spectrum, one after the other, for what is measured in audio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATE = 32_000
"""In Hz: the rate of all audio that tempo and key are measured in, and that of MusicGen."""
_PART_WINDOWS = 32
"""How many are in memory at once; they then stay in the processor's cache."""


def magnitudes(
    wave: NDArray[np.float32], peak: float, frames: int, step: int
) -> Iterator[NDArray[np.float32]]:
    """Yield the magnitudes of windows of so many frames, ``[window, bin]``, in several parts.

    A window begins ``step`` frames after the one before it. ``wave`` is one channel at ``RATE``,
    and no shorter than a window; the magnitudes are those of a wave with a peak of 1.
    """
    windows = np.lib.stride_tricks.sliding_window_view(wave, frames)[::step]
    shape = np.hanning(frames + 1)[:-1].astype(np.float32)
    for start in range(0, len(windows), _PART_WINDOWS):
        part = windows[start : start + _PART_WINDOWS] / np.float32(peak)
        part *= shape
        yield np.abs(np.fft.rfft(part)).astype(np.float32, copy=False)


def hertz_of_bins(frames: int) -> NDArray[np.float64]:
    """Return the frequency of each bin of a window of so many frames, an even number."""
    return np.linspace(0.0, RATE / 2, frames // 2 + 1)
