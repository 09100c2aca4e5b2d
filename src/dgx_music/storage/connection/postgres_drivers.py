"""How asyncpg and psycopg connect to PostgreSQL, how long they wait, and how they hang up.

Both get the URL in the form that PostgreSQL's own libraries read, so that ``sslmode``, several
hosts and sockets mean the same with each. Neither gives up by itself on a network that loses
everything: here every wait has a limit.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import URL

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.postgres_errors import message_line
from dgx_music.storage.connection.server_settings import READABLE, SET_UP
from dgx_music.storage.connection.sessions import NoAnswerError
from dgx_music.storage.connection.snapshots import snapshot
from dgx_music.storage.connection.urls import (
    connect_timeout,
    is_pooled_by_transaction,
    server_address,
    shown,
)

_BETWEEN_HOSTS_SECONDS = 1.0
_GOODBYE_SECONDS = 0.3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many connections a process keeps, and how long it waits, in seconds."""

    pool_size: int = 5
    connect_seconds: float = 5.0
    statement_seconds: float = 10.0
    """How long the server lets one statement run."""
    command_seconds: float = 15.0
    """How long we wait for the server's answer, network included; then we drop the connection."""
    idle_seconds: float = 60.0
    """How long the server keeps an idle transaction: its client may be gone, with its locks."""


def creator(
    url: URL, limits: Limits, *, is_patient: bool = False
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return a coroutine that connects; ``is_patient``, for migrations, limits no statement.

    It raises ``DatabaseUnavailableError``, whichever error the driver raises.
    """
    connect = _connect_asyncpg if url.get_driver_name() == "asyncpg" else _connect_psycopg
    limits = replace(limits, connect_seconds=connect_timeout(url) or limits.connect_seconds)
    longest = _longest(url, limits)

    async def create(*_arguments: Any, **_options: Any) -> Any:  # SQLAlchemy gives the URL's parts
        try:
            async with asyncio.timeout(longest):
                connection = await connect(url, limits, is_patient)
        except TimeoutError:
            why = f"no connection in {limits.connect_seconds:g} s"
            raise DatabaseUnavailableError(shown(url), why) from None
        except Exception as error:  # OSError and the drivers' own
            raise DatabaseUnavailableError(shown(url), _why_refused(error)) from error
        _loops[connection] = asyncio.get_running_loop()
        return connection

    return create


def _longest(url: URL, limits: Limits) -> float:
    """Return for how long to wait in all: each of several hosts may take its own time."""
    hosts = len(_one_by_one(url))
    if hosts == 1:
        return limits.connect_seconds
    return hosts * _psycopg_timeout(limits) + _BETWEEN_HOSTS_SECONDS


def _why_refused(error: Exception) -> str:
    why = message_line(error)
    return (
        f"{why}; add ?pgbouncer=true to its URL" if "unsupported startup parameter" in why else why
    )


async def _connect_asyncpg(url: URL, limits: Limits, is_patient: bool) -> Any:
    """Connect to the first host that answers; asyncpg itself has one limit for all hosts."""
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
    """Return one URL for each of its hosts."""
    hosts = str(url.query.get("host", "")).split(",")
    if len(hosts) == 1:
        return [url]
    ports = str(url.query.get("port", "")).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    pairs = zip(hosts, ports, strict=True)
    return [url.update_query_dict({"host": host, "port": port or "5432"}) for host, port in pairs]


def _in_order(url: URL) -> list[URL]:
    """Return what to try; if a standby is only preferred, each host as one, then each as any."""
    hosts = _one_by_one(url)
    if len(hosts) == 1 or url.query.get("target_session_attrs") != "prefer-standby":
        return hosts
    return [
        host.update_query_dict({"target_session_attrs": kind})
        for kind in ("standby", "any")
        for host in hosts
    ]


async def _connect_psycopg(url: URL, limits: Limits, is_patient: bool) -> Any:
    settings = {} if is_pooled_by_transaction(url) else _server_settings(url, limits, is_patient)
    name = settings.pop("application_name", None)
    connection = await _bounded_psycopg().connect(
        server_address(url),
        connect_timeout=_psycopg_timeout(limits),
        options=" ".join(f"-c {name}={_escaped(value)}" for name, value in settings.items()),
        prepare_threshold=None if is_pooled_by_transaction(url) else 2,
        client_encoding="utf8",
        **({"application_name": name} if name else {}),
    )
    connection.command_seconds = None if is_patient else limits.command_seconds
    if settings:
        await _or_hang_up(_set_up_psycopg(connection), connection.pgconn.finish)
    return connection


def _escaped(value: str) -> str:
    return value.replace(" ", "\\ ")


def _psycopg_timeout(limits: Limits) -> int:
    """Return how long psycopg waits for each host: whole seconds, and at least two."""
    return max(2, ceil(limits.connect_seconds))


async def _set_up_psycopg(connection: Any) -> None:
    await connection.set_autocommit(True)  # saves a BEGIN and a COMMIT
    await connection.execute(SET_UP)
    await connection.set_autocommit(False)


async def _or_hang_up(set_up: Awaitable[Any], hang_up: Callable[[], Any]) -> None:
    """Wait for a new connection's set-up; hang up if it fails: nobody else would."""
    try:
        await set_up
    except BaseException:
        hang_up()
        raise


def _server_settings(url: URL, limits: Limits, is_patient: bool) -> dict[str, str]:
    settings = READABLE | {"jit": "off"}  # compiling takes longer than any of our statements
    if "application_name" not in url.query:
        settings["application_name"] = "dgx-music"
    statement_ms = 0 if is_patient else limits.statement_seconds * 1000
    idle_ms = 0 if is_patient else limits.idle_seconds * 1000
    settings["statement_timeout"] = f"{statement_ms:.0f}"
    # Transactions say this themselves; a statement without a transaction cannot.
    settings["default_transaction_isolation"] = "read committed"
    settings["idle_in_transaction_session_timeout"] = f"{idle_ms:.0f}"
    return settings


@cache
def _bounded_asyncpg() -> Any:
    import asyncpg

    class BoundedConnection(asyncpg.Connection):  # type: ignore[misc]  # asyncpg has no types
        """A connection that is dropped if the server does not answer; asyncpg would keep it.

        SQLAlchemy begins, pings, commits and prepares with these methods, and makes its whole pool
        anew after a lost connection. After a timeout asyncpg would first send a closing message and
        wait two seconds for the answer.
        """

        async def execute(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().execute(*arguments, **options))

        async def fetch(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().fetch(*arguments, **options))

        async def fetchrow(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().fetchrow(*arguments, **options))

        async def prepare(self, *arguments: Any, **options: Any) -> Any:
            return await self._bounded(super().prepare(*arguments, **options))

        async def close(self, *, timeout: float | None = None) -> None:
            """Say goodbye without a long wait: each of many connections would wait in turn."""
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
        """A connection that is dropped if the server does not answer.

        All waits of the driver go through ``wait``.
        """

        command_seconds: float | None = None

        async def wait(self, *arguments: Any, **options: Any) -> Any:
            """Wait for the server; hang up if it takes too long: a lost connection for libpq.

            A timeout around the wait would cancel it, and the driver would wait twice five seconds
            more.
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


_loops: WeakKeyDictionary[Any, asyncio.AbstractEventLoop] = WeakKeyDictionary()
"""Every connection of this process, and the event loop that it belongs to."""


def hang_up_ended() -> None:
    """Close the connections of closed event loops: they cannot send a closing message any more."""
    for connection in [
        connection for connection, loop in snapshot(_loops.items()) if loop.is_closed()
    ]:
        if _loops.pop(connection, None) is None:  # another thread was faster
            continue
        if hasattr(connection, "pgconn"):
            connection.pgconn.finish()
        else:
            _hang_up_asyncpg(connection)


def _hang_up_asyncpg(connection: Any) -> None:
    """Do at once what ``terminate`` leaves to the event loop, which is closed."""
    transport = connection._transport
    transport = getattr(getattr(transport, "_ssl_protocol", None), "_transport", transport)
    with suppress(Exception):  # the event loop is closed
        transport.abort()
    with suppress(Exception):
        transport._call_connection_lost(None)


def after_fork() -> list[Any]:
    """In the child: let go of the parent's sockets, forget all connections, and return them.

    From now on /dev/null is in the place of each socket, so that nothing that its owner does
    reaches the parent's server.
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
