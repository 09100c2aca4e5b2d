"""``dgx-music watch``: follows one generation, or a batch, to its end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from dgx_music.cli.options import AsJson, DatabaseUrl, Timeout
from dgx_music.cli.output import print_json, tell
from dgx_music.errors import InvalidRequestError
from dgx_music.validation import check_positive

if TYPE_CHECKING:
    from dgx_music.storage import Database, Generation
    from dgx_music.storage.batch_progress import BatchProgress

WatchedId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="The id of a generation or a batch, or any part that fits no other one, or a batch's name.",
    ),
]


Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="Write the audio to a new WAV file while it is made; `-` is stdout.",
        show_default=False,
    ),
]
Play = Annotated[
    bool, typer.Option("--play", help="Play the audio while it is made (ffplay, mpv or aplay).")
]


@dataclass(frozen=True)
class _Hearing:
    """Where the audio goes while it is made, if anywhere: to ``out``, or to a player."""

    out: str | None
    is_played: bool

    def check(self, *, is_json: bool) -> None:
        """Refuse options that exclude each other."""
        if self.out is not None and self.is_played:
            raise InvalidRequestError("--play", "is given beside --out", "leave one of them out")
        if self.out == "-" and is_json:
            problem = "is given, and the audio goes to stdout"
            raise InvalidRequestError("--json", problem, "leave it out")

    @property
    def is_wanted(self) -> bool:
        """True if the audio goes anywhere."""
        return self.is_played or self.out is not None


def watch(
    wanted: WatchedId,
    out: Out = None,
    play: Play = False,
    timeout: Timeout = None,
    database_url: DatabaseUrl = None,
    as_json: AsJson = False,
) -> None:
    """Watch a generation or a batch until it is finished.

    With --out or --play a generation is also heard while it is made.
    Ends with 1 if it, or one of the batch, failed or was cancelled.
    With --json each change is printed as one line of JSON.
    """
    if timeout is not None:
        check_positive("--timeout", timeout)
    hearing = _Hearing(out, play)
    hearing.check(is_json=as_json)
    if not asyncio.run(_watch(wanted, hearing, timeout, database_url, as_json=as_json)):
        raise typer.Exit(1)


async def _watch(
    wanted: str,
    hearing: _Hearing,
    timeout: float | None,
    database_url: str | None,
    *,
    as_json: bool,
) -> bool:
    """Return True if all is completed in the end."""
    from dgx_music.cli.opening import find_generation_or_batch, opened

    async with opened(database_url) as database:
        found = await find_generation_or_batch(database, wanted)
        if isinstance(found, str):
            if hearing.is_wanted:
                raise InvalidRequestError("ID", "is a batch", "name one generation to hear it")
            return await _watch_batch(found, timeout, as_json=as_json)
        follow = partial(_watch_generation, database, found, timeout, as_json=as_json)
        if not hearing.is_wanted:
            return await follow()
        from dgx_music.cli.listen import hear

        return await hear(found, hearing.out, follow)


async def _watch_generation(
    database: Database, generation: Generation, timeout: float | None, *, as_json: bool
) -> bool:
    from dgx_music.cli.progress import follow, tell_outcome
    from dgx_music.cli.service import ServiceTeller

    teller, show = ServiceTeller(database, [generation]), _print_as_line if as_json else None
    rows = await follow([generation.id], timeout=timeout, show=show, teller=teller)
    return rows[0].is_complete if as_json else tell_outcome(rows)


async def _watch_batch(batch_id: str, timeout: float | None, *, as_json: bool) -> bool:
    from dgx_music.cli.batch_progress import follow_batch, of_counts

    show = of_counts(_print_as_line) if as_json else None
    batch = await follow_batch(batch_id, timeout=timeout, show=show)
    completed = batch.counts["completed"]
    if not as_json:
        tell(f"{completed:,} of {batch.total:,} completed.")
    return completed == batch.total


def _print_as_line(state: Generation | BatchProgress) -> None:
    print_json(state.to_dict(), indent=None)
