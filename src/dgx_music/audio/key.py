"""Key: which of 24 keys the mixture of pitch classes fits best.

The profiles say how strong each of the twelve pitch classes is in a key. They are those that Faraldo,
Gómez, Jordà and Herrera measured in electronic dance music ("Key Estimation in Electronic Dance
Music", ECIR 2016), and that their program and Essentia call ``edma``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dgx_music.audio.spectra import hertz_of_bins, magnitudes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_MAJOR = (
    *(0.16519551, 0.04749026, 0.08293076, 0.06687112, 0.09994645, 0.09274123),
    *(0.05294487, 0.13159476, 0.05218986, 0.07443653, 0.06940723, 0.0642515),
)
_MINOR = (
    *(0.17235348, 0.05336489, 0.0761009, 0.10043649, 0.05621498, 0.08527853),
    *(0.0497915, 0.13451001, 0.07458916, 0.05003023, 0.09187879, 0.05545106),
)

_WINDOW_FRAMES = 8_192
_STEP_FRAMES = 4_096
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 1_400.0
_CLEAR_SEMITONES = 0.0
"""The C above 250 Hz: bins below it are too wide to tell how an instrument is tuned."""
_HEARD_SHARE = 1e-3
"""Of the loudest window: what is 60 dB quieter is a pause."""
_OPENING_WINDOWS = 8
_OPENING_WEIGHT = 0.25
"""Most pieces begin with the chord of their key, so the first second counts more."""
_MOST_FLATNESS = 0.1
"""Of the spectrum: music has 0.001 to 0.05, noise 0.14 to 0.6."""
_LEAST_MOVEMENT = 0.12
"""A held note or chord has 0.07 at most, music 0.17 at least."""
_LEAST_FIT = 0.6
"""Noise and speech reach 0.4, and nearly all drums 0.55; music has 0.65 at least."""
_PRESENT_SHARE = 0.3
_LEAST_CLASSES = 2
_TEMPERATURE = 0.1
"""Makes the confidence about as high as the share of keys that are right."""


def measure(wave: NDArray[np.float32], peak: float) -> tuple[str, float] | None:
    """Return the key, such as ``C`` or ``F#m``, and the confidence, up to 1.

    ``None`` for noise, speech, most drums, and one note or chord that is held. ``wave`` is one
    channel at ``spectra.RATE``, with this peak.
    """
    spectra = _heard(wave, peak)
    if not len(spectra) or _flatness(spectra) > _MOST_FLATNESS:
        return None
    semitones = _semitones()
    classes = spectra @ _filters(semitones - _tuning(spectra, semitones))  # [window, pitch class]
    classes /= classes.max(axis=1, keepdims=True)
    if classes.std(axis=0).mean() < _LEAST_MOVEMENT:
        return None
    mixture = classes.mean(axis=0)
    if np.count_nonzero(mixture > _PRESENT_SHARE * mixture.max()) < _LEAST_CLASSES:
        return None
    return _name(mixture + _OPENING_WEIGHT * classes[:_OPENING_WINDOWS].mean(axis=0))


def _heard(wave: NDArray[np.float32], peak: float) -> Numbers:
    """Return the magnitudes of the windows that are not pauses, ``[window, bin]``."""
    bins = _bins()
    parts = magnitudes(wave, peak, _WINDOW_FRAMES, _STEP_FRAMES)
    # Copies: a view would keep all the other bins as well.
    spectra: Numbers = np.concatenate([part[:, bins].astype(np.float64) for part in parts])
    tops = spectra.max(axis=1)
    heard: Numbers = spectra[tops > _HEARD_SHARE * tops.max()]
    return heard


def _bins() -> slice:
    return slice(*np.searchsorted(hertz_of_bins(_WINDOW_FRAMES), (_LOWEST_HZ, _HIGHEST_HZ)))


def _flatness(spectra: Numbers) -> float:
    """Return the median of geometric by arithmetic mean of the power: 1 if all bins are equal."""
    powers = np.square(spectra) + 1e-20
    return float(np.median(np.exp(np.log(powers).mean(axis=1)) / powers.mean(axis=1)))


def _semitones() -> Numbers:
    """Return the pitch of each bin, in semitones above a C."""
    pitches: Numbers = 12 * np.log2(hertz_of_bins(_WINDOW_FRAMES)[_bins()] / 440) + 9
    return pitches


def _tuning(spectra: Numbers, semitones: Numbers) -> float:
    """Return how many semitones, -0.5 to 0.5, the instruments are above an A of 440 Hz."""
    powers = np.square(spectra).sum(axis=0)
    circle = np.exp(2j * np.pi * semitones) * (semitones > _CLEAR_SEMITONES)
    return float(np.angle(powers @ circle) / (2 * np.pi))


def _filters(semitones: Numbers) -> Numbers:
    """Return how much each bin counts for each pitch class: nothing from a semitone away."""
    distances = (semitones[:, np.newaxis] - np.arange(12) + 6) % 12 - 6
    filters: Numbers = np.maximum(1 - np.abs(distances), 0)
    return filters


def _name(mixture: Numbers) -> tuple[str, float] | None:
    """Return the key that fits best; the confidence is its share beside the other 23 keys."""
    fits = _profiles() @ _standardised(mixture)
    best = int(np.argmax(fits))
    if fits[best] < _LEAST_FIT:
        return None
    shares = np.exp((fits - fits[best]) / _TEMPERATURE)
    return NAMES[best % 12] + ("m" if best >= 12 else ""), float(1 / shares.sum())


def _profiles() -> Numbers:
    """Return the profile of each key, ``[key, pitch class]``: of C to B, then of Cm to Bm."""
    scaled = [_standardised(np.array(profile)) / 12 for profile in (_MAJOR, _MINOR)]
    return np.array([np.roll(profile, tonic) for profile in scaled for tonic in range(12)])


def _standardised(values: Numbers) -> Numbers:
    standardised: Numbers = (values - values.mean()) / values.std()
    return standardised
