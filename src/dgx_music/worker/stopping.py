"""How the worker stops, and the waits that a stop ends."""

from __future__ import annotations

import logging

import anyio

from dgx_music.errors import DgxMusicError
from dgx_music.storage.connection.changes import Subscription

logger = logging.getLogger(__name__)


class Stopping:
    """Whether the worker is to stop, how soon, and because of which error."""

    def __init__(self, worker_id: str) -> None:
        self.error: DgxMusicError | None = None
        """Why the worker gave up; ``None`` if it did not."""
        self._worker_id = worker_id
        self._requested = anyio.Event()
        self._urgent = anyio.Event()
        self._scope: anyio.CancelScope | None = None
        self._changes: Subscription | None = None

    @property
    def is_requested(self) -> bool:
        """True from the first request on: nothing more is claimed."""
        return self._requested.is_set()

    @property
    def is_urgent(self) -> bool:
        """True from the second request on: what still runs is released at once."""
        return self._urgent.is_set()

    def request(self) -> None:
        """Request a stop; a second request makes it urgent."""
        if self._requested.is_set():
            self._urgent.set()
        self._requested.set()
        if self._scope is not None:
            self._scope.cancel()
        self.wake()

    def give_up(self, error: DgxMusicError) -> None:
        """Stop because of an error that every generation would meet; the first one counts."""
        if self.error is None:
            logger.error("worker %s: stops: %s", self._worker_id, error)
            self.error = error
            if not self.is_requested:
                self.request()

    def cancel_on_stop(self, scope: anyio.CancelScope) -> None:
        """Have the next stop cancel this scope."""
        self._scope = scope

    def listen_to(self, changes: Subscription) -> None:
        """End ``wait_for_change`` also when this subscription hears of a change."""
        self._changes = changes

    def wake(self) -> None:
        """End ``wait_for_change``: a slot has become free, or the worker stops."""
        if self._changes is not None:
            self._changes.wake()

    async def wait(self, seconds: float) -> None:
        """Wait for a stop, at most this long."""
        with anyio.move_on_after(seconds):
            await self._requested.wait()

    async def wait_for_change(self, seconds: float) -> None:
        """Wait for a change of the database, a free slot or a stop, at most this long."""
        if self._changes is not None:
            await self._changes.wait(seconds)
