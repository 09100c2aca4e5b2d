"""The group commit: a completion that shares a transaction with one in trouble has none itself."""

import asyncio

import pytest

from dgx_music.storage import queue
from dgx_music.worker.completions import Completions
from tests.factories import SQLITE, add_generation, claim_up_to, completion_of, on
from tests.patience import PATIENCE

pytestmark = on(SQLITE)


@pytest.fixture
async def leases(database):
    async with database.session() as session:
        for _ in range(2):
            await add_generation(session)
        return [claimed.lease for claimed in await claim_up_to(session, 2)]


async def test_one_that_cannot_be_stored_does_not_take_another_with_it(database, leases):
    completions = Completions(database)
    bad, good = completion_of(leases[0], audio={"x": "\ud800"}), completion_of(leases[1])
    outcomes = await asyncio.gather(
        completions.write(bad), completions.write(good), return_exceptions=True
    )
    assert isinstance(outcomes[0], Exception)
    assert outcomes[1] is True


async def test_one_that_is_cancelled_leaves_another_of_its_transaction_to_be_written(
    database, leases, monkeypatch
):
    completions, began = Completions(database), asyncio.Event()
    complete = queue.complete

    async def complete_or_be_cancelled(session, given):
        if not began.is_set():
            began.set()
            raise asyncio.CancelledError
        return await complete(session, given)

    monkeypatch.setattr(queue, "complete", complete_or_be_cancelled)
    first, second = (
        asyncio.create_task(completions.write(completion_of(lease))) for lease in leases
    )
    await asyncio.wait([first])
    assert first.cancelled()
    async with asyncio.timeout(PATIENCE):
        assert await second is True
