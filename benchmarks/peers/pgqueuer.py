"""pgqueuer: a pool of asyncpg for producers, one connection for the worker, durable tables.

It claims in batches and writes completions in batches, of as many as there are slots. A cap on
running jobs must be at least two batches, so it has up to twice the slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import asyncpg
from pgqueuer import AsyncpgDriver, AsyncpgPoolDriver, Job, Queries, QueueManager

from benchmarks.contestants import PRODUCERS, Arrived, Queue, payload_text, prompt_of

ENTRYPOINT = "generate"


class Peer(Queue):
    """See the module."""

    name = "pgqueuer"

    def __init__(self, pool: Any, connection: Any) -> None:
        self._pool, self._connection = pool, connection
        self._queries = Queries(AsyncpgPoolDriver(pool))
        self._manager = QueueManager(Queries(AsyncpgDriver(connection)))

    @classmethod
    async def create(cls, location: str) -> None:
        connection = await asyncpg.connect(location)
        await Queries(AsyncpgDriver(connection)).install()
        await connection.close()

    @classmethod
    async def open(cls, location: str) -> Self:
        pool = await asyncpg.create_pool(location, min_size=PRODUCERS, max_size=PRODUCERS)
        return cls(pool, await asyncpg.connect(location))

    async def enqueue(self, prompt: str) -> None:
        await self._queries.enqueue(ENTRYPOINT, payload_text(prompt).encode())

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        count = len(prompts)
        payloads = [payload_text(prompt).encode() for prompt in prompts]
        await self._queries.enqueue([ENTRYPOINT] * count, payloads, [0] * count)

    async def work(self, slots: int, arrived: Arrived) -> None:
        async def generate(job: Job) -> None:
            arrived(prompt_of(job.payload or b""))

        self._manager.entrypoint(ENTRYPOINT)(generate)
        await self._manager.run(batch_size=slots, max_concurrent_tasks=2 * slots)

    async def stop(self) -> None:
        self._manager.shutdown.set()

    async def close(self) -> None:
        await self._pool.close()
        await self._connection.close()
