"""What it costs to hand out the audio of clips while they are made, in the whole engine.

    python -m benchmarks.listening                         small, clips of 10 s: 1, 8, 32 and 64 at a time
    python -m benchmarks.listening --channels 2 --clips 8  stereo
    python -m benchmarks.listening --size toy --seconds 2.5 --clips 1 2     to see that it runs

Each clip is made twice in each round, in turn: once its audio is made second by second while its
later codes are, as in a worker; once after its last code. First, so many clips are asked for at
once. Then, for a queue that is full, a clip follows in each slot as soon as the slot is free; these
clips are of 50 to 100 % of the length, so that their seconds do not end together. The language
model and the codec have their true sizes and random weights; the text encoder is a toy. The first
use of everything is left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch

from benchmarks.device import describe
from benchmarks.markdown import line, table
from benchmarks.musicgen_models import build_tokenizer, build_whole
from dgx_music.audio.samples import Audio
from dgx_music.catalog import ModelInfo
from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.musicgen.devices import (
    choose_device,
    choose_dtype,
    keep_float32,
    leave_a_core_free,
)
from dgx_music.inference.musicgen.engine import MusicGenEngine
from dgx_music.inference.musicgen.weights import Weights

PROMPT = "warm lo-fi piano"


@dataclass
class Clip:
    """One clip on its way: when its codes, its parts and all of it were there, in seconds."""

    started: float
    on_slot_free: Callable[[], None]
    codes: float = 0.0
    parts: list[float] = field(default_factory=list)
    end: float = 0.0

    def _passed(self) -> float:
        return time.perf_counter() - self.started

    def report_progress(self, progress: float) -> None: ...

    def check_cancelled(self) -> None: ...

    def make_room(self) -> bool:
        return False

    def free_slot(self) -> None:
        self.codes = self._passed()
        self.on_slot_free()

    def hand_out(self, audio: Audio, start: int) -> None:
        self.parts.append(self._passed())

    def finish(self) -> None:
        self.end = self._passed()


@dataclass(frozen=True)
class Times:
    """Of clips that were asked for at once: the seconds until these were there."""

    first_part: float
    last_first_part: float
    codes: float
    end: float

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> Times:
        firsts = [clip.parts[0] for clip in clips]
        return cls(
            min(firsts),
            max(firsts),
            max(clip.codes for clip in clips),
            max(clip.end for clip in clips),
        )

    @classmethod
    def median(cls, rounds: Sequence[Times]) -> Times:
        columns = zip(*(vars(each).values() for each in rounds), strict=True)
        return cls(*map(statistics.median, columns))


NAMES = {
    (1, False): "musicgen-small",
    (2, False): "musicgen-stereo-small",
    (1, True): "musicgen-melody",
    (2, True): "musicgen-stereo-melody",
}
"""A model by its channels and whether it hears melodies; its size is of no account here."""


def load(
    size: str, channels: int, slots: int, device: torch.device, *, hears_melody: bool = False
) -> MusicGenEngine:
    """Return the engine with random weights of the true shapes."""
    if device.type == "cpu":
        leave_a_core_free()
    else:
        keep_float32()
    dtype = choose_dtype("auto", device)
    model = build_whole(size, channels, dtype, hears_melody=hears_melody)
    name = NAMES[channels, hears_melody]
    settings = EngineSettings(engine="musicgen", model=name, device=str(device), slots=slots)
    weights = Weights(model, build_tokenizer(), "random", None)
    return MusicGenEngine(weights, device, ModelInfo(name, channels), settings)


def make_clips(engine: MusicGenEngine, durations: Sequence[float], at_once: int) -> list[Clip]:
    """Make clips of these lengths; so many have a slot at a time."""
    free = threading.Semaphore(at_once)
    started = time.perf_counter()
    clips = [Clip(started, free.release) for _ in durations]

    def make(number: int) -> None:
        free.acquire()
        request = GenerationRequest(
            generation_id=str(number), prompt=PROMPT, duration=durations[number], seed=number
        )
        try:
            engine.generate(request, clips[number])
        except BaseException:
            free.release()  # or the clips that wait for the slot would wait for ever
            raise
        clips[number].finish()

    with ThreadPoolExecutor(3 * at_once) as threads:
        list(threads.map(make, range(len(durations))))
    return clips


@contextmanager
def nobody_listens(engine: MusicGenEngine) -> Iterator[None]:
    """Make the audio of each clip after its last code."""
    decode = engine._loop.decode
    engine._loop.decode = lambda row, run, _listening=None: decode(row, run)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del engine._loop.decode


@dataclass(frozen=True)
class Cell:
    """Clips in one situation: their times with listeners and without, and the rounds' ratios."""

    name: str
    seconds: float
    heard: list[Times]
    unheard: list[Times]

    def _ratio(self, field_name: str) -> str:
        pairs = zip(self.heard, self.unheard, strict=True)
        ratios = (getattr(ours, field_name) / getattr(theirs, field_name) for ours, theirs in pairs)
        return f"{statistics.median(ratios):.3f} ×"

    def lines(self) -> Iterator[list[str]]:
        """Return the lines of the table."""
        ratios = (self._ratio("codes"), self._ratio("end"))
        for way, rounds, own in (
            ("while codes are made", self.heard, ratios),
            ("after the codes", self.unheard, ("", "")),
        ):
            times = Times.median(rounds)
            seconds = (f"{number:.3g} s" for number in vars(times).values())
            yield [self.name, way, *seconds, f"{self.seconds / times.end:.3g}", *own]


def measure(
    engine: MusicGenEngine, name: str, durations: Sequence[float], at_once: int, rounds: int
) -> Cell:
    """Make the clips once for nothing, and then in both ways, in turn."""
    cell = Cell(name, sum(durations), [], [])
    make_clips(engine, durations[:at_once], at_once)
    for number in range(rounds):
        for is_heard in (True, False) if number % 2 == 0 else (False, True):
            with nullcontext() if is_heard else nobody_listens(engine):
                times = Times.of(make_clips(engine, durations, at_once))
            (cell.heard if is_heard else cell.unheard).append(times)
    return cell


def a_full_queue(seconds: float, count: int) -> list[float]:
    """Return lengths of 50 to 100 % of the seconds."""
    chance = random.Random(1)
    return [round(seconds * chance.uniform(0.5, 1.0), 2) for _ in range(count)]


TITLES = (
    "clips",
    "audio is made",
    "first second of the first clip",
    "of the last",
    "all codes",
    "all audio",
    "audio s/s",
    "codes take",
    "the whole takes",
)
TURNS = 3
"""Clips for each slot of the queue that is full."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=["toy", "small", "medium", "large"], default="small")
    parser.add_argument("--channels", type=int, choices=[1, 2], default=1)
    parser.add_argument("--melody", action="store_true", help="a model that hears melodies")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip")
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    device = choose_device(options.device)
    print(describe(device), flush=True)
    most = max(options.clips)
    engine = load(options.size, options.channels, most, device, hears_melody=options.melody)
    print("\n" + table(TITLES, []), flush=True)
    for count in options.clips:
        for name, durations in (
            (f"{count} at once", [options.seconds] * count),
            (f"{count} slots, a full queue", a_full_queue(options.seconds, TURNS * count)),
        ):
            cell = measure(engine, name, durations, count, options.rounds)
            for cells in cell.lines():
                print(line(cells), flush=True)  # at once: the rest may take minutes
    engine.close()


if __name__ == "__main__":
    main()
