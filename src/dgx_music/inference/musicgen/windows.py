"""Clips longer than the model's window: overlapping windows, each continues the one before.

The windowing is audiocraft's (``audiocraft/models/genmodel.py``, ``_generate_tokens``, with
``extend_stride`` 18 s): windows of 30 s begin every 18 s, so that each starts from the last 12 s
that are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dgx_music.audio.samples import Audio
from dgx_music.inference.engine import Run

_STRIDE = 0.6
"""As a share of a window: 18 s of 30 s."""


class Window(NamedTuple):
    """A part of the clip, in frames; the first ``given_count`` exist before it is decoded."""

    start: int
    frame_count: int
    given_count: int


def cut(total: int, given: int, longest: int) -> Iterator[Window]:
    """Yield the windows, of at most ``longest`` frames, of a clip of ``total`` frames.

    The first ``given`` frames exist already. Each window has frames to decode.
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
        """Report the frames done before and in this window, as a share of the whole clip."""
        done = max(self._window.given_count, progress * self._window.frame_count)
        self._run.report_progress((self._window.start + done) / self._total)

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` if the generation was cancelled."""
        self._run.check_cancelled()

    def free_slot(self) -> None:
        """Do nothing: the next window needs a slot."""

    def hand_out(self, audio: Audio, start: int) -> None:
        """Hand out a part of the whole clip's audio."""
        self._run.hand_out(audio, start)

    def make_room(self) -> bool:
        """Unload idle engines; return whether there were any."""
        return self._run.make_room()
