"""Tempo and key, measured in finished audio."""

from __future__ import annotations

from dataclasses import dataclass

from dgx_music.audio import key, tempo
from dgx_music.audio.conversion import match_channels, resample
from dgx_music.audio.loudness import SILENCE_PEAK
from dgx_music.audio.samples import Samples
from dgx_music.audio.spectra import RATE

LEAST_SECONDS = 4.0
"""Shorter audio has too few beats and chords."""


@dataclass(frozen=True)
class Analysis:
    """What was measured; ``None`` for what is not clear enough to be claimed."""

    bpm: float | None = None
    bpm_confidence: float | None = None
    """How like itself the rhythm is from beat to beat, up to 1."""
    key: str | None = None
    """``C`` is C major, ``F#m`` is F sharp minor."""
    key_confidence: float | None = None
    """How far the key is ahead of the others, up to 1."""


def analyse(samples: Samples, sample_rate: int) -> Analysis:
    """Return tempo and key; neither for silence, noise, drones and less than 4 s.

    It takes about 0.001 s of CPU time for each second of audio.
    """
    if samples.shape[1] < LEAST_SECONDS * sample_rate:
        return Analysis()
    wave = resample(match_channels(samples, 1, sample_rate), sample_rate, RATE)[0]
    peak = float(max(wave.max(), -wave.min()))
    if peak < SILENCE_PEAK:
        return Analysis()
    bpm, bpm_confidence = tempo.measure(wave, peak) or (None, None)
    name, key_confidence = key.measure(wave, peak) or (None, None)
    return Analysis(
        None if bpm is None else round(bpm, 1),
        None if bpm_confidence is None else round(bpm_confidence, 2),
        name,
        None if key_confidence is None else round(key_confidence, 2),
    )
