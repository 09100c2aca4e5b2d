"""Retries work that fails for a limited time. All work that returns a result uses this loop.

The listener of ``storage.connection.notifications`` has a loop of its own: its work never ends with
a result, and each connection that it makes starts its waits again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import chain, repeat
from typing import TypeVar

import anyio

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


def for_ever(*waits: float) -> Iterator[float]:
    """Return these waits in seconds, the last of them again and again."""
    return chain(waits, repeat(waits[-1]))


async def keep_trying(
    work: Callable[[], Awaitable[T]],
    *,
    on: type[E],
    waits: Iterable[float],
    note: Callable[[E, float | None], None],
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
) -> T:
    """Return what ``work`` returns; while it raises ``on``, wait and call it again.

    Each of the ``waits``, in seconds, is asked for when its error is there. ``note`` is told both;
    after the last of the ``waits`` the wait is ``None``, and the error is raised. If ``note`` itself
    raises, nothing is tried again. A wait ends when the caller is cancelled, or when ``sleep``
    returns.
    """
    remaining = iter(waits)
    while True:
        try:
            return await work()
        except on as error:
            wait = next(remaining, None)
            note(error, wait)
            if wait is None:
                raise
        await sleep(wait)
