"""Clips longer than what the model hears at a time: overlapping windows, each of which goes on from the one before.

The windowing is audiocraft's (``audiocraft/models/genmodel.py``, ``_generate_tokens``, with ``extend_stride`` 18 s): windows
of 30 s begin every 18 s, so that each starts from the last 12 s of what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dgx_music.inference.engine import Run

_STRIDE = 0.6
"""Of a window: 18 s of 30 s."""


class Window(NamedTuple):
    """A part of the clip, in frames; the first ``given_count`` of it are there before it is decoded."""

    start: int
    frame_count: int
    given_count: int


def cut(total: int, given: int, longest: int) -> Iterator[Window]:
    """Yield the windows, of at most ``longest`` frames, of a clip of ``total``, of which ``given`` are there.

    In each of them something is missing.
    """
    start, stride = 0, round(longest * _STRIDE)
    while given < total:
        end = min(start + longest, total)
        if given < end:
            yield Window(start, end - start, given - start)
        start, given = start + stride, max(given, end)


class WindowRun:
    """A ``Run`` that reports a window's progress as that of the whole clip."""

    def __init__(self, run: Run, window: Window, total: int) -> None:
        self._run = run
        self._window = window
        self._total = total

    def report_progress(self, progress: float) -> None:
        """Report the frames that are done before and in this window, as a share of all."""
        done = max(self._window.given_count, progress * self._window.frame_count)
        self._run.report_progress((self._window.start + done) / self._total)

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` once the generation was cancelled."""
        self._run.check_cancelled()

    def free_slot(self) -> None:
        """Say nothing: the next window needs a slot."""

    def make_room(self) -> bool:
        """Unload idle engines; return whether there were any."""
        return self._run.make_room()
