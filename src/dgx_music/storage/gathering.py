"""Inserts that are called at the same time share a transaction: a group commit.

While one transaction is written, those that arrive gather for the next. Nobody waits for others to
arrive, and each caller returns only when its own rows are committed. On PostgreSQL a row with an
idempotency key may have to wait for another open transaction with that key: then it waits apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import Context
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.postgres_errors import is_locked, is_of_one_statement
from dgx_music.storage.connection.sessions import NoAnswerError, finish, start_to_finish
from dgx_music.storage.generation import Generation, copy_of
from dgx_music.storage.insertion_postgres import is_single
from dgx_music.storage.new_rows import Row, have_keys
from dgx_music.storage.room import QueueLimits, inserting

T = TypeVar("T")

Transact = Callable[..., Awaitable[list[Generation]]]
"""``Database.transact``."""

_MOST_ROWS = 1_000
_LOCK_TIMEOUT = "20ms"
"""How long a shared transaction waits for a key that another producer is about to commit."""


def _new_future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@dataclass(eq=False)
class _Insert:
    """The rows of one call, and what becomes of them."""

    rows: Sequence[Row]
    clips: Mapping[str, tuple[bytes, float]]
    limits: QueueLimits | None
    done: asyncio.Future[list[Generation]] = field(default_factory=_new_future)
    woken: asyncio.Future[None] = field(default_factory=_new_future)
    """What its caller waits for; a cancelled caller cancels this one, and not ``done``."""

    def __post_init__(self) -> None:
        self.may_wait = have_keys(self.rows)

    def succeed(self, made: list[Generation]) -> None:
        """Tell the caller that these are its rows."""
        self.done.set_result(made)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Tell the caller that nothing was stored."""
        self.done.set_exception(error)
        self._wake()

    def _wake(self) -> None:
        if not self.woken.done():
            self.woken.set_result(None)


class Gathering:
    """The inserts of one event loop into one database.

    Of those that wait for a key, ``most_apart`` have a connection at a time.
    """

    def __init__(self, transact: Transact, most_apart: int) -> None:
        self._transact = transact
        self._room_apart = asyncio.Semaphore(most_apart)
        self._waiting: list[_Insert] = []
        self._writing: asyncio.Task[None] | None = None
        self._apart = set[asyncio.Task[None]]()

    async def insert(
        self,
        rows: Sequence[Row],
        clips: Mapping[str, tuple[bytes, float]],
        limits: QueueLimits | None = None,
    ) -> list[Generation]:
        """Return the generations of these rows, all committed; raises what ``transact`` raises.

        A call that is cancelled before its transaction begins leaves nothing. After that the
        cancellation is raised when the transaction has ended.
        """
        insert = _Insert(rows, clips, limits)
        self._waiting.append(insert)
        if self._writing is None:
            # In a context of its own: it writes for all callers, not only for this one.
            self._writing = start_to_finish(self._write_all(), Context())
        try:
            await insert.woken
        except asyncio.CancelledError as cancelled:
            if insert in self._waiting:
                self._waiting.remove(insert)
                raise
            await finish(_end_of(insert.done))
            raise cancelled from insert.done.exception()
        return insert.done.result()

    async def close(self) -> None:
        """Return when everything is written."""
        while writing := [*self._apart, *([self._writing] if self._writing else [])]:
            await asyncio.wait(writing)

    async def _write_all(self) -> None:
        taken: list[_Insert] = []
        try:
            while self._waiting:
                taken = self._take()
                await self._write(taken)
        except BaseException:
            unwritten, self._waiting = [*taken, *self._waiting], []
            _tell_that_nobody_writes(unwritten)
            raise
        finally:
            self._writing = None

    def _write_apart(self, insert: _Insert, *, is_patient: bool) -> None:
        """Write it alone; nobody waits for it but its caller."""

        async def write() -> None:
            try:
                async with self._room_apart if is_patient else nullcontext():
                    await self._write([insert], is_patient=is_patient)
            except BaseException:
                _tell_that_nobody_writes([insert])
                raise

        task = start_to_finish(write(), Context())
        self._apart.add(task)
        task.add_done_callback(self._apart.discard)

    def _take(self) -> list[_Insert]:
        """Return the next ones that may share a transaction: at least one."""
        count, rows = 0, 0
        for insert in self._waiting:
            rows += len(insert.rows)
            if count and (rows > _MOST_ROWS or insert.limits != self._waiting[0].limits):
                break
            count += 1
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def _write(self, inserts: list[_Insert], *, is_patient: bool = False) -> None:
        """Write them together; if one of them cannot be stored, in halves, until it is alone.

        Unless ``is_patient``, none waits here for a key: those that may have to are written apart,
        and who finds its key held there as well waits for it, as long as it takes.
        """
        is_hasty = not is_patient and any(insert.may_wait for insert in inserts)
        try:
            made = await self._insert(inserts, _LOCK_TIMEOUT if is_hasty else None)
        except DatabaseUnavailableError as error:
            if is_hasty and is_locked(error.__cause__):
                for insert in inserts:
                    if insert.may_wait:
                        self._write_apart(insert, is_patient=len(inserts) == 1)
                if others := [insert for insert in inserts if not insert.may_wait]:
                    await self._write(others)
                return
            if len(inserts) > 1 and is_of_one_statement(error.__cause__):
                inserts = await self._write_until_two_fail(inserts)
            for insert in inserts:
                insert.fail(_copy(error))
        except Exception as error:
            if len(inserts) == 1:
                inserts[0].fail(error)
                return
            half = len(inserts) // 2
            await self._write(inserts[:half])
            await self._write(inserts[half:])
        else:
            _hand_out(made, inserts)

    async def _write_until_two_fail(self, inserts: list[_Insert]) -> list[_Insert]:
        """Write each alone; return the rest after two failures: then it is not one of them."""
        failed = 0
        for number, insert in enumerate(inserts, 1):
            await self._write([insert])
            has_ended = insert.done.done()  # unless it waits apart
            failed += has_ended and insert.done.exception() is not None
            if failed == 2:
                return inserts[number:]
        return []

    async def _insert(
        self, inserts: Sequence[_Insert], lock_timeout: str | None
    ) -> list[Generation]:
        rows = inserts[0].rows
        if len(inserts) > 1:
            rows = [row for insert in inserts for row in insert.rows]
        clips = {sha256: clip for insert in inserts for sha256, clip in insert.clips.items()}
        work = inserting(rows, clips, inserts[0].limits, lock_timeout)
        return await self._transact(work, is_single=is_single(rows))


def _tell_that_nobody_writes(inserts: Sequence[_Insert]) -> None:
    """Fail those that have no result yet, after what is no error of the database."""
    for insert in inserts:
        if not insert.done.done():
            insert.fail(NoAnswerError("its writer was stopped"))


def _hand_out(made: Sequence[Generation], inserts: Sequence[_Insert]) -> None:
    """Give each call its rows; two calls under one key get an object each."""
    rows, seen = iter(made), set[int]()
    for insert in inserts:
        own = list(islice(rows, len(insert.rows)))
        insert.succeed([copy_of(row) if id(row) in seen else row for row in own])
        seen.update(map(id, own))


async def _end_of(done: asyncio.Future[T]) -> None:
    await asyncio.wait([done])


def _copy(error: DatabaseUnavailableError) -> DatabaseUnavailableError:
    """Return the same error for another caller: each adds its own traceback."""
    same = DatabaseUnavailableError(error.url, error.why)
    same.__cause__ = error.__cause__
    return same
