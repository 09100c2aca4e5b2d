"""Inserts that are called at the same time share a transaction: a group commit.

While one transaction is written, those that arrive gather for the next. Nobody waits for others to
arrive, and each caller returns only when its own rows are committed.

On PostgreSQL a row may have to wait for another open transaction that has its idempotency key. A
shared transaction does so only for a moment. Then each call with a key is written alone, beside the
others, and later calls with these keys wait until it has ended, without a connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.postgres_errors import is_locked, is_of_one_statement
from dgx_music.storage.connection.sessions import NoAnswerError, finish, start_to_finish
from dgx_music.storage.generation import Generation, copy_of
from dgx_music.storage.insertion_postgres import is_single
from dgx_music.storage.new_rows import Row, keys_of
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

    is_apart: bool = False
    """Its own task writes it."""
    has_begun: bool = True
    """False while its own task waits for others with its keys."""
    is_given_up: bool = False
    """Its caller was cancelled before it began."""

    def __post_init__(self) -> None:
        self.keys = keys_of(self.rows)

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
    """The inserts of one event loop into one database."""

    def __init__(self, transact: Transact) -> None:
        self._transact = transact
        self._waiting: list[_Insert] = []
        self._writing: asyncio.Task[None] | None = None
        self._apart = set[asyncio.Task[None]]()
        self._ends = dict[str, asyncio.Event]()
        """For each key that is written apart, what tells its end."""

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
        if insert.keys.isdisjoint(self._ends):
            self._waiting.append(insert)
        else:
            self._write_apart(insert)
        if self._waiting and self._writing is None:
            # In a context of its own: it writes for all callers, not only for this one.
            self._writing = start_to_finish(self._write_all(), Context())
        try:
            await insert.woken
        except asyncio.CancelledError as cancelled:
            if insert in self._waiting:
                self._waiting.remove(insert)
                raise
            if not insert.has_begun:
                insert.is_given_up = True
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
            _tell_that_nobody_writes([insert for insert in unwritten if not insert.is_apart])
            raise
        finally:
            self._writing = None

    def _write_apart(self, insert: _Insert) -> None:
        """Write it alone in a task of its own; nobody waits for it but its caller."""
        insert.is_apart, insert.has_begun = True, False
        task = start_to_finish(self._write_in_turn(insert), Context())
        self._apart.add(task)
        task.add_done_callback(self._apart.discard)

    async def _write_in_turn(self, insert: _Insert) -> None:
        """Write it after those that are written apart with a key of it."""
        while ends := [self._ends[key] for key in insert.keys if key in self._ends]:
            await ends[0].wait()
        if insert.is_given_up:
            return
        insert.has_begun, end = True, asyncio.Event()
        self._ends |= dict.fromkeys(insert.keys, end)
        try:
            await self._write([insert], is_patient=True)
        except BaseException:
            _tell_that_nobody_writes([insert])
            raise
        finally:
            for key in insert.keys:
                del self._ends[key]
            end.set()

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

        Unless ``is_patient``, those with keys are written apart if one of them had to wait.
        """
        is_hasty = not is_patient and any(insert.keys for insert in inserts)
        try:
            made = await self._insert(inserts, _LOCK_TIMEOUT if is_hasty else None)
        except DatabaseUnavailableError as error:
            if is_hasty and is_locked(error.__cause__):
                for insert in inserts:
                    if insert.keys:
                        self._write_apart(insert)
                if others := [insert for insert in inserts if not insert.keys]:
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
            failed += not insert.is_apart and insert.done.exception() is not None
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
