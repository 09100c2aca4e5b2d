"""Short pieces of music with a known tempo and key, made from a seed: drums, bass, chords and a tune.

Nothing is exact, as in music: notes are a few milliseconds early or late, instruments are out of
tune, some beats are left out, and there is noise and an echo. The seed decides all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Wave: TypeAlias = NDArray[np.float64]
Timbre: TypeAlias = Callable[[float, float], Wave]
"""Returns a note of so many Hz and seconds."""

RATE = 32_000
KEYS = [
    name + mode
    for name in ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    for mode in ("", "m")
]
SCALES = {"": (0, 2, 4, 5, 7, 9, 11), "m": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = {  # degrees of the scale, from 0
    "": [(0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (1, 4, 0, 0), (0, 2, 3, 4), (0, 3, 0, 4)],
    "m": [(0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 6), (0, 3, 6, 2), (0, 0, 5, 6), (0, 5, 3, 4)],
}
DRUMS = {  # beats in a bar, and where in the bar each drum plays, in beats
    "house": (4, (0, 1, 2, 3), (1, 3), (0.5, 1.5, 2.5, 3.5)),
    "rock": (4, (0, 2, 2.5), (1, 3), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
    "hip hop": (4, (0, 1.5, 2.25), (1, 3), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
    "break": (4, (0, 2.5), (1, 3, 1.75), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
    "waltz": (3, (0,), (1, 2), (0, 1, 2)),
    "reggae": (4, (2,), (2,), (0.5, 1.5, 2.5, 3.5)),
    "latin": (4, (0, 1.5, 3), (0, 1.5, 3, 5 / 2), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
    "shaker": (4, (), (), (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
    "none": (4, (), (), ()),
}
BACKINGS = ("pads", "strums", "offbeats", "arpeggio", "eighths")


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece, ``[channel, frame]`` at 32,000 Hz, and what is known of it."""

    samples: NDArray[np.float32]
    bpm: float
    key: str
    style: str


def make_piece(
    seed: int, bpm: float | None = None, key: str | None = None, seconds: float = 12.0
) -> Piece:
    """Return the piece of this seed, which also chooses the tempo and the key if they are not given."""
    rng = np.random.default_rng(seed)
    bpm = bpm or float(np.exp(rng.uniform(np.log(60), np.log(180))))
    key = key or str(rng.choice(KEYS))
    style = str(rng.choice([*DRUMS]))
    backing = str(rng.choice([*BACKINGS] if style != "none" else [*BACKINGS[1:]]))
    band = _Band(rng, bpm, key, seconds)
    band.play_drums(style)
    band.play_bass()
    band.play_chords(backing)
    if rng.random() < 0.6:
        band.play_tune()
    return Piece(band.mix(), bpm, key, f"{style}, {backing}")


def make_drums(seed: int, seconds: float = 12.0) -> NDArray[np.float32]:
    """Return drums alone, which have a tempo and no key."""
    rng = np.random.default_rng(seed)
    band = _Band(rng, rng.uniform(80, 160), "C", seconds)
    band.play_drums([*DRUMS][seed % 5])
    return band.mix()


def make_clicks(bpm: float, seconds: float = 12.0) -> NDArray[np.float32]:
    """Return the clicks of a metronome, which have a tempo and no key."""
    samples = np.zeros((1, round(seconds * RATE)), np.float32)
    click = (np.random.default_rng(1).standard_normal(160) * _fall(160, 0.002)).astype(np.float32)
    for beat in np.arange(0, seconds - 0.1, 60 / bpm):
        start = round(beat * RATE)
        samples[0, start : start + 160] = 0.5 * click
    return samples


def make_drone(seed: int, seconds: float = 12.0) -> NDArray[np.float32]:
    """Return a note with overtones that swells, and neither begins nor ends: no tempo and no key."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE)) / RATE
    hertz = rng.uniform(50, 200)
    wave = sum(np.sin(2 * np.pi * hertz * n * time + rng.uniform(0, 6)) / n for n in range(1, 9))
    swell = 1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.03, 0.1) * time + rng.uniform(0, 6))
    return np.asarray(0.2 * wave * swell, np.float32)[np.newaxis]


def make_noise(seed: int, seconds: float = 12.0) -> NDArray[np.float32]:
    """Return white, pink or brown noise in two channels, by the seed."""
    rng = np.random.default_rng(seed)
    frames = round(seconds * RATE)
    slope = (0.0, 0.5, 1.0)[seed % 3]
    spectrum = np.fft.rfft(rng.standard_normal((2, frames)))
    spectrum /= np.maximum(np.arange(spectrum.shape[1]), 20.0) ** slope
    wave = np.fft.irfft(spectrum, frames)
    return np.asarray(0.1 * wave / wave.std(), np.float32)


class _Band:
    """Plays into two channels."""

    def __init__(self, rng: np.random.Generator, bpm: float, key: str, seconds: float) -> None:
        self._rng = rng
        self._beat = 60 / bpm
        self._beats = int(seconds / self._beat)
        self._bar = 4
        self._out = np.zeros((2, round((seconds + 1) * RATE)))
        self._frames = round(seconds * RATE)
        self._mode = "m" if key.endswith("m") else ""
        self._tonic = KEYS.index(key) // 2
        self._scale = SCALES[self._mode]
        self._chords = PROGRESSIONS[self._mode][rng.integers(len(PROGRESSIONS[self._mode]))]
        self._tuning = 440 * 2 ** (rng.normal(0, 5) / 1200)
        self._late_seconds = rng.uniform(0, 0.008)
        self._swing = rng.choice([0.0, 0.0, 0.0, 0.08, 0.16])
        self._begin = rng.uniform(0, 0.3)

    def play_drums(self, style: str) -> None:
        self._bar, kicks, snares, hats = DRUMS[style]
        level = self._rng.uniform(0.5, 1.0)
        kick, snare, hat = _kick(self._rng), _snare(self._rng), _hat(self._rng)
        for start in range(0, self._beats, self._bar):
            for wave, places, loud in ((kick, kicks, 0.9), (snare, snares, 0.5), (hat, hats, 0.2)):
                for place in places:
                    if start + place < self._beats and self._rng.random() > 0.04:
                        self._add(wave, start + place, loud * level)

    def play_bass(self) -> None:
        timbre = _timbre(self._rng)
        level = self._rng.uniform(0.2, 0.5)
        step = float(self._rng.choice([0.5, 1.0, self._bar]))
        for beat in np.arange(0, self._beats, step):
            degree = self._degree_at(beat)
            if step < self._bar and self._rng.random() < 0.15:
                degree += 4
            self._add(timbre(self._hertz(degree, 2), 0.9 * step * self._beat), beat, level)

    def play_chords(self, backing: str) -> None:
        timbre = _timbre(self._rng)
        level = self._rng.uniform(0.1, 0.25)
        places, length = {
            "pads": ([0.0], float(self._bar)),
            "strums": ([0.0, 1.5, 2.0], 1.0),
            "offbeats": ([0.5, 1.5, 2.5, 3.5], 0.4),
            "arpeggio": (list(np.arange(0, self._bar, 0.5)), 0.7),
            "eighths": (list(np.arange(0, self._bar, 0.5)), 0.45),
        }[backing]
        for start in range(0, self._beats, self._bar):
            notes = [self._degree_at(start) + third for third in (0, 2, 4)]
            for number, place in enumerate(each for each in places if each < self._bar):
                if start + place >= self._beats:
                    continue
                played = [notes[number % 3]] if backing == "arpeggio" else notes
                for degree in played:
                    wave = timbre(self._hertz(degree, 4), length * self._beat)
                    self._add(wave, start + place, level * (2 if backing == "arpeggio" else 1))

    def play_tune(self) -> None:
        timbre = _timbre(self._rng)
        level = self._rng.uniform(0.1, 0.2)
        beat = 0.0
        while beat < self._beats - 1:
            length = float(self._rng.choice([0.5, 0.5, 1.0, 1.5, 2.0]))
            chord = self._degree_at(beat)
            tones = [chord, chord + 2, chord + 4, int(self._rng.integers(0, 7))]
            degree = int(self._rng.choice(tones))
            if self._rng.random() > 0.15:
                self._add(timbre(self._hertz(degree, 5), 0.9 * length * self._beat), beat, level)
            beat += length

    def mix(self) -> NDArray[np.float32]:
        echo = round(self._rng.uniform(0.02, 0.09) * RATE)
        out = self._out.copy()
        for times in range(1, 5):
            out[:, times * echo :] += self._out[:, : -times * echo] * 0.35**times
        out = out[:, : self._frames]
        out += self._rng.normal(0, 10 ** self._rng.uniform(-4, -2.3), out.shape)
        return np.asarray(0.8 * out / np.abs(out).max(), np.float32)

    def _degree_at(self, beat: float) -> int:
        return self._chords[int(beat // self._bar) % len(self._chords)]

    def _hertz(self, degree: int, octave: int) -> float:
        tone = self._scale[degree % 7] + 12 * (degree // 7)
        semitones = 12 * (octave - 4) + self._tonic + tone - 9
        return float(self._tuning * 2 ** (semitones / 12))

    def _add(self, wave: Wave, beat: float, level: float) -> None:
        swung = beat + (self._swing if beat % 1 == 0.5 else 0)
        seconds = self._begin + swung * self._beat + self._rng.normal(0, self._late_seconds)
        start = max(0, round(seconds * RATE))
        wave = wave[: self._out.shape[1] - start] * level * self._rng.uniform(0.8, 1.1)
        pan = self._rng.uniform(0.4, 0.6)
        self._out[:, start : start + len(wave)] += np.outer((pan, 1 - pan), wave)


def _fall(frames: int, seconds: float) -> Wave:
    return np.exp(-np.arange(frames) / (seconds * RATE))


def _kick(rng: np.random.Generator) -> Wave:
    frames = RATE // 4
    falling = rng.uniform(45, 60) + rng.uniform(60, 160) * _fall(frames, 0.02)
    wave: Wave = np.sin(2 * np.pi * np.cumsum(falling) / RATE) * _fall(frames, 0.08)
    return wave


def _snare(rng: np.random.Generator) -> Wave:
    frames = RATE // 5
    tone = np.sin(2 * np.pi * rng.uniform(160, 240) * np.arange(frames) / RATE)
    wave: Wave = (0.5 * tone + rng.normal(0, 0.5, frames)) * _fall(frames, rng.uniform(0.03, 0.07))
    return wave


def _hat(rng: np.random.Generator) -> Wave:
    frames = RATE // 12
    wave: Wave = np.diff(rng.normal(0, 0.5, frames + 1)) * _fall(frames, rng.uniform(0.01, 0.03))
    return wave


def _timbre(rng: np.random.Generator) -> Timbre:
    """Return an instrument: the strength of its overtones, how it starts, and how it dies away."""
    count = int(rng.integers(4, 14))
    overtones = np.arange(1, count + 1) ** -rng.uniform(0.8, 2.0)
    if rng.random() < 0.3:
        overtones[1::2] *= 0.1  # as of a clarinet
    attack_seconds = rng.uniform(0.003, 0.03)
    fall_seconds = rng.choice([0.15, 0.4, 1.5, 100.0])
    detune = rng.choice([0.0, 0.0, 0.002])

    @cache  # the same notes come again and again
    def play(hertz: float, seconds: float) -> Wave:
        frames = max(round(seconds * RATE), 64)
        phase = 2 * np.pi * hertz * np.arange(frames) / RATE
        wave = np.zeros(frames)
        for number, strength in enumerate(overtones, start=1):
            if number * hertz < RATE / 2.2:
                wave += strength * np.sin(number * phase)
                if detune:
                    wave += strength * np.sin(number * (1 + detune) * phase)
        ramp = np.arange(frames) / RATE
        shape = np.minimum(ramp / attack_seconds, 1) * np.minimum(ramp[::-1] / 0.02, 1)
        played: Wave = wave * shape * _fall(frames, fall_seconds) / overtones.sum()
        return played

    return play
