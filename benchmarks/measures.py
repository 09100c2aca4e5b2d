"""The measurements: each on fresh databases, first ours and then the floor."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event

from benchmarks.floor import MODEL, SLOTS, Floor
from benchmarks.places import Place, PostgresPlace
from benchmarks.worker import NoopEngine, noop_worker
from dgx_music import enqueue, enqueue_many
from dgx_music.storage import due, queue
from dgx_music.storage.database import Database
from tests.postgres import OwnServer

WARM_UP = 50
CLAIMS_IN_A_TURN = 5
HEARTBEAT_SECONDS = 0.1
SOAKED_SECONDS = 0.5


@asynccontextmanager
async def database_and_floor(
    place: Place, driver: str = ""
) -> AsyncIterator[tuple[Database, Floor]]:
    database = await place.fresh(driver)
    floor = await place.floor(database)
    yield database, floor
    await floor.close()
    await database.dispose()


async def seconds(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


def prompts(count: int, kind: str = "prompt") -> list[str]:
    return [f"{kind} {number}" for number in range(count)]


async def add_work(database: Database, count: int) -> None:
    async with database.session() as session:
        await enqueue_many(prompts(count), duration=0.08, model=MODEL, session=session)


async def enqueue_each(database: Database, texts: list[str]) -> None:
    for text in texts:
        async with database.session() as session:
            await enqueue(text, duration=0.08, model=MODEL, session=session)


async def measure_enqueue(place: Place, count: int) -> tuple[float, float]:
    """Return enqueues per second, one transaction each: ours and raw."""
    async with database_and_floor(place) as (database, floor):
        await enqueue_each(database, prompts(WARM_UP, "warm"))
        await floor.enqueue(prompts(WARM_UP, "warm raw"))
        ours = count / await seconds(enqueue_each(database, prompts(count)))
        return ours, count / await seconds(floor.enqueue(prompts(count, "raw")))


async def measure_bulk(place: Place, count: int) -> tuple[float, float]:
    """Return enqueues per second, all in one transaction: ours and raw."""
    async with database_and_floor(place) as (database, floor):
        await add_work(database, WARM_UP)
        ours = count / await seconds(add_work(database, count))
        return ours, count / await seconds(floor.enqueue_many(prompts(count, "raw")))


async def measure_drain(place: Place, count: int, driver: str = "") -> tuple[float, float]:
    """Return generations per second: the real worker with 16 slots, and raw row by row."""

    async def drain_ours(database: Database, _floor: Floor) -> None:
        await noop_worker(database).run(drain=True)

    async def drain_raw(_database: Database, floor: Floor) -> None:
        await floor.drain()

    ours = await time_drain(place, count, drain_ours, driver)
    return ours, await time_drain(place, count, drain_raw)


async def time_drain(
    place: Place, count: int, drain: Callable[[Database, Floor], Awaitable[None]], driver: str = ""
) -> float:
    """Return generations per second, after a warm-up of connections and statements."""
    async with database_and_floor(place, driver) as (database, floor):
        await add_work(database, WARM_UP)
        await drain(database, floor)
        await add_work(database, count)
        rate = count / await seconds(drain(database, floor))
        await check_drained(database)
        return rate


async def check_drained(database: Database) -> None:
    async with database.session(read_only=True) as session:
        if await due.has_work(session, [MODEL]):
            raise RuntimeError("the drain left work behind")


# other processes


async def start_process(name: str, *arguments: str) -> asyncio.subprocess.Process:
    """Start a process of ``benchmarks.processes`` and return it when it is ready."""
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", "benchmarks.processes", name, *arguments],
        cwd=Path(__file__).parents[1],
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if await hear(process) != "ready":
        raise RuntimeError(f"the process {name} did not get ready")
    return process


async def hear(process: asyncio.subprocess.Process) -> Any:
    if process.stdout is None:
        raise RuntimeError("nothing is piped")
    line = await process.stdout.readline()
    return json.loads(line) if line else None


def let_begin(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.write(b"begin\n")


async def measure_processes(place: PostgresPlace, count: int, workers: int) -> tuple[float, float]:
    """Return generations per second of this many worker processes, and of as many raw ones."""
    return await time_processes(place, count, workers, "drain"), await time_processes(
        place, count, workers, "drain_raw"
    )


async def time_processes(place: PostgresPlace, count: int, workers: int, name: str) -> float:
    """Return generations per second between the first claim and the last completion.

    Both times are of the server's clock.
    """
    database = await place.fresh()
    url = place.server.url(str(database.url.database))
    processes = await asyncio.gather(*[start_process(name, url) for _ in range(workers)])
    await add_work(database, count)
    for process in processes:
        let_begin(process)
    for process in processes:
        if await process.wait():
            raise RuntimeError(f"a process {name} failed")
    await check_drained(database)
    await database.dispose()
    span = "SELECT extract(epoch FROM max(completed_at) - min(started_at)) FROM generations"
    return count / float(place.server.execute(span, database=str(database.url.database))[0][0])


async def measure_pickup(place: Place, count: int) -> list[float]:
    """Return the milliseconds until an idle worker calls its engine.

    They count from the acknowledged commit of a producer in another process.
    """
    database, engine = await place.fresh(), NoopEngine()
    worker = noop_worker(database, engine)
    running = asyncio.create_task(worker.run())
    waits = await produce_for(database, engine.arrived_at, count)
    worker.stop()
    await running
    await database.dispose()
    return waits


async def measure_raw_pickup(place: PostgresPlace, count: int) -> list[float]:
    """Return the same for raw asyncpg, until its claim is committed."""
    database = await place.fresh()
    floor, arrived_at = await place.floor(database), dict[str, float]()
    running = asyncio.create_task(
        floor.pick_up(lambda identity: arrived_at.update({identity: time.monotonic()}))
    )
    waits = await produce_for(database, arrived_at, count)
    running.cancel()
    await floor.close()
    await database.dispose()
    return waits


async def produce_for(
    database: Database, arrived_at: Mapping[str, float], count: int
) -> list[float]:
    producer = await start_process(
        "produce", database.url.render_as_string(hide_password=False), str(count + WARM_UP)
    )
    let_begin(producer)
    told = [await hear(producer) for _ in range(count + WARM_UP)]
    await producer.wait()
    await asyncio.sleep(1.0)
    return [(arrived_at[identity] - committed) * 1000 for identity, committed in told[WARM_UP:]]


# claims beside many finished rows


Claims = dict[int, tuple[float, float]]
"""The milliseconds of one claim, ours and raw, by the number of finished rows."""


async def measure_claims(place: Place, kept: tuple[int, ...], turns: int) -> dict[str, Claims]:
    """Return the milliseconds of one claim of one row, by kind of table.

    On PostgreSQL it is measured after the rows were loaded, and again after a VACUUM ANALYZE. All
    databases are made first and measured in short turns, so that a slow moment of the machine
    meets all of them.
    """
    opened = [await open_kept(place, number, 4 * (turns + 1) * CLAIMS_IN_A_TURN) for number in kept]
    databases = dict(zip(kept, opened, strict=True))
    claims = {}
    if isinstance(place, PostgresPlace):
        claims["never vacuumed"] = await time_turns(databases, turns)
        for database, _ in opened:
            place.server.execute("VACUUM ANALYZE", database=str(database.url.database))
    claims[""] = await time_turns(databases, turns)
    for database, floor in opened:
        await floor.close()
        await database.dispose()
    return claims


async def open_kept(place: Place, kept: int, waiting: int) -> tuple[Database, Floor]:
    database = await place.fresh()
    floor = await place.floor(database)
    if isinstance(place, PostgresPlace):  # or it might vacuum in between
        place.server.execute(
            "ALTER TABLE generations SET (autovacuum_enabled = off)",
            database=str(database.url.database),
        )
    if kept:
        await floor.add_finished(kept)
    for _ in range(0, waiting, 5_000):
        await add_work(database, min(waiting, 5_000))
    # compiles statements and fills the page cache
    await time_claims(database, floor, CLAIMS_IN_A_TURN)
    return database, floor


async def time_turns(databases: dict[int, tuple[Database, Floor]], turns: int) -> Claims:
    times: dict[int, list[tuple[float, float]]] = {kept: [] for kept in databases}
    for _ in range(turns):
        for kept, (database, floor) in databases.items():
            times[kept] += await time_claims(database, floor, CLAIMS_IN_A_TURN)
    return {
        kept: (
            statistics.median(ours for ours, _ in pairs),
            statistics.median(raw for _, raw in pairs),
        )
        for kept, pairs in times.items()
    }


async def time_claims(database: Database, floor: Floor, count: int) -> list[tuple[float, float]]:
    return [
        (1000 * await seconds(claim_one(database)), 1000 * await seconds(claim_raw(floor)))
        for _ in range(count)
    ]


async def claim_one(database: Database) -> None:
    async with database.session() as session:
        if not await queue.claim(
            session, worker_id="w", model_name=MODEL, limit=1, lease_seconds=30
        ):
            raise RuntimeError("nothing was claimed")


async def claim_raw(floor: Floor) -> None:
    if not await floor.claim():
        raise RuntimeError("nothing was claimed")


# an idle worker, and a long run


async def measure_idle(place: Place, duration: float) -> dict[str, str]:
    """Return the cost of an idle worker, as text: its CPU time and its statements."""
    database, said = await place.fresh(), 0

    def note(*_: object) -> None:
        nonlocal said
        said += 1

    def read() -> dict[str, int]:
        return {"statements of SQL": said} | (
            read_server(place, database) if isinstance(place, PostgresPlace) else {}
        )

    for engine in database.engines:
        event.listen(engine.sync_engine, "before_cursor_execute", note)
    if isinstance(place, PostgresPlace) and isinstance(place.server, OwnServer):
        place.server.execute(f"ALTER DATABASE {database.url.database} SET log_statement = 'all'")
    worker = noop_worker(database)
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(2.0)
    before, cpu = read(), time.process_time()
    await asyncio.sleep(duration)
    used, after = time.process_time() - cpu, read()
    worker.stop()
    await running
    await database.dispose()
    rates = {name: f"{(count - before[name]) / duration:.1f} /s" for name, count in after.items()}
    return {"CPU of one core": f"{used / duration * 100:.2f} %"} | rates


def read_server(place: PostgresPlace, database: Database) -> dict[str, int]:
    """Return the transactions that the server has counted.

    The log of a server of our own also counts the statements.
    """
    name = str(database.url.database)
    query = f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{name}'"
    heard = {"transactions that the server counts": int(place.server.execute(query)[0][0])}
    if isinstance(place.server, OwnServer):
        log = place.server.log()
        statements = log.count("LOG:  statement: ") + log.count("LOG:  execute ")
        heard["statements that the server logs (BEGIN and COMMIT too)"] = statements
    return heard


async def measure_soak(place: PostgresPlace, duration: float) -> dict[str, str]:
    """Return what a busy worker leaves in the tables, as text.

    All its slots are in use, and each row is renewed a few times.
    """
    database = await place.fresh()
    count = int(SLOTS * duration / SOAKED_SECONDS)
    await add_work(database, count)
    worker = noop_worker(database, NoopEngine(SOAKED_SECONDS), heartbeat_seconds=HEARTBEAT_SECONDS)
    await worker.run(drain=True)
    await database.dispose()  # an idle connection keeps its statistics to itself for a while
    await asyncio.sleep(1.5)
    query = "SELECT relname, n_dead_tup, n_tup_upd, n_tup_hot_upd, pg_total_relation_size(relid) FROM pg_stat_user_tables"
    found = {
        name: numbers
        for name, *numbers in place.server.execute(query, database=str(database.url.database))
    }
    dead, updates, heap_only, size = found["generations"]
    others = ", ".join(
        f"{found[name][0]:,} in {name}" for name in ("attempts", "workers", "tallies")
    )
    return {
        f"soak of {count} generations: heartbeats' renewals": f"{updates - 2 * count:,}",
        "soak: renewals that were heap-only updates": f"{heap_only / (updates - 2 * count):.0%}",
        "soak: dead rows": f"{dead:,} in generations, {others}",
        "soak: generations and its indexes": f"{size / 2**20:.1f} MiB",
    }
