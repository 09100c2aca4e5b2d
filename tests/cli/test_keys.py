"""The keys that are found in a terminal's bytes, and a terminal that is as it was afterwards."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import termios
from collections.abc import Iterator
from typing import IO

import pytest

from dgx_music.cli.keys import DOWN, ESCAPE, UP, KeyParser, pressed_keys
from tests.patience import PATIENCE


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"q", ["q"]),
        (b"jkc", [DOWN, UP, "c"]),
        (b"\x1b[A\x1b[B", [UP, DOWN]),
        (b"\x1bOA\x1bOB", [UP, DOWN]),
        (b"\x1b[1;5Cq", ["q"]),
        (b"\x1b[200~", []),
        (b"\x1bc", []),
        (b"\x1b\x1b", [ESCAPE]),
        (b"\r\n", ["\r", "\n"]),
    ],
)
def test_bytes_become_keys(data: bytes, keys: list[str]) -> None:
    assert KeyParser().feed(data) == keys


@pytest.mark.parametrize("data", [b"\x1b[A", b"\x1bOB", b"\x1b[1;5C"])
def test_a_key_may_come_byte_by_byte(data: bytes) -> None:
    parts, whole = KeyParser(), KeyParser()

    found = [key for at in range(len(data)) for key in parts.feed(data[at : at + 1])]

    assert (found, parts.is_within_key) == (whole.feed(data), False)


def test_an_escape_that_stays_alone_is_the_key() -> None:
    parser = KeyParser()

    assert (parser.feed(b"\x1b"), parser.is_within_key) == ([], True)
    assert (parser.finish(), parser.is_within_key) == ([ESCAPE], False)


def test_a_key_that_was_begun_and_never_ended_is_forgotten() -> None:
    parser = KeyParser()
    parser.feed(b"\x1b[1;")

    assert (parser.finish(), parser.feed(b"q")) == ([], ["q"])


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, IO[str]]]:
    """A terminal as stdin, and the end of it that a person types on."""
    typing, theirs = pty.openpty()
    with open(theirs) as stdin:  # noqa: PTH123 - a number
        monkeypatch.setattr(sys, "stdin", stdin)
        yield typing, stdin
    os.close(typing)


async def test_each_key_is_told_when_it_is_pressed(terminal: tuple[int, IO[str]]) -> None:
    keys: asyncio.Queue[str] = asyncio.Queue()

    with pressed_keys(keys.put_nowait) as has_keys:
        os.write(terminal[0], b"j\x1b")
        pressed = [await asyncio.wait_for(keys.get(), PATIENCE) for _ in range(2)]

    assert (has_keys, pressed) == (True, [DOWN, ESCAPE])


async def test_the_terminal_is_as_it_was_even_after_an_error(
    terminal: tuple[int, IO[str]],
) -> None:
    former = termios.tcgetattr(terminal[1])

    def fail() -> None:
        with pressed_keys(print):
            assert termios.tcgetattr(terminal[1]) != former
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert termios.tcgetattr(terminal[1]) == former


async def test_without_a_terminal_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as stdin:  # noqa: PTH123 - a name that is no path
        monkeypatch.setattr(sys, "stdin", stdin)
        with pressed_keys(print) as has_keys:
            assert not has_keys
