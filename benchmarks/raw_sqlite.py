"""The floor on SQLite: ``sqlite3``, one connection."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.floor import MODEL, audio_facts
from dgx_music.storage.models import text_hash
from dgx_music.storage.schema import new_id

NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
LEASE_END = "(strftime('%Y-%m-%d %H:%M:%f', 'now', '30.0 seconds') || '000')"

COUNT_PROMPT = (
    "INSERT INTO prompts (text, text_hash, used_count) VALUES (?, ?, 1)"
    " ON CONFLICT (text_hash) DO UPDATE"
    f" SET used_count = prompts.used_count + excluded.used_count, last_used_at = {NOW} RETURNING id"
)
ENQUEUE = (
    "INSERT INTO generations (id, prompt, prompt_id, model_name, duration_seconds, sample_rate,"
    " channels, sampling, request_hash, status) VALUES (?, ?, ?, ?, 0.08, 32000, 1, '{}', ?, 'pending')"
    " ON CONFLICT (idempotency_key) DO NOTHING RETURNING *"
)
CLAIM = (
    "WITH chosen AS MATERIALIZED (SELECT id FROM generations"
    " WHERE status = 'pending' AND model_name = ?"
    f" AND +run_at <= {NOW} AND NOT EXISTS (SELECT 1 FROM pauses WHERE model_name IN (?, '*'))"
    " ORDER BY (julianday(run_at) * 86400.0 - priority * 60), id LIMIT 1)"
    " UPDATE generations SET"
    " status = 'processing', attempt = attempt + 1, worker_id = 'raw', progress = 0,"
    f" started_at = {NOW}, lease_expires_at = {LEASE_END} FROM chosen"
    " WHERE generations.id = chosen.id AND status = 'pending'"
    " RETURNING generations.id, attempt, prompt, model_name, duration_seconds, sample_rate,"
    " channels, sampling, failures"
)
ADD_ATTEMPT = "INSERT INTO attempts (generation_id, attempt, worker_id) VALUES (?, ?, 'raw')"
COMPLETE = (
    f"UPDATE generations SET status = 'completed', completed_at = {NOW}, worker_id = NULL,"
    " lease_expires_at = NULL, progress = 1, error_message = NULL, file_path = 'memory', file_size_bytes = 1, sha256 = 'x',"
    " model_version = 'noop', generation_time_seconds = 0,"
    " metadata = json_set(coalesce(metadata, '{}'), '$.' || 'audio', json(?))"
    " WHERE id = ? AND attempt = ? AND status = 'processing' AND worker_id IS NOT NULL"
    " AND NOT cancel_requested"
)
END_ATTEMPT = (
    f"UPDATE attempts SET finished_at = {NOW}, outcome = 'completed', device_seconds = 0"
    " WHERE generation_id = ? AND attempt = ? AND outcome IS NULL"
)
ADD_FINISHED = (
    "INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels,"
    " status, created_at, run_at, attempt, completed_at, file_path)"
    " WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
    " SELECT printf('%036d', i), 'a finished prompt of usual length, ' || i, :model, 10, 32000, 1,"
    " 'completed', t, t, 1, t, '/audio/' || i FROM ("
    "SELECT i, strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || (i % 31536000) || ' seconds') || '000'"
    " AS t FROM n)"
)


class SqliteFloor:
    """See ``Floor``."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        self._connection.execute("PRAGMA synchronous = FULL")
        self._connection.execute("PRAGMA foreign_keys = ON")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        yield
        self._connection.execute("COMMIT")

    async def enqueue(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            with self._transaction():
                self._enqueue(prompt)

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        with self._transaction():
            for prompt in prompts:
                self._enqueue(prompt)

    def _enqueue(self, prompt: str) -> None:
        hashed = text_hash(prompt)
        prompt_id = self._connection.execute(COUNT_PROMPT, (prompt, hashed)).fetchall()[0][0]
        self._connection.execute(ENQUEUE, (new_id(), prompt, prompt_id, MODEL, hashed)).fetchall()

    async def claim(self) -> bool:
        return self._claim() is not None

    def _claim(self) -> tuple[str, int] | None:
        with self._transaction():
            rows = self._connection.execute(CLAIM, (MODEL, MODEL)).fetchall()
            if not rows:
                return None
            lease = (rows[0][0], rows[0][1])
            self._connection.execute(ADD_ATTEMPT, lease)
        return lease

    async def drain(self) -> None:
        facts = audio_facts()
        while (lease := self._claim()) is not None:
            with self._transaction():
                self._connection.execute(COMPLETE, (facts, *lease))
                self._connection.execute(END_ATTEMPT, lease)

    async def add_finished(self, count: int) -> None:
        with self._transaction():
            self._connection.execute(ADD_FINISHED, {"count": count, "model": MODEL})
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    async def close(self) -> None:
        self._connection.close()
