"""Estimates in words, rounded outwards: a range in words always holds the range in seconds."""

from __future__ import annotations

import math

from dgx_music.forecast import Range
from dgx_music.statuses import PENDING
from dgx_music.storage.estimates import Estimate

_STEPS = ((20, 1, 1, "s"), (120, 10, 1, "s"), (7_200, 60, 60, "min"), (172_800, 3_600, 3_600, "h"))
_LONGEST_STEP = (math.inf, 86_400, 86_400, "d")
_AT_ONCE_SECONDS = 1.0


def in_words(estimate: Estimate) -> str | None:
    """Return ``starts in about 2 to 5 min, done in about 3 to 7 min``, or why that is unknown.

    A finished generation has no estimate: ``None``.
    """
    if estimate.unknown_because is not None:
        return f"{'start' if estimate.status == PENDING else 'end'} unknown: {estimate.unknown_because}"
    ranges = (("starts", estimate.starts_in), ("done", estimate.done_in))
    return (
        ", ".join(f"{what} {moment_in_words(each)}" for what, each in ranges if each is not None)
        or None
    )


def is_almost_done(done_in: Range) -> bool:
    """Return True if so little time is left that no number says it."""
    return done_in.high < _AT_ONCE_SECONDS


def left_in_words(done_in: Range) -> str:
    """Return how long something still takes: ``about 10 to 12 min left``."""
    if is_almost_done(done_in):
        return "almost done"
    return f"{moment_in_words(done_in).removeprefix('in ').replace('within', 'at most')} left"


def moment_in_words(each: Range) -> str:
    """Return the range in words, in the unit that fits its end."""
    if each.high < _AT_ONCE_SECONDS:
        return "at once"
    _, step, size, unit = next((row for row in _STEPS if each.high <= row[0]), _LONGEST_STEP)
    low, high = (
        math.floor(each.low / step) * step // size,
        math.ceil(each.high / step) * step // size,
    )
    if low == 0:
        return f"within {high:,} {unit}"
    return f"in about {high:,} {unit}" if low == high else f"in about {low:,} to {high:,} {unit}"
