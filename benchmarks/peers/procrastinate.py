"""procrastinate: its connector for psycopg, LISTEN/NOTIFY, finished jobs are kept as by default."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

from procrastinate import App, PsycopgConnector

from benchmarks.contestants import PRODUCERS, Arrived, Queue, payload

CONNECTIONS = PRODUCERS + 4
"""Some more than jobs: the worker listens and keeps a heartbeat."""


class Peer(Queue):
    """See the module."""

    name = "procrastinate"

    def __init__(self, location: str) -> None:
        connector = PsycopgConnector(conninfo=location, min_size=CONNECTIONS, max_size=CONNECTIONS)
        self._app = App(connector=connector)
        self._arrived: Arrived = lambda _: None
        self._task = self._app.task(name="generate")(self._generate)

    async def _generate(self, prompt: str, **_: Any) -> None:
        self._arrived(prompt)

    @classmethod
    async def create(cls, location: str) -> None:
        queue = await cls.open(location)
        await queue._app.schema_manager.apply_schema_async()
        await queue.close()

    @classmethod
    async def open(cls, location: str) -> Self:
        queue = cls(location)
        await queue._app.open_async()
        return queue

    async def enqueue(self, prompt: str) -> None:
        await self._task.defer_async(**payload(prompt))

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        await self._task.batch_defer_async(*map(payload, prompts))

    async def work(self, slots: int, arrived: Arrived) -> None:
        self._arrived = arrived
        worker = self._app.run_worker_async(concurrency=slots, install_signal_handlers=False)
        self._worker = asyncio.create_task(worker)
        with suppress(asyncio.CancelledError):
            await self._worker

    async def stop(self) -> None:
        self._worker.cancel()  # it finishes its jobs first

    async def close(self) -> None:
        await self._app.close_async()
