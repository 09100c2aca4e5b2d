"""The tune of a full mix, where the loudest pitch class is often that of the bass.

audiocraft separates the stems first, with a second model. Here each frame is explained as a sum of
notes with overtones. Those below 200 Hz are the bass, and take their overtones with them; of the
others the strongest line is the tune. The sum is found by non-negative matrix factorisation with
fixed notes (Lee and Seung, "Algorithms for Non-negative Matrix Factorization", 2000).
``benchmarks/tune.py`` measures how often that is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from dgx_music.inference.musicgen.melody import (
    LONGEST_SECONDS,
    PITCH_CLASSES,
    WINDOW,
    chroma,
    one_hot,
    spectrum,
)
from dgx_music.validation import MelodyKind

_LOWEST_HZ, _SPLIT_HZ, _HIGHEST_HZ, _TOP_HZ = 38.0, 200.0, 2_100.0, 3_000.0
"""Bass notes from the first to the second, tunes up to the third; overtones up to the last."""
_STEPS = 60
"""Notes in an octave."""
_OVERTONES = 20
_ROUNDS = 20
_HEARD_SHARE = 0.01
"""Of a frame's loudest frequency: what is 40 dB quieter is noise."""
_SOUNDING_SHARE = 0.03
"""Of the loudest frame: quieter ones are pauses."""
_HEIGHT_WEIGHT = 0.5
"""Of two equally strong notes, an octave apart, the upper counts 1.4 times as much."""
_LEAP_COST = 0.6
"""For each octave, beside a strongest note of 1: a tune seldom leaps far."""

_LEAST_SHARE = 0.015
_LEAST_FRAMES = 0.9
"""In so many frames a mix has at least that share of bass, and of something above it."""
_LEAST_FREE_FRAMES = 0.25
"""In so many frames what is above the bass is none of its overtones. In a low solo it always is."""
_OVERTONE_SEMITONES = (0, 7.02, 3.86, 9.69, 12)
"""The distances of a note's overtones from the octave below them: octave, third, fifth, seventh."""
_OUT_OF_TUNE_SEMITONES = 0.7


class Notes(NamedTuple):
    """How strong each note is in each frame: those of the bass, and the others ``[note, frame]``."""

    bass: Tensor
    others: Tensor


Reader = Callable[[Tensor, int], Tensor]
"""Returns the pitch classes of mono samples ``[sample]`` of a rate: one-hot ``[frame, 12]``."""


def choose_reader(samples: Tensor, sample_rate: int, kind: MelodyKind) -> Reader:
    """Return how a clip of this kind is read: ``chroma`` for a solo, ``tune_of`` for a mix.

    ``auto`` listens to the clip first.
    """
    if kind == "auto":
        kind = "mix" if is_mix(find_notes(samples, sample_rate)) else "solo"
    return tune_of if kind == "mix" else chroma


def tune_of(samples: Tensor, sample_rate: int) -> Tensor:
    """Return the pitch classes of the tune in a mix, as ``chroma`` does those of a solo."""
    heard = samples[: LONGEST_SECONDS * sample_rate]
    return one_hot(_follow(find_notes(heard, sample_rate)))


def find_notes(samples: Tensor, sample_rate: int) -> Notes:
    """Return the notes of each frame of mono samples ``[sample]``, which are on the CPU.

    A clip may have any length: it is heard in parts of 30 s. Loudness does not matter.
    """
    spectra, sounds = _model(sample_rate)
    parts = torch.split(samples, LONGEST_SECONDS * sample_rate)
    heard = torch.cat([_hear(part, sample_rate, len(spectra)) for part in parts], dim=1)
    heard = heard / heard.amax().clamp(min=torch.finfo().tiny) + 1e-9
    strengths = spectra.T @ heard  # [note, frame]
    for _ in range(_ROUNDS):
        strengths = strengths * (spectra.T @ (heard / (spectra @ strengths + 1e-9)))
    bass_count = len(_bass_pitches())
    bass = strengths[: sounds * bass_count].view(sounds, bass_count, -1).sum(dim=0)
    return Notes(bass, strengths[sounds * bass_count :])


def _hear(samples: Tensor, sample_rate: int, lowest: int) -> Tensor:
    """Return how strong the lowest frequencies are in each frame, without the noise between them."""
    heard = spectrum(samples, sample_rate)[:lowest]  # [frequency, frame]
    return heard * (heard > _HEARD_SHARE * heard.amax(dim=0))


def is_mix(notes: Notes) -> bool:
    """Return whether a bass and a tune of its own above it sound together most of the time."""
    bass, others = notes.bass.sum(dim=0), notes.others.sum(dim=0)
    total = bass + others
    sounding = total > _SOUNDING_SHARE * total.amax()
    sound_together = torch.minimum(bass, others) > _LEAST_SHARE * total
    are_free = sound_together & ~_are_overtones(notes)
    shares = torch.stack([sound_together, are_free])[:, sounding].float().mean(dim=1)
    return bool(shares[0] > _LEAST_FRAMES and shares[1] > _LEAST_FREE_FRAMES)


def _are_overtones(notes: Notes) -> Tensor:
    """Return in which frames the strongest note above the bass may be the bass's ``[frame]``."""
    low = _semitones(_bass_pitches())[notes.bass.argmax(dim=0)]
    high = _semitones(_tune_pitches())[notes.others.argmax(dim=0)]
    off = (high - low) % PITCH_CLASSES - torch.tensor(_OVERTONE_SEMITONES)[:, None]
    return (off.abs() < _OUT_OF_TUNE_SEMITONES).any(dim=0)


def _follow(notes: Notes) -> Tensor:
    """Return the pitch class of the strongest line above the bass, ``[frame]``; 0 in silence."""
    # A note between two of the model is a little of both; a detuned one is spread wider.
    strengths = max_pool1d(notes.others.T[:, None], 3, 1, 1)[:, 0]  # [frame, note]
    weighted = strengths * (_tune_pitches() / _SPLIT_HZ) ** _HEIGHT_WEIGHT
    classes = _semitones(_tune_pitches()).round().long() % PITCH_CLASSES
    is_silent = weighted.amax(dim=1) < 1e-6
    return classes[_smoothest(weighted)].masked_fill(is_silent, 0)


def _smoothest(strengths: Tensor) -> Tensor:
    """Return the best line of notes ``[frame]``, strong and without far leaps (Viterbi)."""
    worth = strengths / strengths.amax(dim=1, keepdim=True).clamp(min=torch.finfo().tiny)
    places = torch.arange(worth.shape[1])
    costs = (places[:, None] - places).abs() * (_LEAP_COST / _STEPS)  # [note, note before]
    total, origins = worth[0], []
    for row in worth[1:]:
        best, origin = (total - costs).max(dim=1)
        total = best + row
        origins.append(origin)
    line = [total.argmax()]
    for origin in reversed(origins):
        line.append(origin[line[-1]])
    return torch.stack(line[::-1])


@cache
def _model(sample_rate: int) -> tuple[Tensor, int]:
    """Return the notes' spectra ``[frequency, note]``, and how many sounds the bass has in them.

    It has each of its notes as a saw, a square and a soft sound; of the others the soft one is
    enough. The bass comes first, a sound after the other.
    """
    hertz = torch.fft.rfftfreq(WINDOW, 1 / sample_rate)
    hertz = hertz[hertz < _TOP_HZ]
    overtones = torch.arange(1, _OVERTONES + 1)
    saw, square, soft = 1 / overtones, overtones % 2 / overtones, 1 / overtones.square()
    bass = [_spectra(_bass_pitches(), hertz, sound) for sound in (saw, square, soft)]
    others = _spectra(_tune_pitches(), hertz, soft)
    return torch.cat([*bass, others]).T.contiguous(), len(bass)


@cache
def _bass_pitches() -> Tensor:
    return _pitches(_LOWEST_HZ, _SPLIT_HZ)[:-1]


@cache
def _tune_pitches() -> Tensor:
    return _pitches(_SPLIT_HZ, _HIGHEST_HZ)


def _pitches(lowest: float, highest: float) -> Tensor:
    """Return the fundamentals of the notes in hertz."""
    count = round(_STEPS * math.log2(highest / lowest)) + 1
    return lowest * 2 ** (torch.arange(count) / _STEPS)


def _semitones(hertz: Tensor) -> Tensor:
    """Return how many semitones the pitches are above middle C; the A of 440 Hz is 9."""
    return torch.log2(hertz / 440) * PITCH_CLASSES + 9


def _spectra(pitches: Tensor, hertz: Tensor, strengths: Tensor) -> Tensor:
    """Return the spectrum of each note ``[note, frequency]``, whose sum is 1."""
    spectra = torch.zeros(len(pitches), len(hertz))
    for number, strength in enumerate(strengths.tolist(), start=1):
        centres = number * pitches[:, None]
        # The Hann window's main lobe, wider by what the true pitch may be beside the note.
        width = hertz[1] + centres * (2 ** (1 / (2 * _STEPS)) - 1) / 2
        off = (hertz - centres) / width
        lobe = (torch.sinc(off) / (1 - off.square() + 1e-9)).abs()
        spectra += strength * lobe * (off.abs() < 2)
    return spectra / spectra.sum(dim=1, keepdim=True)
