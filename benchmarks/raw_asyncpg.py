"""The floor on PostgreSQL: what a good engineer writes with asyncpg alone, as little as works.

One table, one partial index, prepared statements, a connection for each task, one row at a time;
COPY for many. It leaves out what the product's rows do: a fence against a worker that lost its
lease, leases and rescue, attempts and retries, prompts and their search, statistics, idempotency
keys, priorities, cancelling, validation. It notifies the worker only where pickup is measured:
commits with a notification wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import asyncpg

from benchmarks.contestants import PRODUCERS, Arrived, ClaimingQueue, payload_text, prompt_of

CREATE = """
CREATE TABLE queue (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  payload json NOT NULL,
  status text NOT NULL DEFAULT 'pending',
  run_at timestamptz NOT NULL DEFAULT now(),
  claimed_by text,
  finished_at timestamptz
);
CREATE INDEX queue_pending ON queue (run_at, id) WHERE status = 'pending';
"""
ENQUEUE = "INSERT INTO queue (payload) VALUES ($1)"
ENQUEUE_AND_WAKE = (
    f"WITH added AS ({ENQUEUE} RETURNING id) SELECT pg_notify('queue', '') FROM added"
)
# Not now(): asyncpg's prepare begins a transaction, and the first execution is still in it.
CLAIM = """
UPDATE queue SET status = 'running', claimed_by = 'w' WHERE id = (
  SELECT id FROM queue WHERE status = 'pending' AND run_at <= statement_timestamp()
  ORDER BY run_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
) RETURNING id, payload"""
COMPLETE = "UPDATE queue SET status = 'done', finished_at = now() WHERE id = $1"
STATEMENTS = (ENQUEUE, ENQUEUE_AND_WAKE, CLAIM, COMPLETE)
NEVER_VACUUM = "ALTER TABLE queue SET (autovacuum_enabled = off)"
ADD_FINISHED = """
INSERT INTO queue (payload, status, run_at, finished_at)
SELECT $2::json, 'done', now() - i * interval '1 second', now()
FROM generate_series(1, $1::integer) AS i"""


class RawAsyncpg(ClaimingQueue):
    """See the module."""

    name = "raw asyncpg"

    def __init__(self, location: str, tasks: Sequence[_Task]) -> None:
        self._location, self._tasks = location, tasks
        self._free: asyncio.Queue[_Task] = asyncio.Queue()
        for task in tasks:
            self._free.put_nowait(task)
        self._is_stopped = False

    @classmethod
    async def create(cls, location: str) -> None:
        async with connected(location) as connection:
            await connection.execute(CREATE)

    @classmethod
    async def open(cls, location: str) -> Self:
        return cls(location, [await _Task.connect(location) for _ in range(PRODUCERS)])

    async def enqueue(self, prompt: str) -> None:
        task = await self._free.get()
        await task.enqueue.fetch(payload_text(prompt))
        self._free.put_nowait(task)

    async def enqueue_and_wake(self, prompt: str) -> None:
        await self._tasks[0].enqueue_and_wake.fetch(payload_text(prompt))

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        rows = [(payload_text(prompt),) for prompt in prompts]
        connection = self._tasks[0].connection
        await connection.copy_records_to_table("queue", records=rows, columns=["payload"])

    async def work(self, slots: int, arrived: Arrived) -> None:
        async with connected(self._location) as listener:
            await listener.add_listener("queue", lambda *_: self._wake())
            await asyncio.gather(*[self._serve(task, arrived) for task in self._tasks[:slots]])

    async def _serve(self, task: _Task, arrived: Arrived) -> None:
        while not self._is_stopped:
            task.woken.clear()
            if not await task.serve_one(arrived):
                await task.woken.wait()

    def _wake(self) -> None:
        for task in self._tasks:
            task.woken.set()

    async def stop(self) -> None:
        self._is_stopped = True
        self._wake()

    async def claim(self) -> None:
        if not await self._tasks[0].claim.fetch():
            raise RuntimeError("nothing was claimed")

    async def add_finished(self, count: int) -> None:
        connection = self._tasks[0].connection
        await connection.execute(NEVER_VACUUM)
        await connection.execute(ADD_FINISHED, count, payload_text("a finished prompt"))

    async def close(self) -> None:
        for task in self._tasks:
            await task.connection.close()


@dataclass
class _Task:
    """One connection and its prepared statements."""

    connection: Any
    enqueue: Any
    enqueue_and_wake: Any
    claim: Any
    complete: Any
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def connect(cls, location: str) -> _Task:
        connection = await asyncpg.connect(location, server_settings={"jit": "off"})
        statements = [await connection.prepare(text) for text in STATEMENTS]
        return cls(connection, *statements)

    async def serve_one(self, arrived: Arrived) -> bool:
        """Claim one row and complete it; return False if there is none."""
        row = await self.claim.fetchrow()
        if row is None:
            return False
        arrived(prompt_of(row["payload"]))
        await self.complete.fetch(row["id"])
        return True


@asynccontextmanager
async def connected(location: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(location)
    yield connection
    await connection.close()
