"""What a worker does, for requests that wait for one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dgx_music.artifacts import open_output
from dgx_music.storage import queue
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Lease
from tests.factories import MODEL, audio_file, claim_up_to, completion_of

DATA = audio_file(0.1)


async def claim_soon(database: Database, model: str = MODEL) -> Lease:
    """Claim the next generation, as soon as there is one."""
    while True:
        async with database.session() as session:
            claimed = await claim_up_to(session, 1, model_name=model)
        if claimed:
            return claimed[0].lease
        await asyncio.sleep(0.01)


async def complete_next(
    database: Database, output: Path, data: bytes = DATA, extension: str = "wav"
) -> Lease:
    """Complete the next generation with this audio, as soon as there is one."""
    lease = await claim_soon(database)
    place = open_output(output)
    stored = await place.publish(lease.generation_id, lease.attempt, extension, data)
    done = completion_of(
        lease,
        file_path=stored.path,
        file_size_bytes=stored.size_bytes,
        sha256=stored.sha256,
    )
    async with database.session() as session:
        await queue.complete(session, [done])
    return lease


async def fail_next(database: Database, error: str) -> None:
    """Fail the next generation for good, as soon as there is one."""
    lease = await claim_soon(database)
    async with database.session() as session:
        await queue.fail(session, lease, error, retry_in_seconds=None)
