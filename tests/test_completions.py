"""The group commit: a completion that shares a transaction with one in trouble has none itself."""

import asyncio

import pytest

from dgx_music.storage import queue
from dgx_music.worker.completions import Completions
from dgx_music.worker.turns import Turns
from tests.factories import SQLITE, add_generation, claim_up_to, completion_of, on
from tests.patience import PATIENCE

pytestmark = on(SQLITE)

COUNT = 8


@pytest.fixture
async def leases(database):
    async with database.session() as session:
        for _ in range(COUNT):
            await add_generation(session)
        return [claimed.lease for claimed in await claim_up_to(session, COUNT)]


@pytest.fixture
def transactions(monkeypatch):
    """The number of completions in each transaction."""
    found, complete = [], queue.complete

    async def counting(session, completions):
        found.append(len(completions))
        return await complete(session, completions)

    monkeypatch.setattr(queue, "complete", counting)
    return found


async def count_turns(turns):
    while True:
        turns.append(None)
        await asyncio.sleep(0)


async def test_those_that_are_ready_at_once_share_a_transaction_and_go_on_at_once(
    database, leases, transactions
):
    completions, passed, ended = Completions(database, Turns()), [], []

    async def write(lease):
        assert await completions.write(completion_of(lease)) is True
        ended.append(len(passed))

    counting = asyncio.create_task(count_turns(passed))
    await asyncio.gather(*map(write, leases))
    counting.cancel()
    assert transactions == [COUNT]
    assert max(ended) - min(ended) <= 2


async def test_those_whose_audio_is_in_line_to_be_finished_go_with_it(
    database, leases, transactions
):
    turns = Turns()
    completions = Completions(database, turns)
    first, *others = leases

    async def finish_and_write(lease):
        await turns.do(lambda: None)
        return await completions.write(completion_of(lease))

    finishing = [asyncio.create_task(finish_and_write(lease)) for lease in others]
    await asyncio.sleep(0)
    assert await completions.write(completion_of(first)) is True
    assert await asyncio.gather(*finishing) == [True] * len(others)
    assert transactions == [COUNT]


async def test_one_that_comes_while_others_are_written_goes_with_the_next(
    database, leases, transactions, monkeypatch
):
    completions, transact = Completions(database, Turns()), database.transact
    later = []

    async def transact_while_another_comes(work, **options):
        if not later:
            later.append(asyncio.create_task(completions.write(completion_of(leases[1]))))
            await asyncio.sleep(0)
        return await transact(work, **options)

    monkeypatch.setattr(database, "transact", transact_while_another_comes)
    assert await completions.write(completion_of(leases[0])) is True
    async with asyncio.timeout(PATIENCE):
        assert await later[0] is True
    assert transactions == [1, 1]


async def test_one_that_cannot_be_stored_does_not_take_another_with_it(database, leases):
    completions = Completions(database, Turns())
    bad, good = completion_of(leases[0], audio={"x": "\ud800"}), completion_of(leases[1])
    outcomes = await asyncio.gather(
        completions.write(bad), completions.write(good), return_exceptions=True
    )
    assert isinstance(outcomes[0], Exception)
    assert outcomes[1] is True


async def test_one_that_is_cancelled_leaves_another_of_its_transaction_to_be_written(
    database, leases, monkeypatch
):
    completions, began = Completions(database, Turns()), asyncio.Event()
    complete = queue.complete

    async def complete_or_be_cancelled(session, given):
        if not began.is_set():
            began.set()
            raise asyncio.CancelledError
        return await complete(session, given)

    monkeypatch.setattr(queue, "complete", complete_or_be_cancelled)
    first, second = (
        asyncio.create_task(completions.write(completion_of(lease))) for lease in leases[:2]
    )
    await asyncio.wait([first])
    assert first.cancelled()
    async with asyncio.timeout(PATIENCE):
        assert await second is True
