"""What dgx-music alone costs: an idle worker, and what a busy one leaves in PostgreSQL's tables."""

from __future__ import annotations

import asyncio
import time

from benchmarks.measures import prompts
from benchmarks.ours import DgxMusic
from benchmarks.places import Place, PostgresPlace, database_of
from benchmarks.worker import NoopEngine, noop_worker
from dgx_music import Database
from tests.postgres import OwnServer

SLOTS = 16
HEARTBEAT_SECONDS = 0.1
SOAKED_SECONDS = 0.5


async def measure_idle(place: Place, duration: float) -> dict[str, str]:
    """Return the cost of an idle worker, as text: its CPU time, and what a server counts."""
    location = await place.fresh(DgxMusic)
    if isinstance(place, PostgresPlace) and isinstance(place.server, OwnServer):
        place.server.execute(f"ALTER DATABASE {database_of(location)} SET log_statement = 'all'")
    database = Database(DgxMusic.url(location))
    worker = noop_worker(database, NoopEngine(SLOTS))
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(2.0)
    before, cpu = read_server(place, location), time.process_time()
    await asyncio.sleep(duration)
    used, after = time.process_time() - cpu, read_server(place, location)
    worker.stop()
    await running
    await database.dispose()
    rates = {name: f"{(count - before[name]) / duration:.1f} /s" for name, count in after.items()}
    return {"idle worker, CPU of one core": f"{used / duration * 100:.2f} %"} | rates


def read_server(place: Place, location: str) -> dict[str, int]:
    """Return the transactions that the server has counted; nothing for SQLite.

    The log of a server of our own also counts the statements.
    """
    if not isinstance(place, PostgresPlace):
        return {}
    query = f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{database_of(location)}'"
    heard = {
        "idle worker, transactions that the server counts": int(place.server.execute(query)[0][0])
    }
    if isinstance(place.server, OwnServer):
        log = place.server.log()
        statements = log.count("LOG:  statement: ") + log.count("LOG:  execute ")
        heard["idle worker, statements that the server logs (BEGIN and COMMIT too)"] = statements
    return heard


async def measure_soak(place: PostgresPlace, duration: float) -> dict[str, str]:
    """Return what a busy worker leaves in the tables, as text.

    All its slots are in use, and each row is renewed a few times.
    """
    location, count = await place.fresh(DgxMusic), int(SLOTS * duration / SOAKED_SECONDS)
    queue = await DgxMusic.open(location)
    await queue.enqueue_many(prompts(count))
    await queue.close()
    database = Database(DgxMusic.url(location))
    engine = NoopEngine(SLOTS, seconds=SOAKED_SECONDS)
    await noop_worker(database, engine, heartbeat_seconds=HEARTBEAT_SECONDS).run(drain=True)
    await database.dispose()  # an idle connection keeps its statistics to itself for a while
    await asyncio.sleep(1.5)
    return describe_tables(place, location, count)


def describe_tables(place: PostgresPlace, location: str, count: int) -> dict[str, str]:
    query = "SELECT relname, n_dead_tup, n_tup_upd, n_tup_hot_upd, pg_total_relation_size(relid) FROM pg_stat_user_tables"
    rows = place.server.execute(query, database=database_of(location))
    found = {name: numbers for name, *numbers in rows}
    dead, updates, heap_only, size = found["generations"]
    renewals = updates - 2 * count
    others = ", ".join(
        f"{found[name][0]:,} in {name}" for name in ("attempts", "workers", "tallies")
    )
    return {
        f"soak of {count} generations: heartbeats' renewals": f"{renewals:,}",
        "soak: renewals that were heap-only updates": f"{heap_only / max(renewals, 1):.0%}",
        "soak: dead rows": f"{dead:,} in generations, {others}",
        "soak: generations and its indexes": f"{size / 2**20:.1f} MiB",
    }
