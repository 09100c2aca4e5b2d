"""Waking up when the database changes, instead of asking it again and again.

A change is a hint: it may be lost, so every waiter also polls slowly. sqlite_changes.py watches a
file, notifications.py listens to a PostgreSQL server.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum

import anyio

EVERYTHING = "*"
"""The key of a hint for every subscriber of its topic."""


class Topic(StrEnum):
    """What a waiter wants to hear of; PostgreSQL's channels have these names."""

    WORK = "dgx_music_work"
    """Something of a model (the key) may be due."""
    CANCEL = "dgx_music_cancel"
    """A cancel was requested of a worker (the key)."""
    DONE = "dgx_music_done"
    """A generation (the key) was completed, failed or cancelled."""


class Subscription:
    """One waiter's view of the changes, on the event loop that made it."""

    def __init__(self, topic: Topic | None = None, keys: Collection[str] = ()) -> None:
        self._topic = topic
        self._keys = keys
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def wants(self, topic: str, key: str) -> bool:
        """Return True if this waiter wants to hear of this change."""
        is_own = not self._keys or key in self._keys or key == EVERYTHING
        return is_own and self.hears(topic)

    def hears(self, topic: str) -> bool:
        """Return True if this waiter wants to hear of any change of this kind."""
        return self._topic in (None, topic)

    def wake(self) -> None:
        """Wake the waiter; from any thread.

        Raises ``RuntimeError`` if its event loop has closed.
        """
        # Else it is about to look, and will see this change as well.
        if not self._changed.is_set() or self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self, timeout_seconds: float) -> None:
        """Wait for a change since the last call returned, at most this long."""
        with anyio.move_on_after(timeout_seconds):
            await self._changed.wait()
        self._changed.clear()


class Changes(ABC):
    """Wakes its subscribers when the database changes; watches it while there are any."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    @contextmanager
    def subscribe(
        self, topic: Topic | None = None, keys: Collection[str] = ()
    ) -> Iterator[Subscription]:
        """Give a subscription to a topic's changes while the block runs; no keys mean all."""
        subscription = Subscription(topic, keys)
        is_first = not self._subscriptions
        self._subscriptions.add(subscription)
        self._begin(is_first=is_first)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            if not self._subscriptions:
                self._end()

    @abstractmethod
    async def close(self) -> None:
        """Stop watching, and return when that is done; there are no subscribers any more."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget the subscribers, whose event loop has ended, and stop watching."""

    @abstractmethod
    def _begin(self, *, is_first: bool) -> None:
        """Watch for one more subscriber, unless the watch runs already."""

    @abstractmethod
    def _end(self) -> None:
        """Stop watching; a later subscriber begins again."""
