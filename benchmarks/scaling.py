"""Measures one PostgreSQL with many finished rows and many worker processes.

    python -m benchmarks.scaling                                    0, 1 and 10 million rows: half an hour, 15 GB
    python -m benchmarks.scaling --finished 0 10000 --workers 1 2   to see that it runs
    python -m benchmarks.scaling --server postgresql://…            your own server; needs a superuser

There is one database for each number of finished rows. All are filled first and then measured in
short turns, so that a slow moment of the machine meets all of them. Each result is a line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self

import asyncpg
import numpy as np

from benchmarks.contestants import DURATION, MODEL
from benchmarks.measures import prompts, seconds
from benchmarks.ours import DgxMusic
from benchmarks.places import PostgresPlace, database_of
from benchmarks.processes import begin, hear, start
from dgx_music import Database, enqueue, enqueue_many
from dgx_music.audio import files
from dgx_music.audio.samples import Audio
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import get_database_stats, list_generations, search_generations
from dgx_music.storage.estimates import estimate

Call = Callable[[], Awaitable[object]]

SLOTS = 16
CHUNK = 100_000
GENERATIONS_OF_A_PROMPT = 10
SECONDS_BETWEEN_ROWS = 3
SAMPLE_SECONDS = 0.2
AUTOVACUUM_SECONDS = 75
SEARCHES = {
    "search, a word of 1 prompt in 20": "techno",
    "search, 2 words of 1 in 200": "techno rainy",
    "search, a rare word": "take 4711",
}
GENRES = (
    "lofi trap house techno ambient jazz funk soul disco reggae "
    "metal punk folk blues gospel samba salsa tango waltz opera"
)
MOODS = "sleepy rainy sunny dark bright gentle angry lonely happy distant"
WORDS = f"""'{{{GENRES.replace(" ", ",")}}}'::text[])[1 + n % 20] || ' with slow drums and a '
  || ('{{{MOODS.replace(" ", ",")}}}'::text[])[1 + n / 20 % 10] || ' bass, take ' || n"""
FILL_PROMPTS = f"""
INSERT INTO prompts (id, text, text_hash, search_text, used_count)
SELECT n, text, encode(sha256(text::bytea), 'hex'), text, $3
FROM (
  SELECT n, ({WORDS} AS text
  FROM generate_series($1::bigint, $2::bigint) AS n
) AS made"""
FILL_GENERATIONS = f"""
INSERT INTO generations (id, prompt, prompt_id, model_name, duration_seconds, sample_rate, channels,
  sampling, request_hash, status, created_at, run_at, attempt, started_at, progress, completed_at,
  model_version, file_path, file_size_bytes, sha256, generation_time_seconds)
SELECT '0' || lpad(i::text, 35, '0'), ({WORDS}, n, $3, 10, 32000, 1, '{{}}',
  md5(i::text) || md5(n::text), 'completed', t, t, 1, t, 1, t, 'noop',
  '/var/lib/dgx-music/audio/' || i || '.wav', 640044, md5(n::text) || md5(i::text), 1
FROM (
  SELECT i, 1 + (i - 1) / $5::bigint AS n,
    $4::timestamptz + i * interval '1 second' * $6::integer AS t
  FROM generate_series($1::bigint, $2::bigint) AS i
) AS made"""
FILL_ATTEMPTS = """
INSERT INTO attempts (generation_id, attempt, worker_id, started_at, finished_at, outcome, device_seconds)
SELECT '0' || lpad(i::text, 35, '0'), 1, 'filler', t, t, 'completed', 1
FROM (
  SELECT i, $3::timestamptz + i * interval '1 second' * $4::integer AS t
  FROM generate_series($1::bigint, $2::bigint) AS i
) AS made"""
ADD_FLEET = """
INSERT INTO workers (id, host, pid, state, model_name, models, device, slots, lease_seconds)
VALUES ('fleet', 'nowhere', 1, 'serving', $1::text, jsonb_build_array($1::text), 'any', 16, 3600)"""
ADD_SPEED = """
INSERT INTO speeds (model_name, device, low, typical, high, measured_count)
VALUES ($1, 'any', 0.1, 0.2, 0.3, 100)"""
SIZES = """
SELECT relname, pg_table_size(relid), pg_indexes_size(relid) FROM pg_stat_user_tables
WHERE relname IN ('generations', 'attempts', 'prompts')"""
INDEX_SIZES = """
SELECT indexrelname, pg_relation_size(indexrelid) FROM pg_stat_user_indexes
WHERE relname = 'generations' ORDER BY 2 DESC LIMIT 8"""
VACUUM = """
SELECT relname, n_live_tup, n_dead_tup, n_tup_upd, n_tup_hot_upd, autovacuum_count, autoanalyze_count
FROM pg_stat_user_tables WHERE relname IN ('generations', 'attempts', 'tallies', 'prompts')"""
ACTIVITY = """
SELECT state, coalesce(wait_event_type || ': ' || wait_event, 'none') FROM pg_stat_activity
WHERE datname = '{}'"""
RATE = """
SELECT count(completed_at), extract(epoch FROM max(completed_at) - min(started_at))
FROM generations WHERE created_at >= '{}'"""


def tell(what: str, **values: Any) -> None:
    print(json.dumps({"what": what, **values}, default=float), flush=True)


async def seconds_or_timeout(call: Call) -> float:
    """Return the seconds of the call; infinity if the server's limit of a statement ended it."""
    try:
        return await seconds(call())
    except DatabaseUnavailableError:
        return math.inf


class WorkerOnly(DgxMusic):
    """A worker process, without the connection that a producer of its process would have."""

    @classmethod
    def key(cls) -> str:
        return "benchmarks.scaling:WorkerOnly"

    @classmethod
    async def open(cls, location: str) -> Self:
        return cls(location)


@dataclass(frozen=True)
class Archive:
    """A database with this many finished rows."""

    finished: int
    location: str
    database: Database
    queue: DgxMusic

    @property
    def name(self) -> str:
        return database_of(self.location)

    async def enqueue(self, texts: list[str]) -> None:
        async with self.database.session() as session:
            await enqueue_many(texts, duration=DURATION, model=MODEL, session=session)

    async def enqueue_one(self) -> None:
        async with self.database.session() as session:
            await enqueue("one more prompt", duration=DURATION, model=MODEL, session=session)


class Scaling:
    """The measurements, on all archives."""

    def __init__(self, place: PostgresPlace, options: argparse.Namespace) -> None:
        self._place = place
        self._options = options
        self._archives: list[Archive] = []

    async def run(self) -> None:
        for finished in self._options.finished:
            location = await self._place.fresh(DgxMusic)
            database, queue = Database(DgxMusic.url(location)), DgxMusic(location)
            self._archives.append(Archive(finished, location, database, queue))
        await self._tell_facts(self._archives[0])
        began = time.monotonic()
        await asyncio.gather(*[self._fill(archive) for archive in self._archives])
        tell("filled", seconds=time.monotonic() - began)
        for archive in self._archives:
            self._ask(archive, "VACUUM (ANALYZE)")
            self._tell_rows("sizes", archive, SIZES)
            self._tell_rows("sizes of indexes", archive, INDEX_SIZES)
        for _ in range(self._options.rounds):
            for workers in self._options.workers:
                for archive in (self._archives[0], self._archives[-1]):
                    await self._drain(archive, workers)
        self._tell_vacuum("dead rows after the drains")
        await self._time_calls()
        await asyncio.sleep(self._options.wait_seconds)
        self._tell_vacuum("dead rows later")
        for archive in self._archives:
            began = time.monotonic()
            self._ask(archive, "VACUUM (INDEX_CLEANUP ON) generations")
            tell("vacuum", finished=archive.finished, seconds=time.monotonic() - began)
        for archive in self._archives:
            await archive.database.dispose()
            await archive.queue.close()

    def _ask(self, archive: Archive, statement: str) -> list[tuple[Any, ...]]:
        return self._place.server.execute(statement, database=archive.name)

    def _ask_all(self, statement: str) -> None:
        for archive in self._archives:
            self._ask(archive, statement)

    def _tell_rows(self, what: str, archive: Archive, query: str) -> None:
        rows = {name: numbers for name, *numbers in self._ask(archive, query)}
        tell(what, finished=archive.finished, **rows)

    def _tell_vacuum(self, what: str) -> None:
        for archive in self._archives:
            self._tell_rows(what, archive, VACUUM)

    async def _tell_facts(self, archive: Archive) -> None:
        """Tell the bytes that the facts of real audio take in a row: most are its waveform.

        The rows that are filled in have none.
        """
        noise = np.random.default_rng(1).normal(0, 0.1, (1, 320_000)).astype(np.float32)
        finished = files.finish(
            Audio(noise, 32_000),
            sample_rate=32_000,
            channels=1,
            audio_format="wav",
            loudness="lufs",
        )
        connection = await asyncpg.connect(archive.location)
        await connection.execute("CREATE TEMPORARY TABLE facts (metadata jsonb)")
        await connection.execute("INSERT INTO facts VALUES ($1)", json.dumps(finished.facts))
        stored = await connection.fetchval("SELECT pg_column_size(metadata) FROM facts")
        await connection.close()
        tell("facts of 10 s of audio", bytes=stored)

    # filling

    async def _fill(self, archive: Archive) -> None:
        """Add the finished rows with all indexes in place, oldest first, as they would have come."""
        oldest = "clock_timestamp() - interval '1 second' * {}"
        start = self._ask(
            archive, f"SELECT {oldest.format(archive.finished * SECONDS_BETWEEN_ROWS)}"
        )
        clock, times = start[0][0], SECONDS_BETWEEN_ROWS
        each = GENERATIONS_OF_A_PROMPT
        prompts, count = -(-archive.finished // each), archive.finished
        await asyncio.gather(
            self._fill_table(archive, FILL_PROMPTS, prompts, each),
            self._fill_table(archive, FILL_GENERATIONS, count, MODEL, clock, each, times),
            self._fill_table(archive, FILL_ATTEMPTS, count, clock, times),
        )
        self._ask(archive, f"INSERT INTO tallies (name, delta) VALUES ('completed', {count})")
        self._ask(archive, f"INSERT INTO tallies (name, delta) VALUES ('prompts', {prompts})")
        self._ask(archive, f"SELECT setval('prompts_id_seq', {prompts + 1})")

    async def _fill_table(self, archive: Archive, insert: str, count: int, *values: object) -> None:
        """Insert in chunks, without triggers, since a check of each foreign key would take long."""
        connection = await asyncpg.connect(
            archive.location,
            server_settings={"session_replication_role": "replica"},
        )
        for first in range(1, count + 1, CHUNK):
            await connection.execute(insert, first, min(first + CHUNK - 1, count), *values)
        await connection.close()

    # worker processes

    async def _drain(self, archive: Archive, workers: int) -> None:
        """Tell how this many worker processes empty the queue, and what the server does."""
        processes = await asyncio.gather(
            *[start("work", WorkerOnly, archive.location, str(SLOTS)) for _ in range(workers)]
        )
        began = self._ask(archive, "SELECT clock_timestamp()")[0][0]
        await archive.enqueue(prompts(self._options.waiting))
        await archive.database.dispose()  # or its connections would be counted
        self._ask(archive, "CHECKPOINT")
        before = self._read_counters(archive)
        for process in processes:
            begin(process)
        samples = await self._sample_until_done(archive, processes)
        count, taken = self._ask(archive, RATE.format(began))[0]
        if count != self._options.waiting:
            raise RuntimeError("the drain left work behind")
        after = self._read_counters(archive)
        tell(
            f"drain by {workers}",
            finished=archive.finished,
            per_second=count / taken,
            connections=max(map(len, samples)),
            waits=Counter(
                wait for sample in samples for state, wait in sample if state == "active"
            ),
            load=os.getloadavg()[0],
            **{name: (after[name] - before[name]) / count for name in before},
        )

    async def _sample_until_done(
        self, archive: Archive, processes: list[asyncio.subprocess.Process]
    ) -> list[list[tuple[Any, ...]]]:
        """Return what the connections of a database did, sampled until all processes report."""
        query, samples = ACTIVITY.format(archive.name), []
        reports = asyncio.gather(*[hear(process) for process in processes])
        while not reports.done():
            samples.append(await asyncio.to_thread(self._place.server.execute, query))
            await asyncio.sleep(SAMPLE_SECONDS)
        await reports
        if any([await process.wait() for process in processes]):
            raise RuntimeError("a worker process failed")
        return samples

    def _read_counters(self, archive: Archive) -> dict[str, int]:
        """Return the transactions of a database, and the WAL of the whole server.

        Some of that are whole pages, written at the first change of each after a checkpoint.
        """
        query = f"""SELECT xact_commit, wal_bytes, wal_fpi FROM pg_stat_database, pg_stat_wal
            WHERE datname = '{archive.name}'"""
        transactions, wal_bytes, pages = self._place.server.execute(query)[0]
        return {
            "transactions_each": int(transactions),
            "wal_bytes_each": int(wal_bytes),
            "wal_pages_each": int(pages),
        }

    # single calls

    async def _time_calls(self) -> None:
        """Tell the milliseconds of each call, and of claims whose plan expects an empty queue."""
        self._ask_all("ANALYZE generations")
        calls = {archive.finished: await self._prepare(archive) for archive in self._archives}
        claims = {
            archive.finished: {"claim one row, no row waited at ANALYZE": archive.queue.claim}
            for archive in self._archives
        }
        await self._time_in_turns(claims)
        self._ask_all("ANALYZE generations")
        await self._time_in_turns(calls)
        tell("load", load=os.getloadavg()[0])

    async def _time_in_turns(self, calls: Mapping[int, Mapping[str, Call]]) -> None:
        """Tell the median of each call, on each archive in turn."""
        times: dict[tuple[str, int], list[float]] = {}
        for turn in range(self._options.turns + 1):
            for finished, named in calls.items():
                for name, call in named.items():
                    taken = 1000 * await seconds_or_timeout(call)
                    if turn:  # the first one compiles statements and fills caches
                        times.setdefault((name, finished), []).append(taken)
        for (name, finished), taken_each in times.items():
            base = statistics.median(times[name, self._options.finished[0]])
            median = statistics.median(taken_each)
            tell(name, finished=finished, ms=round(median, 2), ratio=round(median / base, 2))

    async def _prepare(self, archive: Archive) -> dict[str, Call]:
        """Add rows that wait, and a worker that could take them; return the calls to be timed."""
        database = archive.database
        await archive.enqueue(prompts(self._options.waiting))
        connection = await asyncpg.connect(archive.location)
        await connection.execute(ADD_FLEET, MODEL)
        await connection.execute(ADD_SPEED, MODEL)
        last = await connection.fetchval("SELECT max(id) FROM generations WHERE status = 'pending'")
        await connection.close()

        def reading(work: Callable[..., Awaitable[object]], *values: Any) -> Callable[..., Any]:
            return lambda: database.transact(lambda session: work(session, *values), read_only=True)

        return {
            "claim one row": archive.queue.claim,
            "enqueue": archive.enqueue_one,
            "list, first page of 100": reading(list_generations),
            "stats": reading(get_database_stats),
            "estimate": reading(estimate, last),
            **{name: reading(search_generations, words) for name, words in SEARCHES.items()},
        }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure one PostgreSQL with many rows and workers."
    )
    parser.add_argument("--finished", type=int, nargs="+", default=[0, 1_000_000, 10_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--waiting", type=int, default=4_000, help="generations of each drain")
    parser.add_argument("--rounds", type=int, default=3, help="how often each drain is measured")
    parser.add_argument("--turns", type=int, default=15, help="how often each call is timed")
    parser.add_argument("--server", help="the URL of your own server, instead of a new one")
    parser.add_argument(
        "--wait-seconds", type=float, default=AUTOVACUUM_SECONDS, help="time for autovacuum"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with closing(PostgresPlace(options.server)) as place:
        tell(
            "where",
            server=place.describe(),
            python=platform.python_version(),
            cores=os.cpu_count(),
            load=os.getloadavg()[0],
        )
        asyncio.run(Scaling(place, options).run())


if __name__ == "__main__":
    main()
