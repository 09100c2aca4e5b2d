"""The thread of the codec: it does window after window, of the clip with the least to wait for."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor

from dgx_music.inference.musicgen.codec import CodecWork


@dataclass(eq=False)
class Clip:
    """A clip on its way through the codec, and what its caller waits for."""

    number: int
    work: CodecWork
    result: Future[Tensor] = field(default_factory=Future)
    is_in_line: bool = False
    """True from when a window waits for its turn until that window is done."""
    turns_waited: int = 0
    """How many turns others had while a window of this clip waited."""

    @property
    def turn(self) -> tuple[int, int]:
        """Return what is smallest of the clip that goes next."""
        return self.work.left - self.turns_waited, self.number


class CodecThread:
    """Does the windows of all clips in one thread, so that the slots wait for none.

    The clip with the fewest windows left goes first, and of two the one that came first: a clip of
    five seconds does not wait for one of five minutes, and equal clips are done one after another.
    Each turn of another counts for a clip as if it had one window less: so a clip waits for no more
    turns of clips that come after it than it has windows.

    With the first clip go others whose next windows are alike, up to ``most_together`` in all.
    """

    def __init__(self, most_together: int = 1) -> None:
        self._executor = ThreadPoolExecutor(1, "codec")
        self._most_together = most_together
        self._waiting: list[Clip] = []
        self._lock = threading.Lock()  # for those that wait
        self._numbers = count()

    def start(self, work: CodecWork) -> Future[Tensor]:
        """Return what will be the work's result; a cancel ends the work after a window."""
        clip = self.open(work)
        try:
            self._enter(clip)
        except RuntimeError:  # no thread can be started; a later one would still do the work
            clip.result.cancel()
            raise
        return clip.result

    def open(self, work: CodecWork) -> Clip:
        """Return a clip whose windows are still to come; see ``push``."""
        return Clip(next(self._numbers), work)

    def push(self, clip: Clip, part: Tensor) -> None:
        """Do the next window of the clip when it is its turn. Any thread may call this."""
        clip.work.push(part)
        self._enter(clip)

    def close(self) -> None:
        """End the thread; no clip may wait."""
        self._executor.shutdown()

    def _enter(self, clip: Clip) -> None:
        """Let the clip wait for its turn, unless it does, or has no window to be done."""
        with self._lock:
            if clip.is_in_line or not clip.work.is_ready:
                return
            clip.is_in_line = True
            self._waiting.append(clip)
        self._executor.submit(self._do_next)

    def _do_next(self) -> None:
        clips = self._next_clips()
        if clips and not self._do(clips):
            while clips:  # each alone: it may be the trouble of one, or of all at a time
                self._do([clips.pop(0)])

    def _next_clips(self) -> list[Clip]:
        """Take the clip whose turn it is from those that wait, and others that can go with it.

        Returns none if they went with an earlier one.
        """
        with self._lock:
            wanted = [clip for clip in self._waiting if not clip.result.cancelled()]
            self._waiting = sorted(wanted, key=lambda clip: clip.turn)
            first = self._waiting[:1]
            alike = [clip for clip in self._waiting if clip.work.phase == first[0].work.phase]
            chosen = alike[: self._most_together]
            self._waiting = [clip for clip in self._waiting if clip not in chosen]
            for clip in self._waiting:
                clip.turns_waited += 1
        return chosen

    def _do(self, clips: list[Clip]) -> bool:
        """Do the clips' next windows; return ``False`` if that failed for several clips.

        Clips are taken from the list when they are answered or go on.
        """
        first, *others = clips
        try:
            parts = first.work.step(*(clip.work for clip in others))
        except BaseException as error:
            if others:
                return False  # not tried again here: the error holds the memory of the failed step
            _answer(first.result, error)  # else the caller would wait for ever
            clips.clear()
            del first  # the error holds this frame
            return True
        del first, others
        for part in parts:
            self._go_on(clips.pop(0), part)
        return True

    def _go_on(self, clip: Clip, part: Tensor) -> None:
        """Keep what the clip's window made, and let the clip wait for its next one."""
        try:
            clip.work.take(part)
            if clip.work.left:
                with self._lock:  # a window that is pushed from here on enters it
                    clip.is_in_line = False
                self._enter(clip)
            else:
                _answer(clip.result, clip.work.finish())
        except BaseException as error:
            _answer(clip.result, error)
            del clip  # the error holds this frame


def _answer(result: Future[Tensor], ending: Tensor | BaseException) -> None:
    if not result.set_running_or_notify_cancel():
        return
    if isinstance(ending, BaseException):
        result.set_exception(ending)
    else:
        result.set_result(ending)
