"""Turns for short work on the event loop, so that other tasks come between two pieces of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Turns:
    """Has pieces of work wait in line: at most one in each turn of the event loop.

    If many short clips are ready at once, the next claim is sent after the first few of them, and
    not when all are finished: the database and the worker then work at the same time.
    """

    def __init__(self) -> None:
        self._line = asyncio.Lock()  # it serves in the order of arrival

    async def do(self, work: Callable[[], T]) -> T:
        """Return what the work returns, done when all that came before is done."""
        async with self._line:
            await asyncio.sleep(0)
            return work()

    async def wait(self) -> None:
        """Return when all that is in line now is done."""
        await self.do(lambda: None)
