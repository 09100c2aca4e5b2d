"""The group commit: completions that are ready together share one transaction and one flush."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.retrying import for_ever, keep_trying
from dgx_music.storage import queue
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Completion, Lease
from dgx_music.worker.turns import Turns

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_LOCKED_SECONDS = 0.2
_RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0)


@dataclass(eq=False)
class _Entry:
    completion: Completion
    is_done: bool | None = None
    error: Exception | None = None
    is_locked: bool = False
    """True if somebody else had its row locked when it was last tried."""

    @property
    def is_open(self) -> bool:
        return self.is_done is None and self.error is None


class Completions:
    """Group commit: while one transaction is written, those that arrive gather for the next.

    Before that it waits for the line of ``turns``: many of those in it are about to be ready.
    """

    def __init__(self, database: Database, turns: Turns) -> None:
        self._database = database
        self._turns = turns
        self._waiting: list[_Entry] = []
        self._writing: asyncio.Event | None = None
        """Set when the transaction that is being written has ended."""

    async def write(self, completion: Completion) -> bool:
        """Return True once the row is completed, False if its lease was lost or a cancel requested.

        Waits as long as the database cannot be reached: finished audio is expensive. If the call is
        cancelled, the row may be completed or not. Raises what the database raises for this one.
        """
        entry = _Entry(completion)
        self._waiting.append(entry)
        while entry.is_open:
            if entry.is_locked:  # the others go on without it
                entry.is_locked = False
                await anyio.sleep(_LOCKED_SECONDS)
            elif self._writing is None:
                await self._write_next()
            else:
                await self._writing.wait()
        if entry.error is not None:
            raise entry.error
        return bool(entry.is_done)

    async def _write_next(self) -> None:
        """Write those that wait in one transaction, then wake all of them at once."""
        writing = self._writing = asyncio.Event()
        batch: list[_Entry] = []
        try:
            await self._turns.wait()
            batch, self._waiting = self._waiting, []
            await self._write(batch)
        finally:  # if this task was cancelled, another of them writes the rest; twice is harmless
            self._waiting = [entry for entry in batch if entry.is_open] + self._waiting
            self._writing = None
            writing.set()

    async def _write(self, batch: list[_Entry]) -> None:
        """Write them together; if one of them cannot be stored, one by one."""
        try:
            done, locked = await self._complete([entry.completion for entry in batch])
        except Exception as error:
            if len(batch) == 1:
                await self._settle(batch[0], error)
                return
            for entry in batch:
                await self._write([entry])
        else:
            for entry in batch:
                entry.is_locked = entry.completion.lease in locked
                if not entry.is_locked:
                    entry.is_done = entry.completion.lease in done

    async def _settle(self, entry: _Entry, error: Exception) -> None:
        """Give the error to the caller that waits, unless the row is completed all the same.

        The error may have come after the commit.
        """
        lease = entry.completion.lease
        try:
            done = await self._database.transact(
                lambda session: queue.find_completed(session, [lease]),
                read_only=True,
            )
        except Exception:  # then nobody knows, and the first error is raised
            done = set()
        if done:
            name = type(error).__name__
            logger.warning("completions: 1 was written, though it raised %s: %s", name, error)
            entry.is_done = True
        else:
            entry.error = error

    async def _complete(self, completions: list[Completion]) -> tuple[set[Lease], set[Lease]]:
        """Return the leases that are completed, and those whose rows somebody else has locked.

        Never gives up.
        """

        async def work(session: AsyncSession) -> tuple[set[Lease], set[Lease]]:
            done = await queue.complete(session, completions)
            rest = {completion.lease for completion in completions} - done
            return done, await queue.find_completable(session, rest)

        def note(error: DatabaseUnavailableError, wait: float | None) -> None:
            count = len(completions)
            logger.warning("completions: %d wait %.1f s for the database: %s", count, wait, error)

        return await keep_trying(
            lambda: self._database.transact(work, is_single=True),
            on=DatabaseUnavailableError,
            waits=for_ever(*_RETRY_SECONDS),
            note=note,
        )
