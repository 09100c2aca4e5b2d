"""The other processes of the measurements: ``python -m benchmarks.processes NAME URL …``.

Each prints JSON lines on stdout.
"""

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
    """Report that this process is ready, and wait until all are."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)


async def drain(url: str) -> None:
    database = Database(url)
    await noop_worker(database).run(drain=True)  # an empty queue: opens connections only
    await begin()
    await noop_worker(database).run(drain=True)
    await database.dispose()


async def drain_raw(url: str) -> None:
    floor = await AsyncpgFloor.connect(url)
    await begin()
    await floor.drain()
    await floor.close()


async def produce(url: str, count: str) -> None:
    """Enqueue one by one; print the id of each and when its commit was acknowledged.

    The time is ``time.monotonic``, which is the same in all processes.
    """
    database, rng = Database(url), random.Random(1)
    await begin()
    for number in range(int(count)):
        await asyncio.sleep(rng.uniform(0.02, 0.08))
        async with database.session() as session:
            generation = await enqueue(
                f"prompt {number}", duration=0.08, model=MODEL, session=session
            )
        tell([generation.id, time.monotonic()])
    await database.dispose()


if __name__ == "__main__":
    asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
