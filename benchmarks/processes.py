"""What other processes do in the measurements: ``python -m benchmarks.processes NAME URL …``, JSON lines on stdout."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time

from benchmarks.floor import MODEL
from benchmarks.raw_asyncpg import AsyncpgFloor
from benchmarks.worker import noop_worker
from dgx_music import enqueue
from dgx_music.storage.database import Database


def tell(what: object) -> None:
    print(json.dumps(what), flush=True)


async def begin() -> None:
    """Say that all is ready and wait until everybody is."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)


async def drain(url: str) -> None:
    database = Database(url)
    await noop_worker(database).run(drain=True)  # nothing is there yet: connections and statements are made
    await begin()
    await noop_worker(database).run(drain=True)
    await database.dispose()


async def drain_raw(url: str) -> None:
    floor = await AsyncpgFloor.connect(url)
    await begin()
    await floor.drain()
    await floor.close()


async def produce(url: str, count: str) -> None:
    """Enqueue one after another; tell of each its id and when its commit was acknowledged, by the clock of all processes."""
    database, rng = Database(url), random.Random(1)
    await begin()
    for number in range(int(count)):
        await asyncio.sleep(rng.uniform(0.02, 0.08))
        async with database.session() as session:
            generation = await enqueue(f"prompt {number}", duration=0.08, model=MODEL, session=session)
        tell([generation.id, time.monotonic()])
    await database.dispose()


if __name__ == "__main__":
    asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
