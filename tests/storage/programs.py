"""What other processes do in tests of races: ``python -m tests.storage.programs NAME URL …``, JSON lines on stdout."""

from __future__ import annotations

import asyncio
import json
import sys

from dgx_music.enqueue import enqueue
from dgx_music.storage import create_generation, queue
from dgx_music.storage.database import Database
from tests.factories import claim_up_to, completion_of


def tell(what: object) -> None:
    print(json.dumps(what), flush=True)


def wait_for_begin() -> None:
    tell("ready")
    sys.stdin.readline()


async def claim(url: str, worker_id: str) -> None:
    """Claim until the queue is empty; tell each row's id."""
    database = Database(url)
    while True:
        async with database.session() as session:
            claims = await claim_up_to(session, 7, worker_id)
        if not claims:
            break
        for claimed in claims:
            tell(claimed.lease.generation_id)
    await database.dispose()


async def write(url: str) -> None:
    """Add, claim and complete for ever; tell what is committed, once it is."""
    database = Database(url)
    while True:
        async with database.session() as session:
            added = await create_generation(session, "lofi rain", "musicgen-small", 8.0, 32_000, 1)
        tell(["added", added.id])
        async with database.session() as session:
            leases = [claimed.lease for claimed in await claim_up_to(session, 1)]
        async with database.session() as session:
            done = await queue.complete(session, [completion_of(lease) for lease in leases])
        for lease in done:
            tell(["completed", lease.generation_id])


async def migrate(url: str) -> None:
    """Migrate; tell the revision that is found afterwards."""
    database = Database(url)
    await database.migrate()
    tell(await database.revision())
    await database.dispose()


async def produce(url: str, key: str, prompt: str) -> None:
    """Enqueue under this key; tell the row's id."""
    database = Database(url)
    async with database.session() as session:
        generation = await enqueue(prompt, session=session, idempotency_key=key)
    tell(generation.id)
    await database.dispose()


if __name__ == "__main__":
    wait_for_begin()
    asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
