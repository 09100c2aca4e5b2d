"""Clips of mixed durations, all at once or one after another.

Ours takes a clip as soon as a slot is free; ``generate`` makes one batch after another.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.loops import Ours, Request, Stock

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9, 1.0)
"""The durations of the clips, as shares of the longest."""
STOCK_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Together:
    """Eight clips that arrive together: the seconds until they were done, for one loop."""

    loop: str
    mean_seconds: float
    last_seconds: float


@dataclass(frozen=True)
class Poisson:
    """Clips that arrive one after another: their latencies from the arrival, for one loop."""

    loop: str
    mean_seconds: float
    p50_seconds: float
    p99_seconds: float
    audio_seconds_per_second: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the percentile, interpolated between the two nearest values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def measure_together(
    stock: Stock, ours: Sequence[Ours], longest: float, rounds: int
) -> list[Together]:
    """Return the medians of the rounds.

    Ours runs before and after ``generate`` in each round, so that a slow moment meets both.
    """
    durations = [share * longest for share in SHARES]
    ends: dict[str, list[list[float]]] = {}

    def run_ours() -> None:
        for loop in ours:
            loop.open(len(durations))
            loop.warm_up(durations)
            ends.setdefault(loop.name, []).append(loop.generate(durations))
            loop.close()

    stock.warm_up(durations)
    for _ in range(rounds):
        run_ours()
        for batch in STOCK_BATCHES:
            ends.setdefault(f"{stock.name}, batches of {batch}", []).append(
                _in_batches(stock, durations, batch)
            )
        run_ours()
    return [
        Together(
            name, statistics.median(map(statistics.mean, each)), statistics.median(map(max, each))
        )
        for name, each in ends.items()
    ]


def stock_seconds_together(longest: float) -> float:
    """Return the seconds of audio that ``generate`` makes in a round.

    Each batch counts once, as long as its longest clip.
    """
    durations = [share * longest for share in SHARES]
    return sum(max(group) for batch in STOCK_BATCHES for group in _groups(durations, batch))


def _in_batches(stock: Stock, durations: Sequence[float], batch: int) -> list[float]:
    """Return the second at which each clip was done.

    The shortest clips go first, which gives the least mean and the least padding.
    """
    ends: list[float] = []
    for group in _groups(durations, batch):
        spent = ends[-1] if ends else 0.0
        ends += [spent + seconds for seconds in stock.generate(group)]
    return ends


def _groups(durations: Sequence[float], batch: int) -> Iterator[Sequence[float]]:
    ordered = sorted(durations)
    return (ordered[start : start + batch] for start in range(0, len(ordered), batch))


def poisson_requests(count: int, rate: float, longest: float, seed: int = 0) -> list[Request]:
    """Return requests of mixed durations that arrive at random, ``rate`` a second on average.

    The same seed gives the same requests, so both loops get the same ones.
    """
    rng = random.Random(seed)
    at, requests = 0.0, []
    for _ in range(count):
        requests.append(Request(at, rng.choice(SHARES) * longest))
        at += rng.expovariate(rate)
    return requests


def measure_poisson(
    stock: Stock, ours: Sequence[Ours], requests: Sequence[Request], batch: int
) -> list[Poisson]:
    """Serve the requests in real time: first in static batches, then in as many slots."""
    results = [
        _summary(f"{stock.name}, static batches", requests, serve_static(stock, requests, batch))
    ]
    for loop in ours:
        loop.open(batch)
        loop.warm_up([request.seconds for request in requests])
        results.append(_summary(f"{loop.name}, continuous", requests, loop.serve(requests)))
        loop.close()
    return results


def serve_static(stock: Stock, requests: Sequence[Request], batch: int) -> list[float]:
    """Return the second at which each request was done.

    When a batch ends, the requests that wait make up the next one, at most ``batch`` of them.
    """
    ends: list[float] = []
    started = time.perf_counter()
    while rest := requests[len(ends) :]:
        spent = time.perf_counter() - started
        group = [request for request in rest if request.arrives_at <= spent][:batch]
        if group:
            stock.generate([request.seconds for request in group])
            ends += [time.perf_counter() - started] * len(group)
        else:
            time.sleep(rest[0].arrives_at - spent)
    return ends


def _summary(name: str, requests: Sequence[Request], ends: Sequence[float]) -> Poisson:
    latencies = [end - request.arrives_at for end, request in zip(ends, requests, strict=True)]
    return Poisson(
        loop=name,
        mean_seconds=statistics.mean(latencies),
        p50_seconds=percentile(latencies, 0.5),
        p99_seconds=percentile(latencies, 0.99),
        audio_seconds_per_second=sum(request.seconds for request in requests) / max(ends),
    )
