"""The floor on PostgreSQL: asyncpg, ten connections, prepared statements.

The triggers of the tables run for both, ours and the floor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg

from benchmarks.floor import MODEL, audio_facts
from dgx_music.storage.models import text_hash
from dgx_music.storage.schema import new_id

CONNECTIONS = 10

COUNT_PROMPT = """
INSERT INTO prompts (text, text_hash, used_count) VALUES ($1, $2, 1)
ON CONFLICT (text_hash) DO UPDATE
SET used_count = prompts.used_count + excluded.used_count, last_used_at = clock_timestamp()
RETURNING id"""
ENQUEUE = """
INSERT INTO generations (id, prompt, prompt_id, model_name, duration_seconds, sample_rate,
  channels, sampling, request_hash, status) VALUES ($1, $2, $3, $4, 0.08, 32000, 1, '{}', $5, 'pending')
ON CONFLICT (idempotency_key) DO NOTHING RETURNING *"""
ENQUEUE_MANY = """
WITH wanted AS (
  SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted (id, prompt, hash)
),
counted AS (
  INSERT INTO prompts (text, text_hash, used_count)
  SELECT prompt, hash, 1 FROM wanted ORDER BY prompt
  ON CONFLICT (text_hash) DO UPDATE
  SET used_count = prompts.used_count + excluded.used_count, last_used_at = clock_timestamp()
  RETURNING id, text_hash
)
INSERT INTO generations (id, prompt, prompt_id, model_name, duration_seconds, sample_rate,
  channels, sampling, request_hash, status)
SELECT wanted.id, prompt, counted.id, $4, 0.08, 32000, 1, '{}', hash, 'pending'
FROM wanted JOIN counted ON text_hash = hash
ON CONFLICT (idempotency_key) DO NOTHING RETURNING *"""
CLAIM = """
WITH chosen AS MATERIALIZED (
  SELECT id FROM generations
  WHERE status = 'pending' AND model_name = $1 AND run_at <= clock_timestamp()
  AND NOT EXISTS (SELECT 1 FROM pauses WHERE model_name IN ($1, '*'))
  ORDER BY (
    extract(epoch FROM (run_at - timestamptz '2000-01-01 00:00:00+00'))::double precision
    - priority * 60
  ), id
  LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE generations SET
  status = 'processing', attempt = attempt + 1, worker_id = 'raw', progress = 0,
  started_at = clock_timestamp(), lease_expires_at = clock_timestamp() + interval '30 seconds'
FROM chosen WHERE generations.id = chosen.id AND status = 'pending'
RETURNING generations.id, attempt, prompt, model_name, duration_seconds, sample_rate, channels,
  sampling, failures"""
ADD_ATTEMPT = "INSERT INTO attempts (generation_id, attempt, worker_id) VALUES ($1, $2, 'raw')"
COMPLETE = """
UPDATE generations SET status = 'completed', completed_at = clock_timestamp(), worker_id = NULL,
  lease_expires_at = NULL, progress = 1, error_message = NULL, file_path = 'memory',
  file_size_bytes = 1,
  sha256 = 'x', model_version = 'noop', generation_time_seconds = 0,
  metadata = coalesce(metadata, '{}') || jsonb_build_object('audio', $3::jsonb)
WHERE id = $1 AND attempt = $2 AND status = 'processing' AND worker_id IS NOT NULL
AND NOT cancel_requested"""
END_ATTEMPT = """
UPDATE attempts SET finished_at = clock_timestamp(), outcome = 'completed', device_seconds = 0
WHERE generation_id = $1 AND attempt = $2 AND outcome IS NULL"""
ADD_FINISHED = """
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, status,
  created_at, run_at, attempt, completed_at, file_path)
SELECT lpad(i::text, 36, '0'), 'a finished prompt of usual length, ' || i, $2, 10, 32000, 1,
  'completed', t, t, 1, t, '/audio/' || i
FROM (
  SELECT i, clock_timestamp() - i * interval '1 second' AS t
  FROM generate_series(1, $1::integer) AS i
) AS n"""


class AsyncpgFloor:
    """See ``Floor``."""

    def __init__(self, connections: list[Any]) -> None:
        self._connections = connections
        self._slots = [asyncio.create_task(_Slot.prepare(connection)) for connection in connections]

    @classmethod
    async def connect(cls, url: str) -> AsyncpgFloor:
        """Return the floor, with open connections and prepared statements."""
        settings = {"jit": "off"}
        floor = cls(
            [await asyncpg.connect(url, server_settings=settings) for _ in range(CONNECTIONS)]
        )
        await asyncio.gather(*floor._slots)
        return floor

    async def enqueue(self, prompts: Sequence[str]) -> None:
        slot = await self._slots[0]
        for prompt in prompts:
            await slot.enqueue(prompt)

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        hashes = [text_hash(prompt) for prompt in prompts]
        await self._connections[0].fetch(
            ENQUEUE_MANY, [new_id() for _ in prompts], prompts, hashes, MODEL
        )

    async def claim(self) -> bool:
        return await (await self._slots[0]).claim() is not None

    async def drain(self) -> None:
        facts = audio_facts()
        await asyncio.gather(*[(await slot).drain(facts) for slot in self._slots])

    async def pick_up(self, arrived: Callable[[str], None]) -> None:
        """Wait for notifications and claim one row at a time, for ever.

        ``arrived`` gets the id of each row after its claim is committed.
        """
        slot, told = await self._slots[0], asyncio.Event()
        await self._connections[1].add_listener("dgx_music_work", lambda *_: told.set())
        while True:
            while (lease := await slot.claim()) is not None:
                arrived(lease[0])
            await told.wait()
            told.clear()

    async def add_finished(self, count: int) -> None:
        await self._connections[0].execute(ADD_FINISHED, count, MODEL)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()


class _Slot:
    """One connection and its prepared statements."""

    def __init__(self, connection: Any, statements: list[Any]) -> None:
        self._connection = connection
        self._count, self._enqueue, self._claim, self._add, self._complete, self._end = statements

    @classmethod
    async def prepare(cls, connection: Any) -> _Slot:
        texts = (COUNT_PROMPT, ENQUEUE, CLAIM, ADD_ATTEMPT, COMPLETE, END_ATTEMPT)
        return cls(connection, [await connection.prepare(text) for text in texts])

    async def enqueue(self, prompt: str) -> None:
        hashed = text_hash(prompt)
        async with self._connection.transaction():
            prompt_id = await self._count.fetchval(prompt, hashed)
            await self._enqueue.fetchrow(new_id(), prompt, prompt_id, MODEL, hashed)

    async def claim(self) -> tuple[str, int] | None:
        async with self._connection.transaction():
            row = await self._claim.fetchrow(MODEL)
            if row is None:
                return None
            await self._add.fetch(row["id"], row["attempt"])
        return row["id"], row["attempt"]

    async def drain(self, facts: str) -> None:
        while (lease := await self.claim()) is not None:
            async with self._connection.transaction():
                await self._complete.fetch(*lease, facts)
                await self._end.fetch(*lease)
