"""Signals in the first second of a program of ours, while it imports what it needs. Imported before all that.

A process 1, as in a container, has no default handlers: a SIGTERM would be lost. A Ctrl-C would end in a traceback. Nothing
has begun yet, so the answer is to end at once; the engine's process answers to its parent alone.

Importing this module sets the handlers, in our own programs only: in anybody else's, signals stay as they are.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""A service manager's, Ctrl-C, a terminal that closes, and Ctrl-\\ or an image's own ``STOPSIGNAL``."""
_INTERRUPTED = 130
_ENGINE = "dgx_music.inference.child"
_PROGRAMS = ("dgx-music", "dgx_music.cli")


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a worker; a SIGHUP that was ignored from the start (``nohup``) is none of them."""
    return tuple(number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN)


def stand_back() -> None:
    """Have Ctrl-C raise ``KeyboardInterrupt`` again: from here on there is somebody to catch it."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def see_it_through() -> None:
    """Let no signal cut short the end of a worker of ours that has stopped: its exit code says how it went."""
    if _program() in _PROGRAMS:
        for number in stopping_signals():
            signal.signal(number, signal.SIG_IGN)


def _stand_by() -> None:
    program = _program()
    if program == _ENGINE:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
    elif program in _PROGRAMS:
        for number in stopping_signals() if sys.argv[1:2] == ["worker"] else (signal.SIGINT,):
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED if number == signal.SIGINT else 0)  # an exception might be caught by what is being imported


def _program() -> str:
    """Return the name of the program that is starting: a module's after ``-m``, else that of the file."""
    if sys.argv[:1] != ["-m"]:
        return os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119 - pathlib is one of the slow imports
    return sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""


_stand_by()
