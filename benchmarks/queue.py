"""Measures the queue on SQLite beside the floor: raw ``sqlite3`` doing the same statements with the same durability.

    python benchmarks/queue.py            everything, a few minutes; prints a Markdown table
    python benchmarks/queue.py --quick    smaller numbers, to see that it runs

Ours and the floor alternate in every round of one run, each on a fresh database in the same folder; the table shows medians.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: our name would hide the standard library's queue

import argparse
import asyncio
import json
import os
import platform
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sqlalchemy
from rich.console import Console
from sqlalchemy import event

from dgx_music import audio, enqueue, enqueue_many
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.config import load_settings
from dgx_music.inference.engine import Audio, GenerationRequest
from dgx_music.inference.process import EngineInfo
from dgx_music.storage import queue
from dgx_music.storage.database import Database
from dgx_music.storage.models import text_hash
from dgx_music.storage.schema import new_id
from dgx_music.worker import Worker

MODEL = "musicgen-small"
SLOTS = 16
NOW = "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"
LEASE_END = "(strftime('%Y-%m-%d %H:%M:%f', 'now', '30.0 seconds') || '000')"
SILENCE = Audio(np.zeros((1, 2_560), dtype=np.float32), 32_000)
console = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """How much to measure."""

    rounds: int
    one_by_one: int
    bulk: int
    drain: int
    pickups: int
    claims: int
    kept: tuple[int, ...]
    idle_seconds: float


FULL = Size(5, 300, 2_000, 1_500, 100, 60, (0, 100_000, 1_000_000), 20.0)
QUICK = Size(2, 50, 200, 200, 20, 20, (0, 10_000), 3.0)


class NoopEngine:
    """Stands in for the engine's process: 80 ms of silence, at once. ``arrived_at`` is when the last generation got here."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.arrived_at = 0.0

    async def start(self) -> EngineInfo:
        """Say what the engine is."""
        return EngineInfo(slots=SLOTS, device="none", model_version="noop", notice=None, pid=os.getpid())

    async def generate(self, request: GenerationRequest, on_progress: Callable[[float], None]) -> Audio:
        """Return silence."""
        self.arrived_at = time.perf_counter()
        self.arrived.set()
        return SILENCE

    async def close(self) -> None:
        """Do nothing."""


# ------------------------------------------------------------------------------------------------- the floor, raw sqlite3


def raw_connection(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def raw_transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("COMMIT")


def raw_enqueue(connection: sqlite3.Connection, prompt: str) -> str:
    generation_id = new_id()
    prompt_id = connection.execute(
        "INSERT INTO prompts (text, text_hash, used_count) VALUES (?, ?, 1) ON CONFLICT (text_hash) DO UPDATE"
        f" SET used_count = prompts.used_count + excluded.used_count, last_used_at = {NOW} RETURNING id",
        (prompt, text_hash(prompt)),
    ).fetchall()[0][0]
    connection.execute(
        "INSERT INTO generations (id, prompt, prompt_id, model_name, duration_seconds, sample_rate, channels, sampling,"
        " request_hash, status) VALUES (?, ?, ?, ?, 0.08, 32000, 1, '{}', ?, 'pending')"
        " ON CONFLICT (idempotency_key) DO NOTHING RETURNING *",
        (generation_id, prompt, prompt_id, MODEL, text_hash(prompt)),
    ).fetchall()
    return generation_id


def raw_claim(connection: sqlite3.Connection) -> tuple[str, int] | None:
    rows = connection.execute(
        "WITH chosen AS MATERIALIZED (SELECT id FROM generations WHERE status = 'pending' AND model_name = ?"
        f" AND run_at <= {NOW} ORDER BY priority DESC, run_at, id LIMIT 1)"
        " UPDATE generations SET status = 'processing', attempt = attempt + 1, worker_id = 'raw', progress = 0,"
        f" started_at = {NOW}, lease_expires_at = {LEASE_END} WHERE id IN (SELECT id FROM chosen)"
        " AND status = 'pending' RETURNING id, attempt, prompt, duration_seconds, sampling",
        (MODEL,),
    ).fetchall()
    if not rows:
        return None
    lease = (rows[0][0], rows[0][1])
    connection.execute("INSERT INTO attempts (generation_id, attempt, worker_id) VALUES (?, ?, 'raw')", lease)
    return lease


def raw_complete(connection: sqlite3.Connection, lease: tuple[str, int], facts: str) -> None:
    connection.execute(
        f"UPDATE generations SET status = 'completed', completed_at = {NOW}, worker_id = NULL, lease_expires_at = NULL,"
        " progress = 1, error_message = NULL, file_path = 'memory', file_size_bytes = 1, sha256 = 'x',"
        " model_version = 'noop', generation_time_seconds = 0,"
        " metadata = json_set(coalesce(metadata, '{}'), '$.' || 'audio', json(?))"
        " WHERE id = ? AND attempt = ? AND status = 'processing' AND NOT cancel_requested",
        (facts, *lease),
    )
    connection.execute(
        f"UPDATE attempts SET finished_at = {NOW}, outcome = 'completed', device_seconds = 0"
        " WHERE generation_id = ? AND attempt = ? AND outcome IS NULL",
        lease,
    )


def raw_drain(path: Path) -> None:
    """Claim and complete, one row at a time; what a row learns of its audio is made once, so that it costs nothing here."""
    connection = raw_connection(path)
    finished = audio.finish(SILENCE, sample_rate=32_000, channels=1, audio_format="wav", loudness="lufs")
    facts = json.dumps(finished.facts)
    while True:
        with raw_transaction(connection):
            lease = raw_claim(connection)
        if lease is None:
            break
        with raw_transaction(connection):
            raw_complete(connection, lease, facts)
    connection.close()


# ----------------------------------------------------------------------------------------------------------- measurements


async def fresh(folder: Path) -> Database:
    database = Database(f"sqlite:///{folder / new_id()}.db")
    await database.migrate()
    return database


def file_of(database: Database) -> Path:
    if database.path is None:
        raise ValueError("the benchmark needs a file")
    return database.path


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


async def measure_enqueue(folder: Path, count: int) -> tuple[float, float]:
    """Return enqueues per second, one transaction each: ours and raw."""
    database = await fresh(folder)
    started = time.perf_counter()
    for number in range(count):
        async with database.session() as session:
            await enqueue(f"prompt {number}", duration=0.08, model=MODEL, session=session)
    ours = count / (time.perf_counter() - started)
    await database.dispose()

    connection = raw_connection(file_of(database))

    def raw() -> None:
        for number in range(count):
            with raw_transaction(connection):
                raw_enqueue(connection, f"raw prompt {number}")

    floor = count / seconds(raw)
    connection.close()
    return ours, floor


async def measure_bulk(folder: Path, count: int) -> tuple[float, float]:
    """Return enqueues per second, all in one transaction: ours and raw."""
    database = await fresh(folder)
    requests = [f"prompt {number}" for number in range(count)]
    started = time.perf_counter()
    async with database.session() as session:
        await enqueue_many(requests, duration=0.08, model=MODEL, session=session)
    ours = count / (time.perf_counter() - started)
    await database.dispose()

    connection = raw_connection(file_of(database))

    def raw() -> None:
        with raw_transaction(connection):
            for number in range(count):
                raw_enqueue(connection, f"raw prompt {number}")

    floor = count / seconds(raw)
    connection.close()
    return ours, floor


async def measure_drain(folder: Path, count: int) -> tuple[float, float]:
    """Return generations per second through the real worker with 16 slots, and raw one row at a time."""
    settings = load_settings(model=MODEL, engine="tone", slots=SLOTS)
    databases = [await fresh(folder), await fresh(folder)]
    for database in databases:
        async with database.session() as session:
            await enqueue_many([f"prompt {n}" for n in range(count)], duration=0.08, model=MODEL, session=session)
    worker = Worker(databases[0], NoopEngine(), MemoryArtifacts(), settings)
    started = time.perf_counter()
    await worker.run(drain=True)
    ours = count / (time.perf_counter() - started)
    floor = count / seconds(lambda: raw_drain(file_of(databases[1])))
    for database in databases:
        async with database.session(read_only=True) as session:
            left = await queue.has_work(session, MODEL)
        await database.dispose()
        if left:
            raise RuntimeError("the drain left work behind")
    return ours, floor


async def measure_pickup(folder: Path, count: int, rng: random.Random) -> list[float]:
    """Return milliseconds from a producer's commit to the engine's start, for an idle worker."""
    database, engine = await fresh(folder), NoopEngine()
    worker = Worker(database, engine, MemoryArtifacts(), load_settings(model=MODEL, engine="tone", slots=SLOTS))
    running = asyncio.create_task(worker.run())
    producer = Database(str(database.url))
    waits: list[float] = []
    for number in range(count):
        await asyncio.sleep(rng.uniform(0.02, 0.08))
        engine.arrived.clear()
        async with producer.session() as session:
            await enqueue(f"prompt {number}", duration=0.08, model=MODEL, session=session)
        committed = time.perf_counter()
        await engine.arrived.wait()
        waits.append((engine.arrived_at - committed) * 1000)
    worker.stop()
    await running
    await producer.dispose()
    await database.dispose()
    return waits


def add_finished(path: Path, count: int) -> None:
    """Add completed generations, a year of them."""
    connection = raw_connection(path)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        "INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, status, created_at,"
        " run_at, attempt, completed_at, file_path)"
        " WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)"
        " SELECT printf('%036d', i), 'a finished prompt of usual length, ' || i, :model, 10, 32000, 1, 'completed', t, t, 1, t,"
        " '/audio/' || i FROM (SELECT i, strftime('%Y-%m-%d %H:%M:%f', 'now', '-' || (i % 31536000) || ' seconds') || '000'"
        " AS t FROM n)",
        {"count": count, "model": MODEL},
    )
    connection.execute("COMMIT")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


async def measure_claims(
    folder: Path, kept: tuple[int, ...], rounds: int, count: int
) -> dict[int, tuple[float, float]]:
    """Return milliseconds of one claim of one row, ours and raw, for each number of finished rows kept.

    The databases are all made first and measured in turn, so that a slow moment of the machine meets them alike.
    """
    databases = {number: await fresh(folder) for number in kept}
    for number, database in databases.items():
        if number:
            add_finished(file_of(database), number)
        prompts = [f"prompt {n}" for n in range(2 * (rounds + 1) * count)]
        async with database.session() as session:
            await enqueue_many(prompts, duration=0.08, model=MODEL, session=session)
    times: dict[int, list[tuple[float, float]]] = {number: [] for number in kept}
    for turn in range(rounds + 1):
        for number, database in databases.items():
            pairs = await time_claims(database, count)
            times[number] += pairs if turn else []  # the first turn compiles statements and fills the page cache
    for database in databases.values():
        await database.dispose()
    return {
        number: (statistics.median(ours for ours, _ in pairs), statistics.median(raw for _, raw in pairs))
        for number, pairs in times.items()
    }


async def time_claims(database: Database, count: int) -> list[tuple[float, float]]:
    pairs = []
    connection = raw_connection(file_of(database))
    for _ in range(count):
        started = time.perf_counter()
        async with database.session() as session:
            claimed = await queue.claim(session, worker_id="w", model_name=MODEL, limit=1, lease_seconds=30)
        between = time.perf_counter()
        with raw_transaction(connection):
            lease = raw_claim(connection)
        pairs.append(((between - started) * 1000, (time.perf_counter() - between) * 1000))
        if not claimed or lease is None:
            raise RuntimeError("nothing was claimed")
    connection.close()
    return pairs


async def measure_idle(folder: Path, duration: float) -> tuple[float, float]:
    """Return an idle worker's CPU use in percent of one core, and its statements per second on the database."""
    database = await fresh(folder)
    statements = 0

    def count(*_: object) -> None:
        nonlocal statements
        statements += 1

    for engine in database.engines:
        event.listen(engine.sync_engine, "before_cursor_execute", count)
    worker = Worker(database, NoopEngine(), MemoryArtifacts(), load_settings(model=MODEL, engine="tone"))
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(1.0)
    statements = 0
    cpu = time.process_time()
    await asyncio.sleep(duration)
    used = (time.process_time() - cpu) / duration * 100
    rate = statements / duration
    worker.stop()
    await running
    await database.dispose()
    return used, rate


# ------------------------------------------------------------------------------------------------------------------- table


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def ratio_row(name: str, unit: str, pairs: list[tuple[float, float]]) -> str:
    ours, floor = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    return f"| {name} | {ours:,.{0 if ours > 10 else 2}f} {unit} | {floor:,.{0 if floor > 10 else 2}f} {unit} | {ratio:.2f} × |"


async def main(size: Size, folder: Path) -> list[str]:
    rng = random.Random(1)
    lines = ["| measurement | dgx-music | raw sqlite3 | ratio |", "|---|---|---|---|"]

    async def rounds(name: str, unit: str, measure: Callable[[], Awaitable[tuple[float, float]]]) -> None:
        pairs = []
        for number in range(size.rounds):
            console.print(f"{name}, round {number + 1} of {size.rounds}")
            pairs.append(await measure())
        lines.append(ratio_row(name, unit, pairs))

    await rounds("enqueue, one transaction each", "/s", lambda: measure_enqueue(folder, size.one_by_one))
    await rounds("enqueue, in bulk", "/s", lambda: measure_bulk(folder, size.bulk))
    await rounds("drain, 16 slots, no-op engine", "/s", lambda: measure_drain(folder, size.drain))
    console.print("claim with finished rows kept")
    claims = await measure_claims(folder, size.kept, size.rounds, size.claims)
    for kept, (ours, floor) in claims.items():
        name = f"claim one row, {kept:,} finished kept ({ours / claims[0][0]:.2f} × of 0 kept)"
        lines.append(f"| {name} | {ours:.2f} ms | {floor:.2f} ms | {ours / floor:.2f} × |")
    console.print("pickup by an idle worker")
    waits = await measure_pickup(folder, size.pickups, rng)
    lines += [
        f"| pickup by an idle worker, p{share * 100:.0f} | {percentile(waits, share):.1f} ms | | |"
        for share in (0.5, 0.95)
    ]
    console.print("idle worker")
    cpu, rate = await measure_idle(folder, size.idle_seconds)
    lines.append(f"| idle worker, CPU of one core | {cpu:.2f} % | | |")
    lines.append(f"| idle worker, statements of SQL | {rate:.1f} /s | | |")
    return lines


def describe_machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return (
        f"{cpu or platform.processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, SQLite"
        f" {sqlite3.sqlite_version} (WAL, synchronous=FULL), SQLAlchemy {sqlalchemy.__version__}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small numbers, to see that it runs")
    parser.add_argument("--folder", type=Path, help="where the databases are made; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        table = asyncio.run(main(QUICK if arguments.quick else FULL, Path(temporary)))
    print(f"{describe_machine()}\n\n" + "\n".join(table))
