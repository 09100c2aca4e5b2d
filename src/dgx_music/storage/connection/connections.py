"""The open connections of a database, each of one event loop of one process.

A connection waits on the event loop that made it, and two processes must not use one socket. So
each event loop has its own engines, which are closed when it ends; and a forked child never touches
what it has inherited.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import URL
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session as SyncSession

from dgx_music.storage.connection import (
    postgres,
    postgres_drivers,
    sqlite,
    sqlite_changes,
    sqlite_file,
)
from dgx_music.storage.connection.changes import Changes
from dgx_music.storage.connection.direct import AsyncpgSession
from dgx_music.storage.connection.notifications import Notifications
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.connection.replica import Replica
from dgx_music.storage.connection.sessions import Session, finish
from dgx_music.storage.connection.snapshots import snapshot
from dgx_music.storage.connection.sqlite_changes import FileChanges
from dgx_music.storage.connection.sqlite_file import DatabaseFile
from dgx_music.storage.connection.sqlite_thread import Work, run_on_thread

T = TypeVar("T")

_CLOSE_SECONDS = 10.0


class Connections:
    """The engines of one event loop, its sessions, and its source of changes."""

    def __init__(
        self, url: URL, replica_url: URL | None, limits: Limits, file: DatabaseFile | None
    ) -> None:
        self.changes: Changes
        self._file = file
        if url.get_backend_name() == "sqlite":
            self.engine, self.reading_engine = sqlite.create_engines(url, file)
            single = self.engine
            self.changes = FileChanges(None if file is None else file.path)
        else:
            self.engine, self.reading_engine = postgres.create_engines(url, limits)
            single = postgres.without_transactions(self.engine, url)
            self.changes = Notifications(url, limits)
        self.replica = None if replica_url is None else Replica(replica_url, limits)
        kind = SyncSession if file is None else sqlite_file.session_class(file)
        self.writing = _sessions(self.engine, kind)
        self.writing_once: Callable[[], AsyncSession] = _sessions(single, kind)
        """Sessions in which each statement is a transaction; behind a pooler they have one each."""
        if single is not self.engine and single.dialect.driver == "asyncpg":
            self.writing_once = partial(AsyncpgSession, single)
        self.reading = _sessions(self.reading_engine, SyncSession)
        self.inserts: Any = None
        """What gathers the inserts of this event loop."""

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        """The engines with their own connections: for writing, for reading, for the replica."""
        is_shared = self.engine.pool is self.reading_engine.pool
        own = (self.engine,) if is_shared else (self.engine, self.reading_engine)
        return own if self.replica is None else (*own, self.replica.engine)

    async def run_on_thread(
        self, work: Work[T], *, read_only: bool, must_drop: Callable[[BaseException], bool]
    ) -> T:
        """Do the work in one transaction on the thread of a SQLite connection."""
        engine = self.reading_engine if read_only else self.engine
        return await run_on_thread(
            engine, self._file, work, read_only=read_only, must_drop=must_drop
        )

    async def finish_inserts(self) -> None:
        """Return when what has been handed in is written."""
        if self.inserts is not None:
            await self.inserts.close()

    async def close(self) -> None:
        """Close every connection, on the event loop that they belong to."""
        await self.changes.close()
        for engine in self.engines:
            await finish(engine.dispose())


def _sessions(engine: AsyncEngine, kind: type[SyncSession]) -> async_sessionmaker[Session]:
    return async_sessionmaker(
        engine, class_=Session, expire_on_commit=False, sync_session_class=kind
    )


class ConnectionsByLoop:
    """The ``Connections`` of each event loop: made at its first need, closed when it ends."""

    def __init__(
        self, url: URL, replica_url: URL | None, limits: Limits, file: DatabaseFile | None
    ) -> None:
        self._given = (url, replica_url, limits, file)
        self._by_loop: dict[
            asyncio.AbstractEventLoop, tuple[Connections, AsyncGenerator[None]]
        ] = {}
        _all.add(self)

    def here(self) -> Connections:
        """Return those of the running event loop."""
        loop = asyncio.get_running_loop()
        found = self._by_loop.get(loop)
        return self._make(loop) if found is None else found[0]

    async def close(self) -> None:
        """Close those of every event loop; those of one that does not run, when it runs again."""
        self._forget_ended()
        own = asyncio.get_running_loop()
        if (found := self._by_loop.get(own)) is not None:
            await found[0].finish_inserts()  # while they are known: it needs them
        taken, self._by_loop = self._by_loop, {}
        for loop, (_, closing) in taken.items():
            await (closing.aclose() if loop is own else _close_elsewhere(loop, closing))

    def _make(self, loop: asyncio.AbstractEventLoop) -> Connections:
        self._forget_ended()
        made = Connections(*self._given)
        closing = self._close_at_the_end(loop, made)
        with suppress(StopIteration):
            closing.__anext__().send(None)  # up to its yield: now the event loop knows of it
        self._by_loop[loop] = made, closing
        return made

    async def _close_at_the_end(
        self, loop: asyncio.AbstractEventLoop, made: Connections
    ) -> AsyncGenerator[None]:
        """Close them on ``aclose``, or when the event loop closes its asynchronous generators.

        That is the last thing that an event loop does.
        """
        try:
            yield
        finally:
            await made.finish_inserts()
            if (found := self._by_loop.get(loop)) is not None and found[0] is made:
                del self._by_loop[loop]
            await made.close()

    def _forget_ended(self) -> None:
        """Forget event loops that were closed without closing their generators."""
        for loop in [loop for loop in tuple(self._by_loop) if loop.is_closed()]:
            ended = self._by_loop.pop(loop, None)
            if ended is not None:  # else another thread was faster
                ended[0].changes.abandon()
        postgres_drivers.hang_up_ended()
        sqlite_file.close_ended()

    def after_fork(self) -> list[Any]:
        """In the child: forget all, and return what there was."""
        inherited, self._by_loop = list(self._by_loop.items()), {}
        return inherited


async def _close_elsewhere(loop: asyncio.AbstractEventLoop, closing: AsyncGenerator[None]) -> None:
    done: Future[None] = Future()
    tasks: list[asyncio.Task[None]] = []  # an event loop has only weak references to its tasks

    async def close() -> None:
        try:
            await closing.aclose()
        finally:
            tasks.clear()
            done.set_result(None)

    with suppress(RuntimeError):  # the loop was closed meanwhile, and its generators too
        loop.call_soon_threadsafe(lambda: tasks.append(loop.create_task(close())))
    if loop.is_running():
        await asyncio.wait([asyncio.wrap_future(done)], timeout=_CLOSE_SECONDS)


def _before_fork() -> None:
    global _paused
    sqlite_file.turn.acquire()
    _paused = sqlite_changes.pause()
    sqlite_file.rest_all()


def _after_fork_in_parent() -> None:
    sqlite_changes.resume(_paused)
    sqlite_file.turn.release()


def _after_fork_in_child() -> None:
    """Never touch what was inherited: a driver's goodbye would end the parent's session.

    The sockets are also the parent's, so they are not shut down here but let go.
    """
    inherited = [
        sqlite_file.after_fork(),
        postgres_drivers.after_fork(),
        sqlite_changes.after_fork(),
    ]
    inherited += [each.after_fork() for each in snapshot(_all)]
    ctypes.pythonapi.Py_IncRef(
        ctypes.py_object(inherited)
    )  # kept until after the interpreter's end


_all: WeakSet[ConnectionsByLoop] = WeakSet()
_paused: list[FileChanges] = []
os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
