"""The engines of a PostgreSQL server: their pool, and what they do after an error."""

from __future__ import annotations

import math
import time
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Dialect, Engine, ExceptionContext, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from dgx_music.storage.connection.postgres_drivers import Limits, creator
from dgx_music.storage.connection.postgres_errors import has_stale_plan
from dgx_music.storage.connection.server_settings import say_in_each_transaction
from dgx_music.storage.connection.sessions import as_no_answer
from dgx_music.storage.connection.urls import is_pooled_by_transaction
from dgx_music.storage.connection.warm_pool import WarmPool

_TRUSTED_SECONDS = 30.0
_RESTS_SINCE = "dgx_music_rests_since"


def create_engines(url: URL, limits: Limits) -> tuple[AsyncEngine, AsyncEngine]:
    """Return two engines on one pool: for writing sessions and for reading sessions."""
    engine = create_async_engine(
        url.set(query={}),
        poolclass=WarmPool,
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


def without_transactions(engine: AsyncEngine, url: URL) -> AsyncEngine:
    """Return the engine for transactions of one statement, which need no BEGIN and no COMMIT.

    Behind a pooler each transaction begins with our settings, so there it is the same engine.
    """
    if is_pooled_by_transaction(url):
        return engine
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _dialect_options(url: URL) -> dict[str, Any]:
    """Behind a pooler, prepare nothing: the next transaction may get another server session."""
    if url.get_driver_name() != "asyncpg" or not is_pooled_by_transaction(url):
        return {}
    return {
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"dgx_music_{uuid4()}",
    }


def prepare(engine: AsyncEngine, url: URL) -> None:
    """Have an engine forget plans that a migration has made wrong.

    Behind a pooler, also have it set our settings in each transaction.
    """
    event.listen(engine.sync_engine, "handle_error", _forget_plans)
    event.listen(engine.sync_engine, "handle_error", _tell_sockets_trouble, retval=True)
    if is_pooled_by_transaction(url):
        say_in_each_transaction(engine.sync_engine)


def _forget_plans(context: ExceptionContext) -> None:
    """Have all connections made anew after a prepared statement had a result of another type."""
    if context.sqlalchemy_exception is not None and has_stale_plan(context.sqlalchemy_exception):
        context.is_disconnect = True


def _tell_sockets_trouble(context: ExceptionContext) -> BaseException | None:
    """Translate a timeout or a lost connection here, where only the driver can have raised it."""
    error = context.original_exception
    is_bare = context.sqlalchemy_exception is None and isinstance(error, OSError | EOFError)
    return as_no_answer(error) if is_bare else None  # type: ignore[arg-type]  # is_bare has looked


def _replace_dead_connections(engine: Engine) -> None:
    """Have the pool test idle connections, so that the first statement after a restart succeeds.

    asyncpg hears of a connection's end by itself, so a connection that was used lately needs no
    test; its dialect's ``pool_pre_ping`` would test each time, in three round trips: as many as a
    claim takes.
    """
    is_asyncpg = engine.dialect.driver == "asyncpg"

    def rest(_connection: Any, record: ConnectionPoolEntry) -> None:
        note_rest(record)

    def look(connection: Any, record: ConnectionPoolEntry, _proxy: Any) -> None:
        if _RESTS_SINCE not in record.info:  # it is new
            return
        is_good = is_asyncpg and is_trusted(record)
        if not is_good and not _answers(engine.dialect, connection):
            raise InvalidatePoolError
        # A reading session leaves READ WRITE behind, which a read-only database would refuse.
        if not is_asyncpg:
            connection.run_async(lambda driver: driver.set_read_only(None))

    event.listen(engine, "checkin", rest)
    event.listen(engine, "checkout", look)


def note_rest(entry: ConnectionPoolEntry) -> None:
    """Note that the connection is at rest from now on."""
    entry.info[_RESTS_SINCE] = time.monotonic()


def is_trusted(entry: ConnectionPoolEntry) -> bool:
    """Return True if asyncpg's connection was used lately, and is open: it needs no test."""
    rested = time.monotonic() - entry.info.get(_RESTS_SINCE, -math.inf)
    adapted: Any = entry.dbapi_connection
    return rested < _TRUSTED_SECONDS and not adapted.driver_connection.is_closed()


def _answers(dialect: Dialect, connection: Any) -> bool:
    try:
        if dialect.driver == "asyncpg":
            connection.run_async(lambda driver: driver.execute("SELECT 1"))
        else:
            dialect.do_ping(connection)
    except Exception:  # the drivers' own
        return False
    return True
