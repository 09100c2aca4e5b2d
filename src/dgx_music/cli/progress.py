"""The progress of generations, on stderr: bars on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import anyio
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from dgx_music.cli.output import (
    make_console,
    near,
    one_line,
    prompt_in_words,
    shorten,
    tell,
    tell_untrained,
)
from dgx_music.cli.service import ServiceTeller
from dgx_music.client.generations import watch_generation
from dgx_music.errors import WaitTimeoutError
from dgx_music.statuses import COMPLETED
from dgx_music.storage import Generation
from dgx_music.text import plain

Show = Callable[[Generation], None]

MAX_BARS = 8
_PROMPT_CHARACTERS = 24


async def follow(
    ids: Sequence[str],
    *,
    timeout: float | None = None,
    show: Show | None = None,
    teller: ServiceTeller | None = None,
) -> list[Generation]:
    """Show the progress of these generations until all are finished, and return their rows.

    ``show`` is called with each new state, by default that of ``board``. The ``teller`` says on
    stderr which workers serve them. Raises ``WaitTimeoutError`` after ``timeout`` seconds, for the
    first generation that is not finished.
    """
    latest: dict[str, Generation] = {}
    watchers = anyio.CapacityLimiter(len(ids) if len(ids) <= MAX_BARS else 1)

    async def watch(generation_id: str, show: Show) -> None:
        async with watchers:
            async for generation in watch_generation(generation_id):
                latest[generation_id] = generation
                show(generation)
                if teller is not None:
                    teller.note(generation)

    with board(ids) if show is None else nullcontext(show) as show_on, anyio.move_on_after(timeout):
        async with anyio.create_task_group() as beside:
            if teller is not None:
                beside.start_soon(teller.keep_telling, name="who serves it")
            async with anyio.create_task_group() as tasks:
                for generation_id in dict.fromkeys(ids):
                    tasks.start_soon(watch, generation_id, show_on, name=f"watch {generation_id}")
            beside.cancel_scope.cancel()
    for generation_id in ids:
        if generation_id not in latest or not latest[generation_id].is_finished:
            status = latest[generation_id].status if generation_id in latest else None
            raise WaitTimeoutError(generation_id, status, timeout or 0.0)
    return [latest[generation_id] for generation_id in ids]


@contextmanager
def board(ids: Sequence[str]) -> Iterator[Show]:
    """Give the function to call with each new state of one of these generations."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    texts = [
        TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[state]")
    ]
    columns = (texts[0], BarColumn(), TaskProgressColumn(), texts[1])
    with Progress(*columns, TimeElapsedColumn(), console=make_console(sys.stderr)) as progress:
        yield (
            _Bars(progress, ids).show
            if len(ids) <= MAX_BARS
            else _TotalBar(progress, len(ids)).show
        )


class _Lines:
    """One line when a generation's status or attempt changes."""

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def show(self, generation: Generation) -> None:
        state = describe(generation)
        if self._seen.get(generation.id) != state:
            self._seen[generation.id] = state
            tell(f"{generation.id} {state}")


class _Bars:
    """One bar for each generation, in the order given; each appears with its first state."""

    def __init__(self, progress: Progress, ids: Sequence[str]) -> None:
        self._progress = progress
        self._bars = {
            key: progress.add_task("", total=1.0, visible=False, state="")
            for key in dict.fromkeys(ids)
        }

    def show(self, generation: Generation) -> None:
        self._progress.update(
            self._bars[generation.id],
            description=shorten(plain(one_line(prompt_in_words(generation))), _PROMPT_CHARACTERS),
            completed=1.0 if generation.is_finished else generation.progress,
            state=_short_state(generation),
            visible=True,
        )


class _TotalBar:
    """One bar for all."""

    def __init__(self, progress: Progress, count: int) -> None:
        self._progress = progress
        self._count = count
        self._done: set[str] = set()
        self._bar = progress.add_task("generations", total=count, state="")

    def show(self, generation: Generation) -> None:
        if generation.is_finished:
            self._done.add(generation.id)
        part = 0.0 if generation.is_finished else generation.progress
        state = f"{len(self._done):,} of {self._count:,}"
        self._progress.update(self._bar, completed=len(self._done) + part, state=state)


def describe(generation: Generation) -> str:
    """Return the state of the generation in a few words."""
    match generation.status:
        case "processing":
            return (
                "is being cancelled"
                if generation.cancel_requested
                else f"processing, attempt {generation.attempt}"
            )
        case "pending" if generation.failures:
            return f"pending after {generation.failures} of {generation.max_attempts} failures: {_error(generation)}"
        case "failed":
            return f"failed: {_error(generation)}"
        case "completed":
            return f"completed in {generation.generation_time_seconds or 0:.2f} s: {near(generation.file_path or '')}"
    return generation.status


def tell_outcome(generations: Sequence[Generation]) -> bool:
    """Say how these generations ended; return True if all are completed."""
    bad = [generation for generation in generations if generation.status != COMPLETED]
    if sys.stderr.isatty() and len(generations) <= MAX_BARS:
        for generation in generations:
            tell(f"{generation.id} {describe(generation)}")
    if len(generations) > 1:
        tell(f"{len(generations) - len(bad):,} of {len(generations):,} completed.")
    tell_untrained(generations)
    return not bad


def _short_state(generation: Generation) -> str:
    if generation.is_processing and generation.attempt > 1:
        return f"attempt {generation.attempt}"
    return generation.status


def _error(generation: Generation) -> str:
    return shorten(one_line(generation.error_message or "no reason given"), 200)
