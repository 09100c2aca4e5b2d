"""How fast audio is made, and when a fleet reaches a generation: no clock and no database."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import NamedTuple

REMEMBERED = 50
LEAST_MEASURED = 5
"""With fewer measurements nobody can say how much the speed varies."""


@dataclass(frozen=True)
class Range:
    """From ``low`` to ``high`` seconds, or seconds for one of audio; ``high`` may be infinite."""

    low: float
    high: float


class Measured(NamedTuple):
    """Seconds for one second of audio: 10, 50 and 90 of 100 generations take at most this long.

    With fewer than ``LEAST_MEASURED`` it is the smallest, the median and the largest measurement,
    and no forecast is made of it.
    """

    low: float
    typical: float
    high: float
    measured_count: int


class Speedometer:
    """The seconds that one worker took for a second of audio in its last generations, by model."""

    def __init__(self) -> None:
        self._logs: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        self._news: set[str] = set()

    def note(self, model_name: str, run_seconds: float, audio_seconds: float) -> None:
        """Remember one generation, whatever ran beside it; ignores one that took no time."""
        if run_seconds > 0 and audio_seconds > 0:
            self._logs[model_name].append(math.log(run_seconds / audio_seconds))
            self._news.add(model_name)

    def take(self) -> dict[str, Measured]:
        """Return the speeds of the models with a new measurement since the last call.

        They are in the order of their names, in which their rows are then locked.
        """
        news = sorted(self._news)
        self._news.clear()
        return {name: _measured(self._logs[name]) for name in news}

    def put_back(self, names: Iterable[str]) -> None:
        """Return the speeds of these models at the next call again: they could not be stored."""
        self._news.update(names)


def _measured(logs: Sequence[float]) -> Measured:
    """Return the deciles of a population, estimated from a sample of logarithms.

    The i-th of n sorted values has i/(n + 1) of the population below it (R's type 6; Hyndman and
    Fan, "Sample Quantiles in Statistical Packages", 1996): the smaller the sample, the wider the
    range. With logarithms no result is below 0.
    """
    if len(logs) < LEAST_MEASURED:
        return Measured(math.exp(min(logs)), math.exp(median(logs)), math.exp(max(logs)), len(logs))
    deciles = [math.exp(value) for value in quantiles(logs, n=10, method="exclusive")]
    return Measured(deciles[0], deciles[4], deciles[8], len(logs))


@dataclass(frozen=True)
class Slot:
    """One slot that serves the model."""

    speed: Range
    """Seconds that it takes for one second of the model's audio."""
    free_in: Range = Range(0.0, 0.0)
    """Seconds until its current generation ends; ``high`` is infinite if that is unknown."""
    sharers: int = 1
    """Models that take turns on it, this one included."""


@dataclass(frozen=True)
class Ahead:
    """The generations before one in the queue: their number, all their audio, the longest one's."""

    count: int
    audio_seconds: float
    longest_seconds: float


def earliest_start(slots: Iterable[Slot], ahead: Ahead) -> float:
    """Return the seconds before which no slot can begin the generation that comes after ``ahead``.

    Each slot makes at most ``1 / low`` seconds of audio in a second. When the generation starts,
    all audio ahead is made, except for what the other slots are still making: at most the longest
    each. So it starts after ``(audio - (slots - 1) * longest) / sum(1 / low)``, and not before a
    slot is free. This is Graham's bound for list scheduling, reversed (R. L. Graham, "Bounds on
    Multiprocessing Timing Anomalies", 1969). Slots that several models share count as if they were
    for this model alone.
    """
    slots = list(slots)
    in_hand = [slot.free_in.low / slot.speed.low for slot in slots]
    left = (len(slots) - 1) * max(ahead.longest_seconds, *in_hand)
    rate = sum(1 / slot.speed.low for slot in slots)
    return max(
        min(slot.free_in.low for slot in slots), (ahead.audio_seconds + sum(in_hand) - left) / rate
    )


def latest_start(slots: Iterable[Slot], ahead: Ahead) -> float:
    """Return the seconds within which a slot begins the generation after ``ahead``; infinite if unknown.

    No slot is idle while it waits. So a set of slots that are free after ``high_i``, and then make
    at least ``1 / (speed_i * sharers_i)`` seconds of audio in a second, has made all audio ahead by
    ``(audio + sum(high_i * rate_i)) / sum(rate_i)``. The result is the smallest of these, for the
    slots that are free first. If fewer generations are ahead than slots become free, it need not
    wait for more slots. That models share a slot evenly is an assumption.
    """
    by_work, audio, rate = math.inf, ahead.audio_seconds, 0.0
    for slot in sorted(slots, key=lambda slot: slot.free_in.high):
        own_rate = 1 / (slot.speed.high * slot.sharers)
        audio, rate = audio + slot.free_in.high * own_rate, rate + own_rate
        by_work = min(by_work, audio / rate)
    free = sorted(slot.free_in.high for slot in slots if slot.sharers == 1)
    return min(by_work, free[ahead.count]) if ahead.count < len(free) else by_work
