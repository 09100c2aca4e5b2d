"""Sessions whose database calls run to their end even if the caller is cancelled."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, TypeVar

import anyio
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction, async_scoped_session
from sqlalchemy.orm import Session as SyncSession

from dgx_music.errors import InvalidRequestError
from dgx_music.storage.connection.postgres_errors import has_stale_plan

T = TypeVar("T")

_is_finishing: ContextVar[bool] = ContextVar("dgx_music_is_finishing", default=False)


class NoAnswerError(Exception):
    """The server did not answer; not a ``TimeoutError``, which may be the caller's own."""

    def __init__(self, why: str = "it did not answer in time") -> None:
        super().__init__(why)


def check_session(session: object) -> AsyncSession:
    """Return the session; raise ``InvalidRequestError`` unless it is SQLAlchemy's ``AsyncSession``.

    Of an ``async_scoped_session`` it is the one of the caller's scope: usually that of the caller's
    task, and the work runs in another one.
    """
    if isinstance(session, async_scoped_session):
        session = session()
    if not isinstance(session, AsyncSession):
        kind = type(session).__name__
        remedy = "use an AsyncSession of SQLAlchemy, or leave it out for one of our own"
        raise InvalidRequestError("session", f"is of the type {kind}", remedy)
    return session


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run the work to its end even if the caller is cancelled, then let the cancellation through.

    A statement of SQLAlchemy with aiosqlite that is cancelled half-way leaves the database
    write-locked until garbage collection, and the result of a commit unknown. A shielded scope
    stops anyio's cancellations, a separate task stops asyncio's. Inside such work another
    ``finish`` is a plain await, so that a transaction that is finished as a whole has the cost
    once.
    """
    if _is_finishing.get():
        return await work
    task = start_to_finish(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    # A cancellation comes only once: the caller must not miss it because of an error of the work.
    if cancelled is not None:
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


def start_to_finish(
    work: Coroutine[Any, Any, T], context: Context | None = None
) -> asyncio.Task[T]:
    """Start the work as a task that nobody cancels; inside it ``finish`` is a plain await.

    It runs in the given context, or else in a copy of the caller's.
    """
    task = asyncio.get_running_loop().create_task(_finishing(work), context=context)
    # Not in ``all_tasks``, which a shutdown cancels all; the caller's task is in it.
    asyncio._unregister_task(task)
    return task


async def _finishing(work: Coroutine[Any, Any, T]) -> T:
    _is_finishing.set(True)  # only in this task's context
    return await work


def _finished(method: Any) -> Any:
    """Return the coroutine method so that each call runs to its end, also if it is cancelled."""

    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return await finish(method(*args, **kwargs))
        except asyncio.CancelledError as error:
            caller = asyncio.current_task()
            if caller is None or caller.cancelling():
                raise
            # The driver's own cancellation: as such it would end the caller's whole task group.
            raise NoAnswerError from error
        except (OSError, EOFError) as error:  # while SQLAlchemy makes its first connection
            raise as_no_answer(error) from error

    return call


def _repeated(method: Any) -> Any:
    """Return the coroutine method so that it is called again if a migration made its plan stale.

    That is possible only at the start of a transaction, in a session that holds no objects: the
    rollback in between undoes nothing and expires nothing.
    """

    @functools.wraps(method)
    async def call(session: AsyncSession, *args: Any, **kwargs: Any) -> Any:
        begins = not session.in_transaction()
        try:
            return await method(session, *args, **kwargs)
        except DBAPIError as error:
            is_empty = not (session.new or session.identity_map)
            if not (begins and is_empty and has_stale_plan(error)):
                raise
        await session.rollback()
        return await method(session, *args, **kwargs)

    return call


def as_no_answer(error: OSError | EOFError) -> NoAnswerError:
    """Return the ``NoAnswerError`` for a driver's timeout or lost connection."""
    if isinstance(error, TimeoutError):  # of asyncpg; SQLAlchemy has its own classes
        return NoAnswerError()
    return NoAnswerError(f"the connection was lost ({error})")


class _CallersOwnError(Exception):
    """Carries an error of the caller's function past code that would take it for the driver's."""

    def __init__(self, error: OSError | EOFError) -> None:
        super().__init__(error)
        self.error = error


async def _run_sync(session: AsyncSession, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Like ``AsyncSession.run_sync``, but lets errors of the caller's function through."""

    def run(sync_session: SyncSession) -> T:
        try:
            return work(sync_session, *args, **kwargs)
        except (OSError, EOFError) as error:
            raise _CallersOwnError(error) from None

    return await AsyncSession.run_sync(session, run)


_finished_run_sync = _finished(_run_sync)


class _Transaction(AsyncSessionTransaction):
    start = _finished(AsyncSessionTransaction.start)
    commit = _finished(AsyncSessionTransaction.commit)
    rollback = _finished(AsyncSessionTransaction.rollback)
    __aexit__ = _finished(AsyncSessionTransaction.__aexit__)


class Session(AsyncSession):
    """An ``AsyncSession`` whose calls run to their end; not those on a stream or connection."""

    execute = _finished(_repeated(AsyncSession.execute))
    scalar = _finished(_repeated(AsyncSession.scalar))
    get = _finished(_repeated(AsyncSession.get))
    get_one = _finished(_repeated(AsyncSession.get_one))
    refresh = _finished(AsyncSession.refresh)
    merge = _finished(AsyncSession.merge)
    merge_all = _finished(AsyncSession.merge_all)
    delete = _finished(AsyncSession.delete)
    delete_all = _finished(AsyncSession.delete_all)
    flush = _finished(AsyncSession.flush)
    connection = _finished(AsyncSession.connection)
    commit = _finished(AsyncSession.commit)
    rollback = _finished(AsyncSession.rollback)
    close = _finished(AsyncSession.close)
    reset = _finished(AsyncSession.reset)
    invalidate = _finished(AsyncSession.invalidate)

    async def run_sync(self, fn: Callable[..., T], *arg: Any, **kw: Any) -> T:
        """Like ``AsyncSession.run_sync``; raises what ``fn`` raises."""
        try:
            result: T = await _finished_run_sync(self, fn, *arg, **kw)
        except _CallersOwnError as carrier:
            raise carrier.error from carrier.error.__cause__
        return result

    def begin(self) -> AsyncSessionTransaction:
        """Like ``AsyncSession.begin``."""
        return _Transaction(self)

    def begin_nested(self) -> AsyncSessionTransaction:
        """Like ``AsyncSession.begin_nested``."""
        return _Transaction(self, nested=True)


class Ending:
    """Gives a session that commits on success, and always closes.

    After any exception, of the block or of the commit, it awaits ``undo``, which may raise another
    one. It is a class because an asynchronous generator takes several times as long.
    """

    def __init__(
        self,
        session: AsyncSession,
        undo: Callable[[AsyncSession, BaseException], Awaitable[None]],
    ) -> None:
        self._session, self._undo = session, undo

    async def __aenter__(self) -> AsyncSession:
        """Return the session."""
        return self._session

    async def __aexit__(self, _kind: object, error: BaseException | None, _at: object) -> None:
        """Commit or undo, then close."""
        try:
            if error is None:
                await self._commit()
            else:
                await self._undo(self._session, error)
        finally:
            await self._session.close()

    async def _commit(self) -> None:
        try:
            await self._session.commit()
        except BaseException as error:
            await self._undo(self._session, error)
            raise
