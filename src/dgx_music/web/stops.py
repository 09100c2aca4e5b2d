"""The requests that wait for something: the end of the server ends them too."""

from __future__ import annotations

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

    def stop(self) -> None:
        """End all waits, and each later one at once."""
        self._is_stopped = True
        for scope in self._scopes:
            scope.cancel()
