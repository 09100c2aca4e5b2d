"""The floor on SQLite: what a good engineer writes with ``sqlite3`` alone, as little as works.

One table, one partial index, one connection, one row at a time. It leaves out what the product's
rows do: a fence against a worker that lost its lease, leases and rescue, attempts and retries,
prompts and their search, statistics, idempotency keys, priorities, cancelling, validation.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Self

from benchmarks.contestants import (
    Arrived,
    BlockingQueue,
    ClaimingQueue,
    payload_text,
    prompt_of,
)

CREATE = """
PRAGMA journal_mode = WAL;
CREATE TABLE queue (
  id INTEGER PRIMARY KEY,
  payload TEXT NOT NULL,
  status TEXT NOT NULL DEFAULT 'pending',
  run_at REAL NOT NULL DEFAULT (julianday('now')),
  claimed_by TEXT,
  finished_at REAL
);
CREATE INDEX queue_pending ON queue (run_at, id) WHERE status = 'pending';
"""
ENQUEUE = "INSERT INTO queue (payload) VALUES (?)"
CLAIM = """
UPDATE queue SET status = 'running', claimed_by = 'w' WHERE id = (
  SELECT id FROM queue WHERE status = 'pending' AND run_at <= julianday('now')
  ORDER BY run_at, id LIMIT 1
) RETURNING id, payload"""
COMPLETE = "UPDATE queue SET status = 'done', finished_at = julianday('now') WHERE id = ?"
ADD_FINISHED = """
INSERT INTO queue (payload, status, run_at, finished_at)
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
SELECT :payload, 'done', julianday('now') - i / 86400.0, julianday('now') FROM n"""


class RawSqlite(BlockingQueue, ClaimingQueue):
    """See the module."""

    name = "raw sqlite3"

    def __init__(self, path: str) -> None:
        super().__init__()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA synchronous = FULL")

    @classmethod
    async def create(cls, location: str) -> None:
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript(CREATE)

    @classmethod
    async def open(cls, location: str) -> Self:
        return cls(location)

    async def enqueue(self, prompt: str) -> None:
        with self._transaction():
            self._connection.execute(ENQUEUE, (payload_text(prompt),))

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        with self._transaction():
            self._connection.executemany(ENQUEUE, [(payload_text(prompt),) for prompt in prompts])

    def serve_one(self, arrived: Arrived) -> bool:
        row = self._claim()
        if row is None:
            return False
        arrived(prompt_of(row[1]))
        with self._transaction():
            self._connection.execute(COMPLETE, (row[0],))
        return True

    async def claim(self) -> None:
        if self._claim() is None:
            raise RuntimeError("nothing was claimed")

    async def add_finished(self, count: int) -> None:
        if not count:  # the recursive query has at least one row
            return
        with self._transaction():
            values = {"count": count, "payload": payload_text("a finished prompt of usual length")}
            self._connection.execute(ADD_FINISHED, values)
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def close(self) -> None:
        self._connection.close()

    def _claim(self) -> tuple[int, str] | None:
        with self._transaction():
            rows: list[tuple[int, str]] = self._connection.execute(CLAIM).fetchall()
        return rows[0] if rows else None

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        yield
        self._connection.execute("COMMIT")
