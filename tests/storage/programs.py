"""What other processes do in tests of races: ``python -m tests.storage.programs NAME URL …``, JSON lines on stdout."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys

from dgx_music.client.enqueue import enqueue
from dgx_music.client.generations import cancel_generation, wait_for_generation
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import (
    close_db,
    count_generations,
    create_generation,
    get_session,
    init_db,
    queue,
)
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
    """Add, claim and complete without end; print each commit after it."""
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


async def fork_beside_a_waiter(url: str) -> None:
    """Fork with connections open and somebody waiting; child and parent each enqueue, at once and afterwards."""
    database = await init_db(url)
    first = await enqueue("first")
    waiting = asyncio.create_task(wait_for_generation(first.id))
    for _ in range(3):
        await enqueue("before")
        while any(engine.pool.checkedout() for engine in database.engines):  # the waiter looks
            await asyncio.sleep(0.01)
        child = multiprocessing.get_context("fork").Process(
            target=asyncio.run, args=[enqueue("child")]
        )
        child.start()
        await enqueue("beside")
        await asyncio.to_thread(child.join)
        await enqueue("after")
        tell(child.exitcode)
    await cancel_generation(first.id)
    tell([(await waiting).status, await _count()])
    await close_db()


def fork_between_runs(url: str) -> None:
    """Fork while an event loop rests with open connections; the child ends as Python ends."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(init_db(url))
    for _ in range(3):
        loop.run_until_complete(enqueue("before"))
        if (child := os.fork()) == 0:
            asyncio.run(enqueue("child"))
            sys.exit()
        tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    loop.run_until_complete(enqueue("after"))
    tell(loop.run_until_complete(_count()))
    loop.run_until_complete(close_db())
    loop.close()


async def fork_in_a_session(url: str) -> None:
    """Fork in the middle of a session's transaction; print the child's error and our rows."""
    await init_db(url)
    async with get_session() as session:
        await enqueue("rain", session=session)
        if (child := os.fork()) == 0:
            try:
                asyncio.run(enqueue("child"))
            except DatabaseUnavailableError as error:
                tell(str(error))
            os._exit(0)
        os.waitpid(child, 0)
    tell(await _count())
    await close_db()


async def _count() -> int:
    async with get_session(read_only=True) as session:
        return await count_generations(session)


if __name__ == "__main__":
    wait_for_begin()
    work = globals()[sys.argv[1]](*sys.argv[2:])
    if work is not None:
        asyncio.run(work)
