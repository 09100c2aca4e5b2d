"""Somebody else's open transaction holds a row: everybody else goes on without it. SQLite's writers take turns anyway."""

import asyncio

import anyio
import pytest
from sqlalchemy import text

from dgx_music.client.enqueue import enqueue, enqueue_many
from dgx_music.storage import queue
from dgx_music.storage.queue import Lease
from dgx_music.worker.completions import Completions
from dgx_music.worker.turns import Turns
from tests.factories import (
    MODEL,
    POSTGRES,
    add_generation,
    back_date,
    claim_up_to,
    completion_of,
    on,
    read,
)
from tests.patience import PATIENCE

pytestmark = on(*POSTGRES)


@pytest.fixture
async def three(database):
    """The leases of three generations in one worker's hand."""
    async with database.session() as session:
        for _ in range(3):
            await add_generation(session)
        return [claimed.lease for claimed in await claim_up_to(session, 3)]


async def test_a_renewal_passes_over_a_row_that_a_caller_has_locked_and_still_holds_it(
    database, three
):
    async with database.session() as session:
        for lease in three:
            await back_date(session, lease.generation_id, lease_expires_at=-1)
    async with database.session() as caller, database.session() as session:
        await queue.cancel(caller, three[1].generation_id)
        with anyio.fail_after(PATIENCE):
            renewed = await queue.renew(session, dict.fromkeys(three, 0.5), lease_seconds=30)
    assert renewed == dict.fromkeys(three, False)
    progress = [(await read(database, lease.generation_id)).progress for lease in three]
    assert progress == [0.5, 0.0, 0.5]


async def test_a_lease_that_is_lost_is_told_from_one_that_is_locked(database, three):
    gone = Lease(three[0].generation_id, 7)
    async with database.session() as caller, database.session() as session:
        await queue.cancel(caller, three[1].generation_id)
        renewed = await queue.renew(
            session, dict.fromkeys([gone, *three[1:]], 0.5), lease_seconds=30
        )
    assert set(renewed) == set(three[1:])


async def test_completions_go_on_without_the_one_that_a_caller_has_locked(database, three):
    completions = Completions(database, Turns())
    async with database.session() as caller:
        await queue.cancel(caller, three[1].generation_id)
        writing = [asyncio.create_task(completions.write(completion_of(lease))) for lease in three]
        with anyio.fail_after(PATIENCE):
            assert await asyncio.gather(writing[0], writing[2]) == [True, True]
        assert not writing[1].done()
        await caller.rollback()
        with anyio.fail_after(PATIENCE):
            assert await writing[1] is True


async def test_a_completion_whose_row_is_cancelled_meanwhile_is_refused_in_the_end(database, three):
    async with database.session() as caller:
        await queue.cancel(caller, three[1].generation_id)
        writing = asyncio.create_task(Completions(database, Turns()).write(completion_of(three[1])))
        await asyncio.sleep(0.1)
    with anyio.fail_after(PATIENCE):
        assert await writing is False


@pytest.mark.parametrize("tenant_limit", [None, 2])
async def test_a_claim_passes_over_a_row_that_a_caller_has_locked(database, tenant_limit):
    async with database.session() as session:
        rows = [await add_generation(session, tenant=tenant) for tenant in ("a", "b", "")]
        await back_date(session, rows[0].id, run_at=100)
    async with database.session() as caller, database.session() as session:
        await queue.cancel(caller, rows[0].id)
        with anyio.fail_after(PATIENCE):
            claims = await claim_up_to(session, 2, tenant_limit=tenant_limit)
    assert {claimed.lease.generation_id for claimed in claims} == {rows[1].id, rows[2].id}


async def test_a_batch_is_stored_in_the_order_of_its_keys_so_that_two_do_not_wait_in_a_circle(
    database,
):
    keys = [f"key {number}" for number in range(9)]
    async with database.session() as session:
        requests = [
            {"prompt": "lofi", "idempotency_key": key, "model": MODEL} for key in reversed(keys)
        ]
        rows = await enqueue_many(requests, session=session)
        stored = await session.scalars(
            text("SELECT idempotency_key FROM generations ORDER BY ctid")
        )
        assert list(stored) == keys
    assert [row.idempotency_key for row in rows] == keys[::-1]


async def test_a_caller_of_a_stricter_isolation_is_not_failed_by_the_count_of_his_prompt(database):
    async with database.session() as caller:
        await caller.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        await enqueue("own", model=MODEL, session=caller)
        async with database.session() as session:
            await enqueue("popular", model=MODEL, session=session)
        generation = await enqueue("popular", model=MODEL, session=caller)
    assert (await read(database, generation.id)).prompt_id is None
