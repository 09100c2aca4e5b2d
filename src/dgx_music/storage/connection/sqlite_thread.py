"""Whole transactions on the thread of a SQLite connection: one trip to the thread for each.

The driver, aiosqlite, has a thread for each connection. A session of the event loop waits for that
thread several times for each statement; a transaction of our own runs there from BEGIN to COMMIT.
The work is the same coroutine that other sessions run: in ``ThreadSession`` no call has to wait, so
the coroutine runs to its end without an event loop.
"""

from __future__ import annotations

import contextvars
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar, cast

from sqlalchemy import Engine, PoolProxiedConnection, StaticPool, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import greenlet_spawn

from dgx_music.storage.connection.direct import DirectSession
from dgx_music.storage.connection.sqlite_file import DatabaseFile, waiting
from dgx_music.storage.connection.warm_pool import WarmConnection, WarmPool, give_back

T = TypeVar("T")
Work = Callable[[AsyncSession], Awaitable[T]]

_ENGINE = "dgx_music_thread_engine"


def _at_once(name: str) -> Any:
    """Return the session's method of this name as a coroutine that never waits."""

    async def call(session: AsyncSession, *args: Any, **kwargs: Any) -> Any:
        return getattr(session.sync_session, name)(*args, **kwargs)

    return call


class ThreadSession(DirectSession):
    """A session that lives on the connection's thread: its calls return without waiting.

    ``driver`` is the connection itself, with a transaction begun.
    """

    def __init__(self, driver: sqlite3.Connection, engine: Engine) -> None:
        super().__init__(engine)
        self._driver = driver

    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Execute the text, and return its rows as the driver gives them."""
        self._check_begun()
        try:
            return self._driver.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            raise _as_sqlalchemys(statement, error) from error

    async def fetch_none(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute the text once for each of these parameters; it returns no rows."""
        self._check_begun()
        try:
            self._driver.executemany(statement, rows)
        except sqlite3.Error as error:
            raise _as_sqlalchemys(statement, error) from error

    async def commit(self) -> None:
        """Commit; the session executes nothing after that."""
        self.commit_now()

    async def rollback(self) -> None:
        """Roll back; the session executes nothing after that."""
        if self._made is not None:
            self._made.rollback()
        self._driver.rollback()

    def _check_begun(self) -> None:
        """Raise if the transaction has ended, by a call of the work or by an error in it."""
        if not self._driver.in_transaction:
            raise RuntimeError("the transaction has ended: it was committed or rolled back")

    def commit_now(self) -> None:
        """Write what the session still holds, and commit."""
        if self._made is not None:
            self._made.commit()
        self._driver.commit()

    def close_now(self) -> None:
        """Roll back if there was no commit, and let go of the objects."""
        if self._driver.in_transaction:
            with suppress(sqlite3.Error):
                self._driver.rollback()
        if self._made is not None:
            self._made.close()

    execute = _at_once("execute")
    scalar = _at_once("scalar")
    scalars = _at_once("scalars")
    get = _at_once("get")
    get_one = _at_once("get_one")
    refresh = _at_once("refresh")
    merge = _at_once("merge")
    delete = _at_once("delete")
    flush = _at_once("flush")


async def run_on_thread(
    engine: AsyncEngine,
    file: DatabaseFile | None,
    work: Work[T],
    *,
    read_only: bool,
    must_drop: Callable[[BaseException], bool],
) -> T:
    """Return what the work returns, done in one transaction on a connection of the engine.

    ``file`` is ``None`` for a database in memory. The connection is dropped after an error that
    ``must_drop``.
    """
    connection = await _connect(engine.sync_engine, file)
    try:
        adapted: Any = connection.dbapi_connection
        driver = adapted.driver_connection
        transaction = _Transaction(driver._conn, connection.info, read_only)
        run = partial(contextvars.copy_context().run, transaction.run, work)
        done: T = await driver._execute(run)
        if file is not None and not read_only:
            file.check(connection.info)
    except Exception as error:
        if must_drop(error) or _is_unfinished(driver):
            await greenlet_spawn(connection.invalidate)
        raise
    else:
        return done
    finally:
        await give_back(connection)


def _is_unfinished(driver: Any) -> bool:
    try:
        return bool(driver._conn.in_transaction)
    except (ValueError, sqlite3.Error):  # it was closed underneath
        return True


async def _connect(
    engine: Engine, file: DatabaseFile | None
) -> WarmConnection | PoolProxiedConnection:
    warm = None
    if file is not None:
        warm = cast("WarmPool", engine.pool).take(file.take, file.give_back)
    return await greenlet_spawn(engine.raw_connection) if warm is None else warm


class _Transaction:
    """One transaction, on the connection's thread."""

    def __init__(self, driver: sqlite3.Connection, info: dict[str, Any], read_only: bool) -> None:
        self._driver = driver
        self._info = info
        self._begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"

    def run(self, work: Work[T]) -> T:
        session = ThreadSession(self._driver, self._engine())
        try:
            with waiting(self._info):
                self._driver.execute(self._begin)
            result = _run_to_its_end(work(session))
            session.commit_now()
        finally:
            session.close_now()
        return result

    def _engine(self) -> Engine:
        """Return SQLAlchemy's engine on this one connection, for statements that are not ``Prepared``."""
        if (found := self._info.get(_ENGINE)) is None:
            found = create_engine(
                "sqlite://",
                creator=lambda: self._driver,
                poolclass=StaticPool,
                pool_reset_on_return=None,
            )
            found.connect().close()  # the first connection rolls back; later ones do not
            self._info[_ENGINE] = found
        return cast("Engine", found)


def _as_sqlalchemys(statement: str, error: sqlite3.Error) -> BaseException:
    """Return the driver's error as SQLAlchemy raises it."""
    return DBAPIError.instance(statement, None, error, sqlite3.Error)


def _run_to_its_end(work: Awaitable[T]) -> T:
    """Return what the coroutine returns; raise ``RuntimeError`` if it waits for anything else."""
    coroutine = cast("Coroutine[Any, Any, T]", work)
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    coroutine.close()
    raise RuntimeError("a transaction may only await the calls of its session")
