"""Signals in the first second of ``dgx-music`` and of the engine's process, while they import.

Process 1 of a container has no default handlers, so a SIGTERM would be lost; a Ctrl-C would end in
a traceback. No work has begun yet, so the program ends at once. The engine's process ignores these
signals: only its parent ends it.

Importing this module sets the handlers, but in no other program. Import it before anything slow.
They hold until the command's own take over: a daemon's when it starts, Python's in all others.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Of a service manager, Ctrl-C, a closing terminal, and Ctrl-\\ or an image's ``STOPSIGNAL``."""
DAEMONS = (["worker"], ["web"])
"""The arguments of the commands that run until a signal ends them."""
_INTERRUPTED = 130
_ENGINE = "dgx_music.inference.child"
_PROGRAMS = ("dgx-music", "dgx_music.cli")


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that stop a worker: not SIGHUP if ``nohup`` has it ignored."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOPPING if number != signal.SIGHUP or not is_ignored)


def restore_ctrl_c() -> None:
    """Let Ctrl-C raise ``KeyboardInterrupt`` again: from now on it is caught."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore_stop_signals() -> None:
    """Ignore signals while a worker that has stopped ends, so that it returns its exit code."""
    if _program() in _PROGRAMS:
        for number in stopping_signals():
            signal.signal(number, signal.SIG_IGN)


def _set_handlers() -> None:
    program = _program()
    if program == _ENGINE:
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
    elif program in _PROGRAMS:
        is_daemon = sys.argv[1:2] in DAEMONS
        for number in stopping_signals() if is_daemon else (signal.SIGINT,):
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    # A module that is being imported might catch an exception.
    os._exit(_INTERRUPTED if number == signal.SIGINT else 0)


def _program() -> str:
    """Return the name of this program: the module's after ``-m``, else the file's."""
    if sys.argv[:1] != ["-m"]:
        return os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119 - pathlib is slow to import
    return sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else ""


_set_handlers()
