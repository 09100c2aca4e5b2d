"""Samples with other channels, and at another rate."""

from __future__ import annotations

import numpy as np
import soxr

from dgx_music.audio.samples import Samples

_LOST_SHARE = 0.25
"""A second is lost if the average of the channels keeps less of their power."""
_LOST_MUSIC = 0.1
"""The share of the music that may be lost in such seconds."""


def match_channels(samples: Samples, channels: int, sample_rate: int) -> Samples:
    """Return the samples with this number of channels: if they have another, with their average.

    Channels that cancel each other are not averaged: the loudest one is used.
    """
    if samples.shape[0] == channels:
        return samples
    return np.repeat(_mix(samples, sample_rate), channels, axis=0)


def _mix(samples: Samples, sample_rate: int) -> Samples:
    if cancels_out(samples, sample_rate):
        loudest = int(np.square(samples).mean(axis=1).argmax())
        return samples[loudest : loudest + 1]
    average: Samples = samples.mean(axis=0, keepdims=True)
    return average


def cancels_out(samples: Samples, sample_rate: int) -> bool:
    """Return whether averaging the channels would cancel a tenth of the music or more.

    That happens if the channels are of opposite phase. Unrelated channels keep a share of 1 /
    channels of their mean power, which is no loss; a second counts as lost if less than a quarter
    of that is left.
    """
    if len(samples) == 1:
        return False
    starts = np.arange(0, samples.shape[1], sample_rate)
    seconds = (samples[:, start : start + sample_rate].astype(np.float64) for start in starts)
    both = [(np.square(each).sum(), np.square(each.sum(axis=0)).sum()) for each in seconds]
    powers, mixed = np.array(both).T
    lost = powers[mixed < _LOST_SHARE * powers].sum()
    return bool(lost > _LOST_MUSIC * powers.sum())


class ResampledStream:
    """Samples at another rate, as they arrive; they lag behind by a few hundredths of a second."""

    def __init__(self, to_rate: int, channels: int) -> None:
        self._to_rate = to_rate
        self._channels = channels
        self._stream: soxr.ResampleStream | None = None

    def add(self, samples: Samples, from_rate: int) -> Samples:
        """Return what follows from these samples; all must have the same rate in Hz."""
        if from_rate == self._to_rate:
            return samples
        if self._stream is None:
            self._stream = soxr.ResampleStream(
                from_rate, self._to_rate, self._channels, dtype="float32"
            )
        resampled: Samples = self._stream.resample_chunk(np.ascontiguousarray(samples.T))
        return resampled.reshape(-1, self._channels).T


def resample(samples: Samples, from_rate: int, to_rate: int) -> Samples:
    """Return the samples at another rate in Hz, at least one frame.

    There are ``round(frames * to_rate / from_rate)`` of them.
    """
    if from_rate == to_rate:
        return samples
    frames = max(1, round(samples.shape[1] * to_rate / from_rate))
    # soxr may return one frame more or less.
    resampled = soxr.resample(samples.T, from_rate, to_rate).T[:, :frames]
    return np.pad(resampled, ((0, 0), (0, frames - resampled.shape[1])))
