"""Tunes above an accompaniment, made from seeds: what the tune is, is known.

A piece has a tune, a bass, and of drums, a pad and chords what the seed chooses. Most instruments
have two voices that are a little out of tune with each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float64]
Overtones = Callable[[int], float]
Sound = Callable[[float, float], Wave]

RATE = 32_000
HIGHEST_BASS_HZ = 196.0
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
PROGRESSIONS = ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 5, 2, 6), (0, 3, 0, 4))
SHAPES: dict[str, Overtones] = {
    "square": lambda n: n % 2 / n,
    "saw": lambda n: 1 / n,
    "triangle": lambda n: n % 2 / n**2,
    "flute": lambda n: (1.0, 0.4, 0.1, 0.05)[n - 1] if n < 5 else 0,
    "voice": lambda n: (1.0, 0.8, 0.6, 0.25, 0.2, 0.1, 0.1, 0.05)[n - 1] if n < 9 else 0,
    "string": lambda n: n**-1.5,
}
BASSES, PADS = ("square", "saw"), ("saw", "string", "triangle")
TUNES = ("square", "saw", "flute", "voice", "string", "triangle")


@dataclass(frozen=True, eq=False)
class Mix:
    """A piece and its tune alone, both mono ``[sample]`` at 32,000 Hz, and what plays in it."""

    samples: NDArray[np.float32]
    tune: NDArray[np.float32]
    parts: str


def make_mix(seed: int, seconds: float = 12.0) -> Mix:
    """Return the piece of this seed, which chooses tempo, key, registers, parts and loudness."""
    band = _Band(np.random.default_rng(seed), seconds)
    tune = band.play_tune()
    others, parts = band.play_accompaniment()
    peak = np.abs(tune + others).max() / 0.8
    mixed, alone = (np.asarray(wave / peak, np.float32) for wave in (tune + others, tune))
    return Mix(mixed, alone, parts)


def make_solo(seed: int, seconds: float = 12.0) -> NDArray[np.float32]:
    """Return a tune alone, mono at 32,000 Hz: from C2 of 65 Hz upwards, with an echo and noise."""
    rng = np.random.default_rng(seed)
    tune = _Band(rng, seconds).play_tune(lowest_octave=2)
    echo = round(rng.uniform(0.03, 0.2) * RATE)
    tune[echo:] += 0.3 * tune[:-echo]
    noisy = tune + rng.normal(0, 0.003, len(tune))
    return np.asarray(noisy / np.abs(noisy).max() * 0.8, np.float32)


class _Band:
    def __init__(self, rng: np.random.Generator, seconds: float) -> None:
        self._rng = rng
        self._frames = round(seconds * RATE)
        self._beat_seconds = 60 / rng.uniform(70, 160)
        self._beats = int(seconds / self._beat_seconds)
        self._scale = MAJOR if rng.random() < 0.5 else MINOR
        self._tonic = int(rng.integers(12))
        self._chords = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]

    def play_tune(self, lowest_octave: int = 4) -> Wave:
        """Return the tune alone, as loud as 1: a line of steps and some leaps, with rests."""
        sound = self._sound(TUNES)
        octave = int(self._rng.integers(lowest_octave, 6))
        out, beat, degree = np.zeros(self._frames), 0.0, int(self._rng.integers(7))
        while beat < self._beats - 0.5:
            length = float(self._rng.choice([0.5, 1.0, 1.0, 1.5, 2.0, 4.0]))
            if self._rng.random() > 0.12:
                self._add(out, beat, sound(self._hertz(degree, octave), length * 0.95))
            beat += length
            degree = int(np.clip(degree + self._rng.choice([-3, -2, -1, -1, 1, 1, 2, 4]), -3, 9))
        return out

    def play_accompaniment(self) -> tuple[Wave, str]:
        """Return what plays below the tune, and its names."""
        parts = {"bass": self._bass, "drums": self._drums, "pad": self._pad, "chords": self._strum}
        chances = {"bass": 1.0, "drums": 0.6, "pad": 0.5, "chords": 0.4}
        names = [name for name in parts if self._rng.random() < chances[name]]
        return np.sum([parts[name]() for name in names], axis=0), " ".join(names)

    def _bass(self) -> Wave:
        sound, octave = self._sound(BASSES), int(self._rng.integers(2, 4))
        out, level = np.zeros(self._frames), self._rng.uniform(1.0, 3.0)
        step = float(self._rng.choice([0.5, 1.0, 2.0, 4.0]))
        for beat in np.arange(0, self._beats, step):
            degree = self._chord_at(beat) + int(self._rng.choice([0, 0, 0, 4, -3]))
            hertz = self._hertz(degree, octave)
            while hertz > HIGHEST_BASS_HZ:
                hertz /= 2
            self._add(out, beat, level * sound(hertz, step * 0.9))
        return out

    def _pad(self) -> Wave:
        sound, level = self._sound(PADS), self._rng.uniform(0.1, 0.3)
        return self._chordal(sound, level, np.arange(0, self._beats, 4.0), 4.0)

    def _strum(self) -> Wave:
        sound, level = self._sound(TUNES), self._rng.uniform(0.1, 0.3)
        return self._chordal(sound, level, np.arange(0, self._beats, 1.0) + 0.5, 0.4)

    def _chordal(self, sound: Sound, level: float, beats: Wave, length: float) -> Wave:
        out, octave = np.zeros(self._frames), int(self._rng.integers(3, 5))
        for beat in beats:
            for third in (0, 2, 4):
                hertz = self._hertz(self._chord_at(beat) + third, octave)
                self._add(out, beat, level * sound(hertz, length))
        return out

    def _drums(self) -> Wave:
        out, level = np.zeros(self._frames), self._rng.uniform(0.5, 1.5)
        time = np.arange(RATE // 4) / RATE
        sweep = 50 * time + 3 * (1 - np.exp(-time / 0.02))
        kick = np.sin(2 * np.pi * sweep) * np.exp(-time / 0.08)
        snare = self._rng.normal(0, 0.4, len(time)) * np.exp(-time / 0.05)
        hat = np.diff(self._rng.normal(0, 0.2, len(time) + 1)) * np.exp(-time / 0.02)
        for beat in range(self._beats):
            self._add(out, beat, level * (snare if beat % 2 else kick))
            self._add(out, beat + 0.5, level * hat)
        return out

    def _chord_at(self, beat: float) -> int:
        return self._chords[int(beat // 4) % 4]

    def _hertz(self, degree: int, octave: int) -> float:
        tone = self._scale[degree % 7] + 12 * (degree // 7) + self._tonic
        return float(440 * 2 ** (octave - 4 + (tone - 9) / 12))

    def _add(self, out: Wave, beat: float, wave: Wave) -> None:
        start = round(beat * self._beat_seconds * RATE)
        wave = wave[: max(0, len(out) - start)]
        out[start : start + len(wave)] += wave

    def _sound(self, shapes: tuple[str, ...]) -> Sound:
        """Return an instrument: what it plays for so many Hz and beats."""
        shape = SHAPES[str(self._rng.choice(shapes))]
        cents = self._rng.choice([0.0, 6.0, 12.0])
        fall_seconds = self._rng.choice([0.6, 2.0, 100.0])

        def play(hertz: float, beats: float) -> Wave:
            time = np.arange(round(beats * self._beat_seconds * RATE)) / RATE
            wave = np.zeros_like(time)
            for detuned in (hertz, hertz * 2 ** (cents / 1200)):
                for number in range(1, 1 + min(20, int(RATE / 2.2 / detuned))):
                    if strength := shape(number):
                        wave += strength / 2 * np.sin(2 * np.pi * number * detuned * time)
            edges = np.minimum(np.minimum(time / 0.01, time[::-1] / 0.02), 1)
            played: Wave = wave * edges * np.exp(-time / fall_seconds)
            return played

        return play
