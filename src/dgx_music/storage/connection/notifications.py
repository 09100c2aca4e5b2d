"""Waking up by PostgreSQL's LISTEN, on a separate connection.

A notification is lost while the connection is lost, and never comes through a pooler in transaction
mode.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

from sqlalchemy import URL

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.changes import Changes, Topic
from dgx_music.storage.connection.postgres_drivers import Limits, creator
from dgx_music.storage.connection.urls import is_pooled_by_transaction

logger = logging.getLogger(__name__)

_CHECK_SECONDS = 10.0
"""After so long without a notification the connection is tested."""
_RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0)
_FOR_WORKERS = (Topic.WORK, Topic.CANCEL)


class Notifications(Changes):
    """Wakes its subscribers when PostgreSQL notifies; has a connection while there are any."""

    def __init__(self, url: URL, limits: Limits) -> None:
        super().__init__()
        self._connect = creator(url, limits, is_patient=True)
        self._answer_seconds = limits.command_seconds
        self._is_possible = not is_pooled_by_transaction(url)
        self._listen = _listen_asyncpg if url.get_driver_name() == "asyncpg" else _listen_psycopg
        self._topics: tuple[Topic, ...] = ()
        self._listening: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    def _begin(self, *, is_first: bool) -> None:
        """Listen, unless a listener runs already that hears enough; also if a former one has ended.

        Workers do not listen to the ends of generations: each of them would hear of all that the
        others complete.
        """
        wants_ends = any(each.hears(Topic.DONE) for each in self._subscriptions)
        topics = tuple(Topic) if wants_ends else _FOR_WORKERS
        is_running = self._listening is not None and not self._listening.done()
        if not self._is_possible or (is_running and {*topics} <= {*self._topics}):
            return
        self._end()
        self._topics = topics
        listen = self._listen_for_ever()
        self._listening = asyncio.create_task(listen, name="dgx-music-notifications")

    def _end(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            self._ending.add(self._listening)
            self._listening.add_done_callback(self._ending.discard)
            self._listening = None

    async def close(self) -> None:
        """Stop listening, and wait for the end of the connection."""
        self._end()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def abandon(self) -> None:
        """Forget the subscribers and the listener, whose event loop has ended.

        Its connection is closed with the others.
        """
        self._subscriptions.clear()
        self._listening = None
        self._ending.clear()

    async def _listen_for_ever(self) -> None:
        failures = 0
        while True:
            try:
                connection = await self._connect()
                failures = 0
                callbacks = self._wake_all, self._wake
                await self._listen(connection, self._topics, *callbacks, self._answer_seconds)
            except Exception as error:  # also the drivers' own
                is_told = isinstance(error, DatabaseUnavailableError)
                why = error if is_told else f"the connection was lost ({error})"
                logger.debug("notifications: %s", why)
            await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
            failures += 1

    def _wake_all(self) -> None:
        """Wake everybody: earlier notifications are not repeated."""
        for subscription in tuple(self._subscriptions):
            subscription.wake()

    def _wake(self, topic: str, key: str) -> None:
        for subscription in tuple(self._subscriptions):
            if subscription.wants(topic, key):
                subscription.wake()


Wake = Callable[[str, str], None]


async def _listen_asyncpg(
    connection: Any,
    topics: Iterable[Topic],
    start: Callable[[], None],
    wake: Wake,
    answer_seconds: float,
) -> None:
    """Listen until the connection is lost."""
    lost = asyncio.Event()

    def hear(_connection: Any, _pid: int, channel: str, key: str) -> None:
        wake(channel, key)

    connection.add_termination_listener(lambda _connection: lost.set())
    try:
        async with asyncio.timeout(answer_seconds):
            for topic in topics:
                await connection.add_listener(topic.value, hear)
        start()
        while not lost.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(lost.wait(), _CHECK_SECONDS)
            await _check(connection.execute("SELECT 1"), answer_seconds)
    finally:
        connection.terminate()


async def _listen_psycopg(
    connection: Any,
    topics: Iterable[Topic],
    start: Callable[[], None],
    wake: Wake,
    answer_seconds: float,
) -> None:
    """Listen until the connection is lost."""
    try:
        async with asyncio.timeout(answer_seconds):
            await connection.set_autocommit(True)
            for topic in topics:
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
