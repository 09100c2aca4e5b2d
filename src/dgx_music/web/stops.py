"""The requests that wait for something: the end of the server ends them too."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import anyio


class Stops:
    """The scopes of all requests that wait; a server that stops would otherwise wait for them."""

    def __init__(self) -> None:
        self._scopes: set[anyio.CancelScope] = set()
        self._is_stopped = False

    @contextmanager
    def waiting(self, seconds: float) -> Iterator[None]:
        """Wait for what is done inside, at most so long, and no longer than the server serves."""
        with anyio.move_on_after(0 if self._is_stopped else seconds) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)

    @property
    def is_stopped(self) -> bool:
        """True once the server serves no longer."""
        return self._is_stopped

    def stop(self) -> None:
        """End all waits, and each later one at once."""
        self._is_stopped = True
        for scope in self._scopes:
            scope.cancel()


def is_server_stopping() -> bool:
    """Return True if uvicorn runs another application around us, and has been told to stop.

    It waits for all streams, and tells no application before they have ended. But the method that
    it has made the handler of SIGTERM leads to it.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return getattr(server, "should_exit", False) is True
