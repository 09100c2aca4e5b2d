"""How far a batch is, in words, and on stderr while somebody watches it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, nullcontext

import anyio
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dgx_music.cli.estimates import is_almost_done, left_in_words
from dgx_music.cli.output import fail, make_console, shorten, tell
from dgx_music.client.batches import get_batch, watch_batch
from dgx_music.storage.batch_progress import BatchProgress
from dgx_music.text import plain

Show = Callable[[BatchProgress], None]

_NAME_CHARACTERS = 24
_TIMEOUT = 124


def in_words(batch: BatchProgress) -> str:
    """Return ``37 of 50, 1 failed, about 12 min left``, as far as that is known."""
    parts = [f"{batch.finished:,} of {batch.total:,}"]
    bad = ((batch.counts[status], status) for status in ("failed", "cancelled"))
    parts += [f"{count:,} {status}" for count, status in bad if count]
    if batch.done_in is not None and not _is_too_good(batch):
        parts.append(left_in_words(batch.done_in))
    if batch.unknown_because is not None:
        parts.append(f"end unknown: {batch.unknown_because}")
    return ", ".join(parts)


def _is_too_good(batch: BatchProgress) -> bool:
    """Return True if the batch cannot be almost done, whatever older and faster runs say."""
    is_begun = batch.finished > 0 and not batch.counts["pending"]
    return batch.done_in is not None and is_almost_done(batch.done_in) and not is_begun


async def follow_batch(
    batch_id: str, *, timeout: float | None = None, show: Show | None = None
) -> BatchProgress:
    """Show how far the batch is until all of it is finished, and return how it ended.

    ``show`` is called with each change, by default that of ``board``. Ends the command with 124
    after ``timeout`` seconds.
    """
    with board() if show is None else nullcontext(show) as show_on, anyio.move_on_after(timeout):
        async with aclosing(watch_batch(batch_id)) as states:
            async for batch in states:
                show_on(batch)
                if batch.is_finished:
                    return batch
    batch = await get_batch(batch_id)
    if batch.is_finished:
        return batch
    message = f"Batch {batch_id} is not finished after {timeout or 0:g} s ({in_words(batch)}); it goes on."
    raise typer.Exit(fail(message, _TIMEOUT))


@contextmanager
def board() -> Iterator[Show]:
    """Give the function to call with each change: it draws a bar, or prints lines elsewhere."""
    if not sys.stderr.isatty():
        yield of_counts(lambda batch: tell(in_words(batch)))
        return
    texts = [
        TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[state]")
    ]
    columns = (texts[0], BarColumn(), texts[1], TimeElapsedColumn())
    with Progress(*columns, console=make_console(sys.stderr)) as progress:
        bar = progress.add_task("", total=None, state="")

        def show(batch: BatchProgress) -> None:
            name = shorten(plain(batch.name or "batch"), _NAME_CHARACTERS)
            progress.update(bar, description=name, total=batch.total, completed=batch.finished)
            progress.update(bar, state=in_words(batch))

        yield show


def of_counts(show: Show) -> Show:
    """Return a function that shows a batch only if its counts have changed, not its estimate."""
    seen: list[dict[str, int]] = []

    def show_new(batch: BatchProgress) -> None:
        if seen != [batch.counts]:
            seen[:] = [batch.counts]
            show(batch)

    return show_new
