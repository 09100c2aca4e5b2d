"""huey's SqliteHuey with its consumer of threads: a thread for each slot, fsync on.

It deletes a job when it claims it, so a crash loses the job; it looks for jobs as often as the
other libraries on SQLite instead of ten times a second.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Self

from huey import SqliteHuey

from benchmarks.contestants import DURATION, MODEL, POLL_SECONDS, Arrived, Queue

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Peer(Queue):
    """See the module."""

    name = "huey"
    has_bulk = False

    def __init__(self, path: str) -> None:
        self._huey = SqliteHuey(filename=path, fsync=True)
        self._arrived: Arrived = lambda _: None
        self._task = self._huey.task(name="generate")(self._generate)
        self._ended = asyncio.Event()

    def _generate(self, prompt: str, model: str, duration: float) -> None:
        self._arrived(prompt)

    @classmethod
    async def create(cls, location: str) -> None:
        await (await cls.open(location)).close()

    @classmethod
    async def open(cls, location: str) -> Self:
        return cls(location)

    async def enqueue(self, prompt: str) -> None:
        self._task(prompt, MODEL, DURATION)

    async def work(self, slots: int, arrived: Arrived) -> None:
        self._arrived = arrived
        consumer = self._huey.create_consumer(
            workers=slots,
            periodic=False,
            initial_delay=POLL_SECONDS,
            max_delay=POLL_SECONDS,
            check_worker_health=False,
        )
        before = {number: signal.getsignal(number) for number in SIGNALS}
        consumer.start()
        for number, handler in before.items():  # the consumer would take Ctrl+C for itself
            signal.signal(number, handler)
        await self._ended.wait()
        await asyncio.to_thread(consumer.stop, graceful=True)

    async def stop(self) -> None:
        self._ended.set()

    async def close(self) -> None:
        self._huey.storage.close()
