"""dgx-music as a contestant: its public functions and its real worker, with a no-op engine."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import Self

import asyncpg

from benchmarks.contestants import DURATION, MODEL, Arrived, ClaimingQueue
from benchmarks.worker import NoopEngine, noop_worker
from dgx_music import Database, close_db, enqueue, enqueue_many, init_db
from dgx_music.garbage import spare_collections
from dgx_music.storage import queue

ADD_FINISHED_SQLITE = """
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels,
  status, created_at, run_at, attempt, completed_at, file_path)
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
SELECT printf('%036d', i), 'a finished prompt of usual length, ' || i, :model, 10, 32000, 1,
  'completed', t, t, 1, t, '/audio/' || i
FROM (
  SELECT i, strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || (i % 31536000) || ' seconds') || '000' AS t
  FROM n
)"""
ADD_FINISHED_POSTGRES = """
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, status,
  created_at, run_at, attempt, completed_at, file_path)
SELECT lpad(i::text, 36, '0'), 'a finished prompt of usual length, ' || i, $2, 10, 32000, 1,
  'completed', t, t, 1, t, '/audio/' || i
FROM (
  SELECT i, clock_timestamp() - i * interval '1 second' AS t
  FROM generate_series(1, $1::integer) AS i
) AS n"""
NEVER_VACUUM = "ALTER TABLE generations SET (autovacuum_enabled = off)"


class DgxMusic(ClaimingQueue):
    """The product, on SQLite or through asyncpg.

    The default database, of the queue that was opened last, is for ``enqueue``; the worker and the
    claims have one of their own.
    """

    name = "dgx-music"
    driver = "asyncpg"

    def __init__(self, location: str) -> None:
        self._location = location
        self._database = Database(self.url(location))

    @classmethod
    async def create(cls, location: str) -> None:
        database = Database(cls.url(location))
        await database.migrate()
        await database.dispose()

    @classmethod
    async def open(cls, location: str) -> Self:
        await init_db(cls.url(location))
        return cls(location)

    @classmethod
    def url(cls, location: str) -> str:
        _, is_url, server = location.partition("://")
        return f"postgresql+{cls.driver}://{server}" if is_url else f"sqlite:///{location}"

    async def enqueue(self, prompt: str) -> None:
        await enqueue(prompt, duration=DURATION, model=MODEL)

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        await enqueue_many(prompts, duration=DURATION, model=MODEL)

    async def work(self, slots: int, arrived: Arrived) -> None:
        self._worker = noop_worker(self._database, NoopEngine(slots, arrived))
        spare_collections()  # as the command does
        await self._worker.run()

    async def stop(self) -> None:
        self._worker.stop()

    async def close(self) -> None:
        await self._database.dispose()
        await close_db()

    async def claim(self) -> None:
        async with self._database.session() as session:
            if not await queue.claim(
                session, worker_id="w", model_name=MODEL, limit=1, lease_seconds=30
            ):
                raise RuntimeError("nothing was claimed")

    async def add_finished(self, count: int) -> None:
        if self._database.is_embedded:
            _add_finished_to_file(self._location, count)
        else:
            await _add_finished_to_server(self._location, count)


class DgxMusicThroughPsycopg(DgxMusic):
    """The product through psycopg."""

    name = "dgx-music, psycopg"
    driver = "psycopg"


class DgxMusicWithKeys(DgxMusic):
    """The product, each request with an idempotency key."""

    name = "dgx-music, with keys"

    async def enqueue(self, prompt: str) -> None:
        await enqueue(prompt, duration=DURATION, model=MODEL, idempotency_key=prompt)

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        requests = [{"prompt": prompt, "idempotency_key": prompt} for prompt in prompts]
        await enqueue_many(requests, duration=DURATION, model=MODEL)


def _add_finished_to_file(path: str, count: int) -> None:
    if not count:  # the recursive query has at least one row
        return
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(ADD_FINISHED_SQLITE, {"count": count, "model": MODEL})
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


async def _add_finished_to_server(url: str, count: int) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(NEVER_VACUUM)
    await connection.execute(ADD_FINISHED_POSTGRES, count, MODEL)
    await connection.close()
