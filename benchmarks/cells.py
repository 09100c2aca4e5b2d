"""The measurements of one model size: all loops at one batch, and mixed durations.

A budget of minutes shortens the clips if the time is limited.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks import arrivals, device, roofline
from benchmarks.arrivals import Poisson, Together, percentile
from benchmarks.loops import LONGEST_TOKENS, Loop, Ours, Stock
from benchmarks.musicgen_models import (
    SHAPES,
    build_model,
    build_tokenizer,
    steps,
)

SHORTEST_SECONDS = 0.5


@dataclass(frozen=True)
class Cell:
    """One loop at one batch of one size.

    ``clip_seconds`` is less than was asked for if the time is short.
    """

    size: str
    batch: int
    loop: str
    clip_seconds: float
    audio_seconds_per_second: float
    p50_seconds: float
    p99_seconds: float
    roofline_percent: float
    ratio: float
    weight_bytes: int
    working_bytes: int


class Budget:
    """Divides the rest of the time among the measurements; without a limit it is infinite."""

    def __init__(self, minutes: float, shares: int) -> None:
        self._ends_at = math.inf if not minutes else time.perf_counter() + 60 * minutes
        self._shares = shares

    def take(self, shares: int) -> float:
        """Return the seconds that a measurement of this many shares may take."""
        left = self._ends_at - time.perf_counter()
        seconds = left * shares / max(shares, self._shares)
        self._shares -= shares
        return seconds


class Bench:
    """The loops of one size on one device."""

    def __init__(self, size: str, options: argparse.Namespace, bandwidth: float) -> None:
        self.size, self._shape, self._options, self._bandwidth = (
            size,
            SHAPES[size],
            options,
            bandwidth,
        )
        self._device: torch.device = options.device
        dtype = getattr(torch, options.dtype)
        model, tokenizer = build_model(size, dtype, self._device), build_tokenizer()
        self.stock = Stock(model, tokenizer)
        self._weight_bytes = {
            self.stock.name: sum(each.nbytes for each in model.decoder.parameters())
        }
        self.ours: list[Ours] = []
        for weights, kernels in product(options.weights, options.kernels):
            before = device.held_bytes(self._device)
            longest = max(options.room, options.seconds)
            loop = Ours(model, tokenizer, longest, weights, kernels)
            self._weight_bytes[loop.name] = device.held_bytes(self._device) - before
            self.ours.append(loop)
        self._dtype_bytes: int = dtype.itemsize

    def throughput(self, batch: int, allowed_seconds: float) -> list[Cell]:
        """Measure all loops at one batch, in turn."""
        loops: list[Loop] = [self.stock, *self.ours]
        clips: dict[str, float] = {}
        working = dict.fromkeys((loop.name for loop in loops), 0)
        times: dict[str, list[float]] = {loop.name: [] for loop in loops}
        for loop in loops:
            before = device.held_bytes(self._device)
            loop.open(batch)
            clips[loop.name] = clip = self._clip(loop, batch, allowed_seconds / len(loops))
            loop.warm_up([clip] * batch)
            working[loop.name] = device.held_bytes(self._device) - before
        peaks = dict.fromkeys(working, 0)
        for _ in range(self._options.rounds):
            for loop in loops:
                before = device.held_bytes(self._device)
                times[loop.name] += loop.generate([clips[loop.name]] * batch)
                peaks[loop.name] = max(peaks[loop.name], device.peak_bytes(self._device) - before)
        for loop in loops:
            loop.close()
        return [
            self._cell(loop, batch, clips, times, max(0, working[loop.name]) + peaks[loop.name])
            for loop in loops
        ]

    def _clip(self, loop: Loop, batch: int, allowed_seconds: float) -> float:
        """Return the seconds of the longest clip that fits, as a multiple of half a second.

        A short clip is timed to find out. One more round is reserved for our warm-up.
        """
        if allowed_seconds == math.inf:
            return float(self._options.seconds)  # on a CPU
        return fitting(
            self._options.seconds,
            self.speed(loop, batch),
            allowed_seconds / (self._options.rounds + 1),
        )

    def speed(self, loop: Loop, batch: int) -> float:
        """Return the seconds of a clip per second of work, for a short batch that is warm."""
        loop.generate([SHORTEST_SECONDS] * batch)
        return SHORTEST_SECONDS / max(loop.generate([SHORTEST_SECONDS] * batch))

    def _cell(
        self,
        loop: Loop,
        batch: int,
        clips: dict[str, float],
        times: dict[str, list[float]],
        working: int,
    ) -> Cell:
        clip, mine = clips[loop.name], times[loop.name]
        seconds = statistics.median(mine)
        least = roofline.step_seconds(
            self._shape,
            bandwidth=self._bandwidth,
            batch=batch,
            steps=steps(clip),
            text_tokens=LONGEST_TOKENS,
            bytes_per_weight=loop.bytes_per_weight,
            bytes_per_number=self._dtype_bytes,
        )
        stock_speeds = [clips[self.stock.name] / each for each in times[self.stock.name]]
        return Cell(
            size=self.size,
            batch=batch,
            loop=loop.name,
            clip_seconds=clip,
            audio_seconds_per_second=batch * clip / seconds,
            p50_seconds=percentile(mine, 0.5),
            p99_seconds=percentile(mine, 0.99),
            roofline_percent=100 * least * steps(clip) / seconds,
            ratio=statistics.median(
                clip / each / speed for each, speed in zip(mine, stock_speeds, strict=True)
            ),
            weight_bytes=self._weight_bytes[loop.name],
            working_bytes=working,
        )

    def mixed(self, allowed_seconds: float) -> tuple[float, list[Together]]:
        """Return the seconds of the longest clip, and the results of eight mixed clips."""
        longest: float = self._options.seconds
        if allowed_seconds < math.inf:
            longest = fitting(
                longest, self._together_speed(), allowed_seconds / self._options.rounds
            )
        return longest, arrivals.measure_together(
            self.stock, self.ours, longest, self._options.rounds
        )

    def _together_speed(self) -> float:
        """Return the seconds of the longest clip per second of a round.

        Ours makes the clips four times in a round: to warm up and to measure, before and after.
        """
        seconds = arrivals.stock_seconds_together(1.0) / self.speed(self.stock, 1)
        for loop in self.ours:
            loop.open(len(arrivals.SHARES))
            seconds += 4 / self.speed(loop, len(arrivals.SHARES))
            loop.close()
        return float(1 / seconds)

    def poisson(self, allowed_seconds: float) -> tuple[str, list[Poisson]]:
        """Return a description of the arrivals, and the latencies of all loops.

        The rate of arrivals is a share (``--load``) of what ``generate`` can do.
        """
        options = self._options
        batch, longest = options.slots, min(options.poisson_seconds, options.seconds)
        speed = self.speed(self.stock, batch)
        if allowed_seconds < math.inf:
            batches = options.requests / options.load / batch * (1 + len(self.ours))
            longest = fitting(longest, speed / batches, allowed_seconds)
        rate = options.load * batch * speed / longest
        requests = arrivals.poisson_requests(options.requests, rate, longest)
        words = (
            f"{self.size}, {options.requests} clips of {longest * min(arrivals.SHARES):.2g} to {longest:.2g} s, "
            f"{rate:.3g} a second, at most {batch} at a time"
        )
        return words, arrivals.measure_poisson(self.stock, self.ours, requests, batch)


def fitting(wanted: float, speed: float, seconds: float) -> float:
    """Return the seconds of a clip that can be made in this time, at most ``wanted``.

    ``speed`` is seconds of the clip per second of work; the result is a multiple of 0.5.
    """
    halves = math.floor(2 * speed * seconds) / 2
    return float(min(wanted, max(SHORTEST_SECONDS, halves)))
