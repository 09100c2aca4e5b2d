"""Waking up when the database changes, instead of asking it over and over.

SQLite has no notifications between processes, but ``PRAGMA data_version`` tells whether another connection has committed:
it reads shared memory, takes microseconds and no lock. One thread looks at it eighty times a second, on a connection of
its own, and wakes whoever waits. It is a hint: every waiter has a slow poll of its own behind it.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio

_LOOK_EVERY_SECONDS = 0.0125
_LOOK_AGAIN_SECONDS = 1.0


class Subscription:
    """One waiter's view of the changes, on the event loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()

    def wake(self) -> None:
        """Wake the waiter; from any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    async def wait(self, timeout_seconds: float) -> None:
        """Wait for a change since the last call returned, at most this long."""
        with anyio.move_on_after(timeout_seconds):
            await self._changed.wait()
        self._changed.clear()


class Changes:
    """Wakes its subscribers after each commit to a SQLite file; its thread runs while there are any.

    Where there is no file to watch (``path`` is ``None``), nobody is woken and the subscribers' polls are all there is.
    """

    def __init__(self, path: Path | None) -> None:
        self._uri = None if path is None else path.absolute().as_uri()
        self._subscriptions: set[Subscription] = set()
        self._stop = threading.Event()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Give a subscription for as long as the block runs."""
        subscription = Subscription()
        if not self._subscriptions and self._uri is not None:
            self._start()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
            if not self._subscriptions:
                self._stop.set()

    def _start(self) -> None:
        self._stop.set()  # a former thread may still run, if its last subscriber's event loop was closed
        self._stop = threading.Event()
        threading.Thread(target=self._watch, args=(self._stop,), name="dgx-music-changes", daemon=True).start()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                self._watch_connection(stop)
            except sqlite3.Error:  # the file is gone or cannot be read for a moment
                stop.wait(_LOOK_AGAIN_SECONDS)

    def _watch_connection(self, stop: threading.Event) -> None:
        connection = sqlite3.connect(f"{self._uri}?mode=ro", uri=True, isolation_level=None)
        try:
            seen, cursor = -1, connection.cursor()
            while not stop.is_set():
                time.sleep(_LOOK_EVERY_SECONDS)  # costs a fifth of what waiting for the event would
                version = cursor.execute("PRAGMA data_version").fetchone()[0]
                if version != seen:
                    seen = version
                    self._wake_all()
        finally:
            connection.close()

    def _wake_all(self) -> None:
        for subscription in tuple(self._subscriptions):
            try:
                subscription.wake()
            except RuntimeError:  # its event loop has closed
                self._subscriptions.discard(subscription)
