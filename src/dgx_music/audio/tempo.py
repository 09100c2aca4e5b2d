"""Tempo: how often the rises of the sound repeat.

How much 40 bands of the spectrum rise is added up 200 times a second. A beat of the right length
finds this curve similar to itself one beat later, and also half a beat, two, three and four beats
later. Of several such lengths, the one that is a more usual tempo is taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from dgx_music.audio.spectra import RATE, hertz_of_bins, magnitudes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Curve = NDArray[np.float64]

LEAST_CONFIDENCE = 0.2
"""Noise reaches 0.02, rain 0.1, speech 0.2; of 100 pieces with a beat, 98 or 99 reach more."""

_WINDOW_FRAMES = 1_024
_STEP_FRAMES = 160
_STEPS_PER_SECOND = RATE / _STEP_FRAMES
_BANDS = 40
_LOWEST_HZ, _HIGHEST_HZ = 40.0, 14_000.0
_COMPRESSION = 4.0
_RISE_STEPS = 2
"""A rise is measured over so many steps: an onset takes more than one."""
_MEAN_STEPS = 201
"""What is about one second on average is no beat."""
_SMOOTHING = np.hanning(7) / np.hanning(7).sum()
"""Notes that belong together are some milliseconds apart."""
_STEADY_RISE = 1.5
"""Rises as small as those of noise count as no rhythm, even if they repeat."""
_TEMPOS = np.geomspace(45.0, 220.0, 700)
_BEATS = ((1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (0.5, 0.5), (3.0, 0.5))
"""After how many beats the music is compared with itself, and how much that counts."""
_USUAL_BPM = 125.0
_USUAL_OCTAVES = 0.85
"""The standard deviation of usual tempos."""
_COMPARED_SHARE = 0.8
"""Of the piece: in a longer lag too little music is left to compare."""
_REFINED_BEATS = 0.1


def measure(wave: NDArray[np.float32], peak: float) -> tuple[float, float] | None:
    """Return beats per minute and the confidence, up to 1; ``None`` if there is no clear beat.

    ``wave`` is one channel at ``spectra.RATE``, with this peak. The tempo may be the half or the
    double of what a listener would say.
    """
    likeness = _likeness(_rises(wave, peak))
    scores = _scores(likeness)
    usual = np.exp(-0.5 * (np.log2(_TEMPOS / _USUAL_BPM) / _USUAL_OCTAVES) ** 2)
    best = int(np.argmax(scores * usual))
    if scores[best] < LEAST_CONFIDENCE:
        return None
    beat = _refine(likeness, 60 * _STEPS_PER_SECOND / _TEMPOS[best])
    return 60 * _STEPS_PER_SECOND / beat, min(1.0, float(scores[best]))


def _rises(wave: NDArray[np.float32], peak: float) -> Curve:
    """Return how much the sound rises in each step, less the mean of the second around it."""
    starts = _band_starts()
    scale = np.float32(_COMPRESSION)
    levels = np.concatenate(
        [
            np.log1p(scale * np.add.reduceat(part[:, : starts[-1]], starts[:-1], axis=1))
            for part in magnitudes(wave, peak, _WINDOW_FRAMES, _STEP_FRAMES)
        ]
    )  # [step, band]
    rises = np.maximum(levels[_RISE_STEPS:] - levels[:-_RISE_STEPS], 0).sum(axis=1, dtype=float)
    half = _MEAN_STEPS // 2
    sums = np.cumsum(np.pad(rises, (half + 1, half), mode="reflect"))
    return np.convolve(
        rises - (sums[_MEAN_STEPS:] - sums[:-_MEAN_STEPS]) / _MEAN_STEPS, _SMOOTHING, "same"
    )


def _band_starts() -> NDArray[np.intp]:
    """Return the first bin of each band, and the end of the last; as wide as a mel scale has them."""
    low, high = (2_595 * math.log10(1 + hertz / 700) for hertz in (_LOWEST_HZ, _HIGHEST_HZ))
    edges = 700 * (10 ** (np.linspace(low, high, _BANDS + 1) / 2_595) - 1)
    return np.unique(np.searchsorted(hertz_of_bins(_WINDOW_FRAMES), edges))


def _likeness(rises: Curve) -> Curve:
    """Return how like itself the curve is after each number of steps: 1 at most."""
    count = len(rises)
    power = np.abs(np.fft.rfft(rises, 2 * count)) ** 2
    products: Curve = np.fft.irfft(power)[:count] / (count - np.arange(count))
    products /= products[0] + _STEADY_RISE**2
    return products


def _scores(likeness: Curve) -> Curve:
    """Return for each tempo how like itself the music is after one beat and after other numbers."""
    steps = np.arange(len(likeness))
    scores, weights = np.zeros_like(_TEMPOS), np.zeros_like(_TEMPOS)
    for beats, weight in _BEATS:
        lags = beats * 60 * _STEPS_PER_SECOND / _TEMPOS
        counted = weight * (lags < _COMPARED_SHARE * len(likeness))
        scores += counted * np.interp(lags, steps, likeness)
        weights += counted
    scores /= weights
    return scores


def _refine(likeness: Curve, beat: float) -> float:
    """Return the beat's length in steps, measured over as many beats as the piece has."""
    beats = 1
    while 2 * beats * beat < _COMPARED_SHARE * len(likeness):
        beats *= 2
        beat = _find_top(likeness, beats * beat, _REFINED_BEATS * beat) / beats
    return beat


def _find_top(likeness: Curve, near: float, reach: float) -> float:
    """Return where the curve is highest near there, between its points."""
    start = round(near - reach)
    top = start + int(np.argmax(likeness[start : round(near + reach) + 1]))
    before, there, after = likeness[top - 1 : top + 2]
    bend = before - 2 * there + after
    if there < max(before, after) or not bend:
        return float(top)
    return float(top + 0.5 * (before - after) / bend)
