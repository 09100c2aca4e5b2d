"""PostgreSQL's connections, by asyncpg or psycopg: how they are made, how long they wait, and when they are given up.

Both drivers are handed the URL as PostgreSQL's own libraries read it, so that ``sslmode``, several hosts and sockets mean
the same with each. Neither gives up by itself on a network that swallows everything: every wait has an end here.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from sqlalchemy import URL, Dialect, Engine, ExceptionContext, MetaData, event
from sqlalchemy.exc import DBAPIError, InvalidatePoolError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.connection.server_settings import READABLE, SET_UP, say_in_each_transaction
from dgx_music.storage.connection.sessions import NoAnswerError, as_no_answer
from dgx_music.storage.connection.snapshots import snapshot
from dgx_music.storage.connection.urls import connect_timeout, is_pooled_by_transaction, server_address

_TRANSIENT = {"40001", "40P01", "40003", "55P03", "55006", "57014", "57P01", "57P02", "57P03", "57P04", "57P05"}
_TRANSIENT |= {"25P03", "25P04", "25006"}
"""Serialisation, deadlock, lock and statement timeouts, shutdown; the last is a server that has become a replica."""
_FORBIDDEN = "42501"
_LOCK_NOT_HAD, _IDLE_TOO_LONG = "55P03", "25P03"
_ASYNCPGS_IDLE_TOO_LONG = ("underlying connection is closed", "idle-in-transaction timeout")
_WORTH_REPEATING = {"40001", "40P01"}
_STALE_PLAN = ("cached plan must not change result type", "cached statement plan is invalid")
_NOT_THERE, _NO_COLUMN, _NO_SCHEMA = "42P01", "42703", "3F000"
_BEHIND_A_POOLER = {"26000", "42P05"}
_UNAVAILABLE_CLASSES = ("08", "53", "58", "XX")
"""Connections, resources, the server's own disk, and what it calls an internal error."""
_LOST = ("connection is closed", "connection was closed", "connection has been closed")
_BETWEEN_HOSTS_SECONDS = 1.0
_GOODBYE_SECONDS = 0.3
_TRUSTED_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many connections a process keeps, and how long it waits for what, in seconds."""

    pool_size: int = 5
    connect_seconds: float = 5.0
    statement_seconds: float = 10.0
    """What the server gives one statement."""
    command_seconds: float = 15.0
    """What we give the server to answer, network included; then the connection is given up."""
    idle_seconds: float = 60.0
    """What the server gives an open transaction to go on: its client may be gone, and its locks must not stay."""


def create_engines(url: URL, limits: Limits) -> tuple[AsyncEngine, AsyncEngine]:
    """Return the engine of writing sessions, and the same with the options of reading ones."""
    engine = create_async_engine(
        url.set(query={}),
        pool_size=limits.pool_size,
        max_overflow=0,
        pool_timeout=limits.command_seconds,
        pool_use_lifo=True,
        isolation_level="READ COMMITTED",
        connect_args={"async_creator_fn": creator(url, limits), **_dialect_options(url)},
    )
    prepare(engine, url)
    _replace_dead_connections(engine.sync_engine)
    reading = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return engine, reading


def prepare(engine: AsyncEngine, url: URL) -> None:
    """Have an engine on this URL forget plans that a migration has made wrong, and say its settings where a pooler needs it."""
    event.listen(engine.sync_engine, "handle_error", _forget_plans)
    event.listen(engine.sync_engine, "handle_error", _tell_sockets_trouble, retval=True)
    if is_pooled_by_transaction(url):
        say_in_each_transaction(engine.sync_engine)


def _forget_plans(context: ExceptionContext) -> None:
    """Have every connection made anew once one of their prepared statements has a result of another type."""
    if context.sqlalchemy_exception is not None and _has_stale_plan(context.sqlalchemy_exception):
        context.is_disconnect = True


def _tell_sockets_trouble(context: ExceptionContext) -> BaseException | None:
    """Say here, while it can only be the driver's, what a timeout or a lost connection is."""
    error = context.original_exception
    is_bare = context.sqlalchemy_exception is None and isinstance(error, OSError | EOFError)
    return as_no_answer(error) if is_bare else None  # type: ignore[arg-type]  # is_bare has looked


def _has_stale_plan(error: BaseException) -> bool:
    """Return True where somebody else's migration has changed what a prepared statement returns: again, it succeeds.

    The server's words for it are in its own language, but the function that says so is not; asyncpg's words are its own.
    """
    if not isinstance(error, DBAPIError):
        return False
    told_by = getattr(getattr(error.orig, "diag", None), "source_function", None)
    return told_by == "RevalidateCachedQuery" or any(words in str(error.orig) for words in _STALE_PLAN)


def _replace_dead_connections(engine: Engine) -> None:
    """Have the pool find out who died while resting: after a restart of the server the first statement succeeds.

    asyncpg learns of a connection's end by itself, so one that was in use lately need not be asked; its dialect's
    ``pool_pre_ping`` would ask every time, in three round trips: as many as a claim takes.
    """
    is_asyncpg = engine.dialect.driver == "asyncpg"

    def note_rest(_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["rests_since"] = time.monotonic()

    def look(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if "rests_since" not in record.info:  # it is new
            return
        rested = time.monotonic() - record.info["rests_since"]
        if is_asyncpg and rested < _TRUSTED_SECONDS:
            is_dead = connection.driver_connection.is_closed()
        else:
            is_dead = not _answers(engine.dialect, connection)
        if is_dead:
            raise InvalidatePoolError
        if not is_asyncpg:  # a reading session would leave READ WRITE behind, which a read-only database must refuse
            connection.run_async(lambda driver: driver.set_read_only(None))

    event.listen(engine, "checkin", note_rest)
    event.listen(engine, "checkout", look)


def _answers(dialect: Dialect, connection: Any) -> bool:
    try:
        if dialect.driver == "asyncpg":
            connection.run_async(lambda driver: driver.execute("SELECT 1"))
        else:
            dialect.do_ping(connection)
    except Exception:  # the drivers' own
        return False
    return True


def creator(url: URL, limits: Limits, *, is_patient: bool = False) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return a coroutine that connects; ``is_patient`` leaves out the limits on statements, for migrations.

    It raises ``DatabaseUnavailableError`` whatever the driver calls the trouble.
    """
    connect = _connect_asyncpg if url.get_driver_name() == "asyncpg" else _connect_psycopg
    limits = replace(limits, connect_seconds=connect_timeout(url) or limits.connect_seconds)
    longest = _longest(url, limits)

    async def create(*_arguments: Any, **_options: Any) -> Any:  # SQLAlchemy's reading of the URL
        try:
            async with asyncio.timeout(longest):
                connection = await connect(url, limits, is_patient)
        except TimeoutError:
            raise DatabaseUnavailableError(shown(url), f"no connection in {limits.connect_seconds:g} s") from None
        except Exception as error:  # OSError and the driver's own, each with causes of its own
            raise DatabaseUnavailableError(shown(url), _why_refused(error)) from error
        _loops[connection] = asyncio.get_running_loop()
        return connection

    return create


_loops: WeakKeyDictionary[Any, asyncio.AbstractEventLoop] = WeakKeyDictionary()
"""Every connection of this process, and the event loop that it belongs to."""


def hang_up_ended() -> None:
    """Close the connections of event loops that were closed before them, which nothing can say goodbye on any more."""
    for connection in [connection for connection, loop in snapshot(_loops.items()) if loop.is_closed()]:
        if _loops.pop(connection, None) is None:  # another thread was quicker
            continue
        if hasattr(connection, "pgconn"):
            connection.pgconn.finish()
        else:
            _hang_up_asyncpg(connection)


def _hang_up_asyncpg(connection: Any) -> None:
    """Do what ``terminate`` would have the event loop do in a moment; else the transport complains when it is collected."""
    transport = connection._transport
    transport = getattr(getattr(transport, "_ssl_protocol", None), "_transport", transport)
    with suppress(Exception):  # the event loop is closed
        transport.abort()
    with suppress(Exception):
        transport._call_connection_lost(None)


def after_fork() -> list[Any]:
    """In the child: let go of the parent's sockets, know of no connection, and return those there were.

    Nothing is in a socket's place from now on, so that whatever its owner does to it, the parent does not hear it.
    """
    inherited = snapshot(_loops.items())
    _loops.clear()
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for connection, _ in inherited:
        with suppress(Exception):  # it is closed already
            os.dup2(nothing, _socket_of(connection), inheritable=False)
    os.close(nothing)
    return inherited


def _socket_of(connection: Any) -> int:
    if hasattr(connection, "pgconn"):
        return int(connection.pgconn.socket)
    return int(connection._transport.get_extra_info("socket").fileno())


def _longest(url: URL, limits: Limits) -> float:
    """Return how long a connection is waited for in all: each of several hosts may be silent for its own time."""
    hosts = len(_one_by_one(url))
    return limits.connect_seconds if hosts == 1 else hosts * _psycopg_timeout(limits) + _BETWEEN_HOSTS_SECONDS


def _why_refused(error: Exception) -> str:
    why = first_line(error)
    return f"{why}; add ?pgbouncer=true to its URL" if "unsupported startup parameter" in why else why


def shown(url: URL) -> str:
    """Return the URL as a user may see it."""
    if url.get_backend_name() == "sqlite":
        # SQLAlchemy would write some characters of the path as %25 and the like.
        return f"sqlite:///{url.database or ''}"
    return url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def is_unavailable(error: BaseException) -> bool:
    """Tell a server that is away, or too busy for now, from a mistake in using it."""
    if isinstance(error, DBAPIError):
        code = sqlstate(error)
        return error.connection_invalidated or _is_passing(code) or _is_lost(error, code)
    return _is_drivers_own(error) and (_is_passing(code := getattr(error, "sqlstate", None) or "") or not code)


def _is_passing(code: str) -> bool:
    passing = _TRANSIENT | _BEHIND_A_POOLER | {_FORBIDDEN, _NO_SCHEMA}
    return code in passing or code.startswith(_UNAVAILABLE_CLASSES)


def _is_lost(error: DBAPIError, code: str) -> bool:
    """Return True where the driver itself says that its connection is no good, and the server nothing."""
    is_psycopgs = isinstance(error, OperationalError) and not code
    return _has_stale_plan(error) or is_psycopgs or any(words in str(error.orig) for words in _LOST)


def is_of_another_schema(error: BaseException, metadata: MetaData) -> bool:
    """Return True if a table or a column of these is not there just now: it is being made anew, or was migrated."""
    if not isinstance(error, DBAPIError):
        return False
    tables = {VERSION_TABLE, *metadata.tables}
    columns = {column.name for table in metadata.tables.values() for column in table.columns}
    ours = {_NOT_THERE: tables, _NO_COLUMN: columns}.get(sqlstate(error), set())
    # The words around the name are in the server's language, and so are its quotation marks.
    return not ours.isdisjoint(re.findall(r"\w+", first_line(error.orig or error)))


def _is_drivers_own(error: BaseException) -> bool:
    """Return True for what a driver raises while SQLAlchemy makes its first connection, which nothing wraps."""
    return type(error).__module__.partition(".")[0] in ("asyncpg", "psycopg")


def is_worth_repeating(error: BaseException) -> bool:
    """Return True where the very same transaction may succeed at once: a deadlock's victim, a lost race, a stale plan."""
    return isinstance(error, DBAPIError) and (sqlstate(error) in _WORTH_REPEATING or _has_stale_plan(error))


def is_locked(error: DBAPIError) -> bool:
    """Return True where a lock was not to be had in time."""
    return sqlstate(error) == _LOCK_NOT_HAD


def known_reason(error: BaseException, limits: Limits) -> str | None:
    """Return why the server gave up, and what to do; ``None`` where its own words have to do."""
    if not isinstance(error, DBAPIError):
        return None
    if is_locked(error):
        return "others are using its tables; try again when they are quieter"
    if sqlstate(error) in _BEHIND_A_POOLER:
        return f"{first_line(error.orig or error)}; where a pooler stands before it, add ?pgbouncer=true to its URL"
    if _has_stale_plan(error):
        return "its tables were changed meanwhile; try again"
    has_no_code = any(words in str(error.orig) for words in _ASYNCPGS_IDLE_TOO_LONG)
    if sqlstate(error) == _IDLE_TOO_LONG or has_no_code:
        why = f"its connection ended in an idle transaction, which the server allows for {limits.idle_seconds:g} s"
        return f"{why}; finish it sooner, or raise DGX_MUSIC_IDLE_TRANSACTION_TIMEOUT_SECONDS"
    return None


def sqlstate(error: DBAPIError) -> str:
    """Return PostgreSQL's five characters for the error; empty where the server had no say in it."""
    return getattr(error.orig, "sqlstate", None) or ""


async def _connect_asyncpg(url: URL, limits: Limits, is_patient: bool) -> Any:
    """Connect to the first host that will do; given them all, asyncpg would have one time for them together."""
    import asyncpg

    pooled = is_pooled_by_transaction(url)
    not_this_one = (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched)
    *others, last = _in_order(url)
    for host in (*others, last):
        try:
            connection = await asyncpg.connect(
                server_address(host),
                connection_class=_bounded_asyncpg(),
                timeout=limits.connect_seconds,
                command_timeout=None if is_patient else limits.command_seconds,
                server_settings={} if pooled else _server_settings(url, limits, is_patient),
                **({"statement_cache_size": 0} if pooled else {}),
            )
            if not pooled:
                await _or_hang_up(connection.execute(SET_UP), connection.terminate)
            return connection
        except not_this_one:  # a TimeoutError is an OSError
            if host is last:
                raise
    raise AssertionError("unreachable")


def _one_by_one(url: URL) -> list[URL]:
    """Return the URL with each of its hosts alone."""
    hosts = str(url.query.get("host", "")).split(",")
    if len(hosts) == 1:
        return [url]
    ports = str(url.query.get("port", "")).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    pairs = zip(hosts, ports, strict=True)
    return [url.update_query_dict({"host": host, "port": port or "5432"}) for host, port in pairs]


def _in_order(url: URL) -> list[URL]:
    """Return what to try: where a standby is only preferred, each host as one, and only then as anything."""
    hosts = _one_by_one(url)
    if len(hosts) == 1 or url.query.get("target_session_attrs") != "prefer-standby":
        return hosts
    return [host.update_query_dict({"target_session_attrs": kind}) for kind in ("standby", "any") for host in hosts]


def _psycopg_timeout(limits: Limits) -> int:
    """Return what psycopg waits for each host: whole seconds, and at least two."""
    return max(2, ceil(limits.connect_seconds))


async def _connect_psycopg(url: URL, limits: Limits, is_patient: bool) -> Any:
    settings = {} if is_pooled_by_transaction(url) else _server_settings(url, limits, is_patient)
    name = settings.pop("application_name", None)
    connection = await _bounded_psycopg().connect(
        server_address(url),
        connect_timeout=_psycopg_timeout(limits),
        options=" ".join(f"-c {setting}={value}" for setting, value in settings.items()),
        prepare_threshold=None if is_pooled_by_transaction(url) else 2,
        client_encoding="utf8",
        **({"application_name": name} if name else {}),
    )
    connection.command_seconds = None if is_patient else limits.command_seconds
    if settings:
        await _or_hang_up(_set_up_psycopg(connection), connection.pgconn.finish)
    return connection


async def _set_up_psycopg(connection: Any) -> None:
    await connection.set_autocommit(True)  # spares it a BEGIN and a COMMIT
    await connection.execute(SET_UP)
    await connection.set_autocommit(False)


async def _or_hang_up(set_up: Awaitable[Any], hang_up: Callable[[], Any]) -> None:
    """Wait for a new connection's setting up; hang up where it fails or is cancelled, since nobody has the connection yet."""
    try:
        await set_up
    except BaseException:
        hang_up()
        raise


def _server_settings(url: URL, limits: Limits, is_patient: bool) -> dict[str, str]:
    settings = READABLE | {"jit": "off"}  # compiling costs more than any statement of ours takes
    if "application_name" not in url.query:
        settings["application_name"] = "dgx-music"
    settings["statement_timeout"] = f"{0 if is_patient else limits.statement_seconds * 1000:.0f}"
    settings["idle_in_transaction_session_timeout"] = f"{0 if is_patient else limits.idle_seconds * 1000:.0f}"
    return settings


def _dialect_options(url: URL) -> dict[str, Any]:
    """Leave nothing prepared on a server session that the next transaction may not get."""
    if url.get_driver_name() != "asyncpg" or not is_pooled_by_transaction(url):
        return {}
    return {"prepared_statement_cache_size": 0, "prepared_statement_name_func": lambda: f"dgx_music_{uuid4()}"}


@cache
def _bounded_asyncpg() -> Any:
    import asyncpg

    class BoundedConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg says nothing of its types
        """A connection that is given up when the server does not answer, where asyncpg would keep it.

        SQLAlchemy begins, pings, commits and prepares by these, and concludes from a lost connection that the whole pool
        must be made anew. After a timeout it would say goodbye first, and wait two seconds for the answer to that.
        """

        async def execute(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().execute(*arguments, **options))

        async def fetchrow(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().fetchrow(*arguments, **options))

        async def prepare(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().prepare(*arguments, **options))

        async def close(self, *, timeout: float | None = None) -> None:
            """Say goodbye, and do not wait for long to hear it: of many connections each would take so long."""
            with suppress(TimeoutError):
                await super().close(timeout=min(timeout or _GOODBYE_SECONDS, _GOODBYE_SECONDS))

        async def _bounded(self, call: Coroutine[Any, Any, Any]) -> Any:
            try:
                return await call
            except TimeoutError:
                self.terminate()
                raise asyncpg.ConnectionDoesNotExistError(str(NoAnswerError())) from None

    return BoundedConnection


@cache
def _bounded_psycopg() -> Any:
    import psycopg

    class BoundedConnection(psycopg.AsyncConnection[Any]):
        """A connection that is given up when the server does not answer: every wait of the driver passes ``wait``."""

        command_seconds: float | None = None

        async def wait(self, *arguments: Any, **options: Any) -> Any:
            """Wait for the server; hang up when it takes too long, which libpq reports as a lost connection.

            Not a timeout around the wait: the driver would answer its cancellation by two more waits of five seconds.
            """
            if self.command_seconds is None:
                return await super().wait(*arguments, **options)
            timer = asyncio.get_running_loop().call_later(self.command_seconds, self._hang_up)
            try:
                return await super().wait(*arguments, **options)
            finally:
                timer.cancel()

        def _hang_up(self) -> None:
            with suppress(OSError), socket.socket(fileno=os.dup(self.pgconn.socket)) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    return BoundedConnection


def first_line(error: BaseException) -> str:
    """Return the first line of what the error says, without its full stop; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
