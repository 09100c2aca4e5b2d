"""``dgx-music top``: the workers and the queue, live on a terminal, with keys."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl
from dgx_music.cli.output import make_console, print_json, shorten
from dgx_music.validation import check_between

if TYPE_CHECKING:
    from dgx_music.cli.top_view import View
    from dgx_music.storage import Database
    from dgx_music.storage.overview import QueueEntry, QueueOverview

_WAITING, _FINISHED = 200, 50
"""More rows than a terminal has lines; all else is counted."""
_TICK_SECONDS = 1.0
_REST = 4
"""A database that needs a second for an answer is left alone for four."""
_PROMPT_CHARACTERS = 40


def top(
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Ask the database this often.")
    ] = 2.0,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Show workers, queue and rates live; keys cancel, pause and resume.

    Keys: up and down, or k and j, choose a generation that runs or waits. c cancels it, after a y.
    p pauses its model and r resumes it; if none is chosen, all models. q, Escape and Ctrl-C end it.

    Without a terminal it prints one picture; with --json, one object.
    """
    check_between("--interval", interval, 0.1, 3600)
    if as_json:
        print_json(asyncio.run(_read_once(database_url))[0].to_dict())
    elif _has_screen():
        _end_by(asyncio.run(_show_live(database_url, interval)))
    else:
        _print_once(*asyncio.run(_read_once(database_url)))


def _has_screen() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _end_by(number: signal.Signals | None) -> None:
    """End by this signal, as if it had not been handled: whoever sent it wants to see that."""
    if number is not None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


async def _read_once(database_url: str | None) -> tuple[QueueOverview, Database]:
    from dgx_music.cli.opening import opened
    from dgx_music.client.fleet import queue_overview

    async with opened(database_url) as database:
        return await queue_overview(), database


async def _read() -> QueueOverview:
    from dgx_music.client.fleet import queue_overview

    return await queue_overview(waiting_limit=_WAITING, finished_limit=_FINISHED)


def _print_once(overview: QueueOverview, database: Database) -> None:
    from dgx_music.cli.top_view import View, draw

    console = make_console()
    view = View(overview=overview, now=overview.read_at, place=str(database))
    for line in draw(view, console.width):
        console.print(line, soft_wrap=True)


async def _show_live(database_url: str | None, interval: float) -> signal.Signals | None:
    """Show the picture until somebody ends it; return the signal that has ended it, if any."""
    import anyio

    from dgx_music.cli.opening import opened
    from dgx_music.cli.top_view import View

    async with opened(database_url) as database:
        overview = await _read()
        view = View(overview=overview, now=overview.read_at, place=str(database))
        async with anyio.create_task_group() as tasks:
            board = _Board(view, lambda *work: tasks.start_soon(*work))
            terminal = _Terminal(board)
            with _signals(board.signals | terminal.signals), terminal:
                tasks.start_soon(board.keep_reading, interval, name="read")
                tasks.start_soon(board.keep_ticking, name="tick")
                await board.ended.wait()
            # A call of the database that hangs keeps nobody from the shell's screen.
            tasks.cancel_scope.cancel()
    return board.ended_by


class _Board:
    """What is seen now, and what a key does to it."""

    def __init__(self, view: View, start: Callable[..., Any]) -> None:
        import anyio

        self.view = view
        self.ended = anyio.Event()
        self.ended_by: signal.Signals | None = None
        self.redraw: Callable[[], None] = lambda: None
        self._start = start
        self._read_at = time.monotonic()
        self._is_wanted = anyio.Event()
        self._to_cancel: QueueEntry | None = None

    @property
    def signals(self) -> dict[int, Callable[[], None]]:
        """What each signal does that ends the program; Ctrl-C is a way to quit like ``q``."""
        from dgx_music.early import stopping_signals

        others = [number for number in stopping_signals() if number != signal.SIGINT]
        ends = {int(number): lambda number=number: self._end(number) for number in others}
        return {int(signal.SIGINT): self._end, **ends}

    async def keep_reading(self, interval: float) -> None:
        """Read the facts again and again; say so while the database cannot be asked."""
        import anyio

        from dgx_music.errors import DatabaseError

        while True:
            self._is_wanted = anyio.Event()
            began = time.monotonic()
            try:
                self._take(await _read())
            except DatabaseError as error:
                self._change(trouble=f"{error} Trying again.")
            rest = max(interval, _REST * (time.monotonic() - began))
            with anyio.move_on_after(rest):
                await self._is_wanted.wait()

    async def keep_ticking(self) -> None:
        """Draw the picture once a second: times go on between two answers of the database."""
        import anyio

        while True:
            await anyio.sleep(_TICK_SECONDS)
            self._change()

    def press(self, key: str) -> None:
        """Do what this key does."""
        from dgx_music.cli.keys import DOWN, ESCAPE, UP

        if self._to_cancel is not None:
            self._answer(self._to_cancel, is_yes=key in ("y", "Y"))
            return
        self._change(message=None)
        match key:
            case "q" | "Q":
                self._end()
            case _ if key == ESCAPE:
                self._end()
            case _ if key in (UP, DOWN):
                self._choose(1 if key == DOWN else -1)
            case "c":
                self._ask()
            case "p" | "r":
                self._start(self._act, self._set_pause, key == "p")

    def _end(self, number: signal.Signals | None = None) -> None:
        self.ended_by = number
        self.ended.set()

    def _take(self, overview: QueueOverview) -> None:
        """Show new facts; if the chosen generation is finished, choose the one in its place."""
        self._read_at = time.monotonic()
        former = [entry.id for entry in self.view.entries]
        chosen = self.view.chosen_id
        place = former.index(chosen) if chosen in former else None
        self.view = replace(self.view, overview=overview, trouble=None)
        ids = [entry.id for entry in self.view.entries]
        if place is not None and chosen not in ids:
            chosen = ids[min(place, len(ids) - 1)] if ids else None
        self._change(chosen_id=chosen)

    def _change(self, **changes: Any) -> None:
        passed = timedelta(seconds=time.monotonic() - self._read_at)
        now = self.view.overview.read_at + passed
        self.view = replace(self.view, now=now, **changes)
        self.redraw()

    def _choose(self, step: int) -> None:
        """Choose the next generation, or the one before; before the first one it is none."""
        ids = [None, *(entry.id for entry in self.view.entries)]
        at = ids.index(self.view.chosen_id) if self.view.chosen_id in ids else 0
        self._change(chosen_id=ids[max(0, min(at + step, len(ids) - 1))])

    def _ask(self) -> None:
        from dgx_music.cli.top_view import prompt_of, short_id

        self._to_cancel = entry = self.view.chosen
        if entry is None:
            self._change(message="Choose a generation first, with the arrow keys or j and k.")
        else:
            prompt = shorten(prompt_of(entry), _PROMPT_CHARACTERS)
            self._change(question=f"Cancel {short_id(entry.id)}? y/n · {prompt}")

    def _answer(self, entry: QueueEntry, *, is_yes: bool) -> None:
        self._to_cancel = None
        self._change(question=None, message=None if is_yes else "Nothing was cancelled.")
        if is_yes:
            self._start(self._act, _cancel, entry)

    async def _act(self, work: Callable[..., Awaitable[str]], argument: Any) -> None:
        """Do what a key asked for, say how it went, and look at the database again."""
        from dgx_music.errors import DgxMusicError

        try:
            message = await work(argument)
        except DgxMusicError as error:
            message = str(error)
        self._change(message=message)
        self._is_wanted.set()

    async def _set_pause(self, is_paused: bool) -> str:
        from dgx_music.client.fleet import pause, resume
        from dgx_music.storage.models import ALL_MODELS

        model = None if self.view.chosen is None else self.view.chosen.model_name
        pauses = await (pause if is_paused else resume)(model)
        what = model or "Everything"
        if is_paused:
            return f"{what} is paused; what runs goes on."
        if any(each.model_name == ALL_MODELS for each in pauses):
            return "All models are paused: go up until none is chosen, then press r."
        return f"{what} is no longer paused."


async def _cancel(entry: QueueEntry) -> str:
    from dgx_music.cli.top_view import short_id
    from dgx_music.client.generations import cancel_generation
    from dgx_music.statuses import PROCESSING

    if await cancel_generation(entry.id) == PROCESSING:
        return f"{short_id(entry.id)} is running; its worker has been asked to stop it."
    return f"{short_id(entry.id)} is cancelled."


class _Terminal:
    """The terminal while it is ours: its second screen, without a cursor, and its keys.

    It is given back at the end, whatever the reason, and while Ctrl-Z stops us.
    """

    def __init__(self, board: _Board) -> None:
        self._board = board
        self._console = make_console()
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._open()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def signals(self) -> dict[int, Callable[[], None]]:
        """What a new size, and Ctrl-Z, do."""
        if sys.platform == "win32":
            return {}
        return {int(signal.SIGWINCH): self._draw, int(signal.SIGTSTP): self._stop}

    def _open(self) -> None:
        from rich.live import Live

        from dgx_music.cli.keys import pressed_keys

        board = self._board
        with ExitStack() as stack:
            options: dict[str, Any] = dict.fromkeys(("redirect_stdout", "redirect_stderr"), False)
            live = Live(console=self._console, screen=True, auto_refresh=False, **options)
            self._live = stack.enter_context(live)
            # Given back before the screen is: the first screen is never seen without its modes.
            has_keys = stack.enter_context(pressed_keys(board.press))
            self._stack = stack.pop_all()
        board.view = replace(board.view, has_keys=has_keys)
        board.redraw = self._draw
        self._draw()

    def _draw(self) -> None:
        from rich.console import Group

        from dgx_music.cli.top_view import draw

        lines = draw(self._board.view, *self._console.size)
        self._live.update(Group(*lines), refresh=True)

    def _stop(self) -> None:
        self._board.redraw = lambda: None
        self._stack.close()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._open()  # when we are continued


@contextmanager
def _signals(handlers: Mapping[int, Callable[[], None]]) -> Iterator[None]:
    """Call these while the event loop runs; on Windows Ctrl-C raises, as everywhere else."""
    if sys.platform == "win32":
        yield
        return
    loop = asyncio.get_running_loop()
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
