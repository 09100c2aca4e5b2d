"""saq's queue on PostgreSQL: psycopg, a pool without a check of each connection it lends."""

from __future__ import annotations

import logging
from typing import Any, Self

from psycopg_pool import AsyncConnectionPool
from saq import Worker
from saq.queue.postgres import PostgresQueue

from benchmarks.contestants import PRODUCERS, Arrived, Queue, payload

CONNECTIONS = PRODUCERS + 4
"""Some more than jobs: the worker listens."""

logging.getLogger("saq").setLevel(logging.ERROR)  # it warns of idle slots at each stop


class Peer(Queue):
    """See the module."""

    name = "saq"
    has_bulk = False

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    @classmethod
    async def create(cls, location: str) -> None:
        await (await cls.open(location)).close()

    @classmethod
    async def open(cls, location: str) -> Self:
        pool = AsyncConnectionPool(
            location, min_size=CONNECTIONS, max_size=CONNECTIONS, open=False, kwargs={}
        )
        sizes = {"min_size": CONNECTIONS, "max_size": CONNECTIONS}
        queue = PostgresQueue(pool, manage_pool_lifecycle=True, **sizes)
        await queue.connect()
        return cls(queue)

    async def enqueue(self, prompt: str) -> None:
        await self._queue.enqueue("generate", **payload(prompt))

    async def work(self, slots: int, arrived: Arrived) -> None:
        async def generate(_: Any, *, prompt: str, **__: Any) -> None:
            arrived(prompt)

        self._worker = Worker(
            self._queue, [("generate", generate)], concurrency=slots, shutdown_grace_period_s=1
        )
        await self._worker.start()

    async def stop(self) -> None:
        self._worker.event.set()

    async def close(self) -> None:
        await self._queue.disconnect()
