"""Trying again what failed for a while: one loop for all that reads and writes."""

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

    ``note`` is told each error and the wait that follows in seconds; after the last of the
    ``waits`` the wait is ``None``, and the error is raised. A wait ends when the caller is
    cancelled, or when ``sleep`` returns.
    """
    for wait in chain(waits, [None]):
        try:
            return await work()
        except on as error:
            note(error, wait)
            if wait is None:
                raise
        await sleep(wait)
    raise AssertionError("unreachable")
