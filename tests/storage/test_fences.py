"""What fences and turns keep out that happens rarely: made-up leases, attempts ended by hand, claims at the same moment."""

import asyncio

import pytest
from sqlalchemy import select, update

from dgx_music.storage import Attempt, queue
from dgx_music.storage.queue import Lease
from dgx_music.storage.schema import now
from tests.factories import (
    POSTGRES,
    add_generation,
    claim_up_to,
    completion_of,
    on,
    read_all,
    start_one,
)


async def test_a_completion_never_takes_a_row_that_somebody_works_on_by_hand(database):
    async with database.session() as session:
        row = await add_generation(session, status="processing", attempt=1)
        lease = Lease(row.id, 1)

        assert await queue.complete(session, [completion_of(lease)]) == set()
        assert await queue.find_completable(session, [lease]) == set()


async def fail(session, lease):
    await queue.fail(session, lease, "late", retry_in_seconds=0)


async def release(session, lease):
    await queue.release(session, [lease])


async def complete(session, lease):
    await queue.complete(session, [completion_of(lease)])


@pytest.mark.parametrize("end", [fail, release, complete])
async def test_an_attempt_that_has_its_end_keeps_it(database, end):
    lease = await start_one(database)
    async with database.session() as session:
        await session.execute(
            update(Attempt).values(outcome="lost", finished_at=now(), error_message="by hand")
        )
        await end(session, lease)

    [attempt] = await read_all(database, select(Attempt))
    assert (attempt.outcome, attempt.error_message) == ("lost", "by hand")


@on(*POSTGRES)
async def test_a_claim_counts_what_another_has_just_taken_of_a_tenant(database):
    """The one it could take instead is more urgent than the one that is taken, and came after that."""
    await add_of_tenant(database)

    async def claim_too():
        return await database.transact(
            lambda session: claim_up_to(session, 1, "other", tenant_limit=1)
        )

    async with database.session() as first:
        assert len(await claim_up_to(first, 1, tenant_limit=1)) == 1
        await add_of_tenant(database, priority=5)
        second = asyncio.create_task(claim_too())
        await asyncio.wait([second], timeout=0.3)
    assert await second == []


async def add_of_tenant(database, **options):
    async with database.session() as session:
        await add_generation(session, tenant="a", **options)
