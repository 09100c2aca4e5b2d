"""Waking up by PostgreSQL's LISTEN, on a connection of its own; changes.py is SQLite's counterpart.

A notification is a hint: it is lost while the connection is, and never comes where there is a pooler in transaction mode.
Every waiter has a slow poll of its own behind it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import URL

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection import postgres
from dgx_music.storage.connection.changes import Subscription, Topic
from dgx_music.storage.connection.postgres import Limits
from dgx_music.storage.connection.urls import is_pooled_by_transaction

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 10.0
"""A connection that has heard nothing for so long is asked whether it lives."""
_RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0)


class Notifications:
    """Wakes its subscribers when PostgreSQL notifies; its connection is there while there are any."""

    def __init__(self, url: URL, limits: Limits) -> None:
        self._connect = postgres.creator(url, limits, is_patient=True)
        self._answer_seconds = limits.command_seconds
        self._is_possible = not is_pooled_by_transaction(url)
        self._listen = _listen_asyncpg if url.get_driver_name() == "asyncpg" else _listen_psycopg
        self._subscriptions: set[Subscription] = set()
        self._listening: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @contextmanager
    def subscribe(self, topic: Topic | None = None, keys: Collection[str] = ()) -> Iterator[Subscription]:
        """Give a subscription to the topic's hints for as long as the block runs; no keys stand for all."""
        subscription = Subscription(topic, keys)
        self._subscriptions.add(subscription)
        if self._is_possible and (self._listening is None or self._listening.done()):
            self._listening = asyncio.create_task(self._listen_for_ever(), name="dgx-music-notifications")
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            if not self._subscriptions:
                self._end()

    def _end(self) -> None:
        """Stop listening; a later subscription starts another listener."""
        if self._listening is not None:
            self._listening.cancel()
            self._ending.add(self._listening)
            self._listening.add_done_callback(self._ending.discard)
            self._listening = None

    async def close(self) -> None:
        """Wait for the end of the connection; its subscribers are gone."""
        self._end()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def abandon(self) -> None:
        """Forget a listener whose event loop has ended; its connection is hung up with the others."""
        self._subscriptions.clear()
        self._listening = None
        self._ending.clear()

    async def _listen_for_ever(self) -> None:
        failures = 0
        while True:
            try:
                connection = await self._connect()
                failures = 0
                await self._listen(connection, self._wake_all, self._wake, self._answer_seconds)
            except Exception as error:  # the drivers' own, each with causes of its own
                why = error if isinstance(error, DatabaseUnavailableError) else f"the connection was lost ({error})"
                logger.debug("notifications: %s", why)
            await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
            failures += 1

    def _wake_all(self) -> None:
        """Wake everybody: what was notified before we listened is not told again."""
        for subscription in tuple(self._subscriptions):
            subscription.wake()

    def _wake(self, topic: str, key: str) -> None:
        for subscription in tuple(self._subscriptions):
            if subscription.wants(topic, key):
                subscription.wake()


Wake = Callable[[str, str], None]


async def _listen_asyncpg(connection: Any, start: Callable[[], None], wake: Wake, answer_seconds: float) -> None:
    """Listen until the connection is lost."""
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _connection: lost.set())
    try:
        async with asyncio.timeout(answer_seconds):
            for topic in Topic:
                await connection.add_listener(topic.value, lambda _connection, _pid, channel, key: wake(channel, key))
        start()
        while not lost.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(lost.wait(), _CHECK_SECONDS)
            await _check(connection.execute("SELECT 1"), answer_seconds)
    finally:
        connection.terminate()


async def _listen_psycopg(connection: Any, start: Callable[[], None], wake: Wake, answer_seconds: float) -> None:
    """Listen until the connection is lost."""
    try:
        async with asyncio.timeout(answer_seconds):
            await connection.set_autocommit(True)
            for topic in Topic:
                await connection.execute(f"LISTEN {topic.value}")
        start()
        while True:
            async for notification in connection.notifies(timeout=_CHECK_SECONDS):
                wake(notification.channel, notification.payload)
            await _check(connection.execute("SELECT 1"), answer_seconds)
    finally:
        connection.pgconn.finish()


async def _check(answer: Awaitable[Any], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await answer
