"""The keys that are pressed on a terminal, one at a time, while an event loop runs."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec

UP, DOWN, ESCAPE = "up", "down", "escape"
_HAS_TERMIOS = find_spec("termios") is not None
"""False on Windows."""
_ESCAPE_SECONDS = 0.05
"""The rest of a key's bytes comes at once; an Escape that stays alone is the Escape key."""
_NAMES = {
    **dict.fromkeys(("\x1b[A", "\x1bOA", "k"), UP),
    **dict.fromkeys(("\x1b[B", "\x1bOB", "j"), DOWN),
    **dict.fromkeys(("\x1b", "\x1b\x1b"), ESCAPE),
}
_WHOLE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|\x1b[^\[O]|[^\x1b]", re.DOTALL)
"""One key: a control sequence (ECMA-48, 5.4), Escape and a character, or a character."""


class KeyParser:
    """Finds keys in the bytes of a terminal: a key may come in several parts."""

    def __init__(self) -> None:
        self._rest = ""

    @property
    def is_within_key(self) -> bool:
        """True while the last bytes may be the beginning of a key."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[str]:
        """Return the keys that are complete now: ``up``, ``down``, ``escape``, or a character.

        All other keys that send more than one character are left out.
        """
        text, end = self._rest + data.decode("latin-1"), 0
        keys = []
        while found := _WHOLE.match(text, end):
            end = found.end()
            keys.append(_NAMES.get(found[0], found[0]))
        self._rest = text[end:]
        return [key for key in keys if key in (UP, DOWN, ESCAPE) or len(key) == 1]

    def finish(self) -> list[str]:
        """Return the Escape that stayed alone, if there is one; forget what was begun."""
        rest, self._rest = self._rest, ""
        return [ESCAPE] if rest == "\x1b" else []


@contextmanager
def pressed_keys(press: Callable[[str], None]) -> Iterator[bool]:
    """Call ``press`` for each key while the event loop runs; restore the terminal at the end.

    Gives False if keys cannot be read: stdin is no terminal, or this is Windows. Ctrl-C and Ctrl-Z
    remain signals. If the terminal is closed, Escape is pressed.
    """
    if not (_HAS_TERMIOS and sys.stdin.isatty()):
        yield False
        return
    descriptor = sys.stdin.fileno()
    with _without_lines(descriptor), _reading(descriptor, press):
        yield True


@contextmanager
def _without_lines(descriptor: int) -> Iterator[None]:
    """Let the terminal give each key at once and show none of them, then set it back."""
    import termios
    import tty

    former = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        yield
    finally:
        # The shell must not get keys that were meant for us. A closed terminal needs nothing.
        with suppress(termios.error):
            termios.tcflush(descriptor, termios.TCIFLUSH)
            termios.tcsetattr(descriptor, termios.TCSANOW, former)


@contextmanager
def _reading(descriptor: int, press: Callable[[str], None]) -> Iterator[None]:
    loop, parser = asyncio.get_running_loop(), KeyParser()
    timer: asyncio.TimerHandle | None = None

    def read() -> None:
        nonlocal timer
        try:
            data = os.read(descriptor, 1024)
        except OSError:
            data = b""
        if not data:
            loop.remove_reader(descriptor)
            press(ESCAPE)
            return
        if timer is not None:
            timer.cancel()
        send(parser.feed(data))
        timer = loop.call_later(_ESCAPE_SECONDS, finish) if parser.is_within_key else None

    def finish() -> None:
        send(parser.finish())

    def send(keys: list[str]) -> None:
        for key in keys:
            press(key)

    loop.add_reader(descriptor, read)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        if timer is not None:
            timer.cancel()
