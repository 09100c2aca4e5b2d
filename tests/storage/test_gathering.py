"""Inserts at the same time share a transaction; each keeps its own fate."""

import asyncio
from contextvars import ContextVar

import pytest
from sqlalchemy import select

from dgx_music import enqueue, enqueue_many
from dgx_music.errors import DatabaseUnavailableError, IdempotencyConflictError
from dgx_music.storage import gathering
from dgx_music.storage.connection.sessions import NoAnswerError
from dgx_music.storage.generation import CLIP_COLUMNS
from dgx_music.storage.insertion_postgres import is_single
from dgx_music.storage.models import Generation, Prompt
from tests.factories import on, read_all

pytestmark = [pytest.mark.usefixtures("default_database"), pytest.mark.any_driver]


@pytest.fixture
def database(default_database):
    return default_database


@pytest.fixture
def transactions(database, monkeypatch):
    """How many rows each transaction of inserts had; ``hold`` stops them before they begin."""

    class Transactions(list):
        hold = asyncio.Event()
        begun = asyncio.Event()
        error = None

    seen, transact = Transactions(), database.transact
    seen.hold.set()

    async def noted(work, **options):
        seen.append(len(work.args[0]))
        seen.begun.set()
        await seen.hold.wait()
        if seen.error is not None:
            raise seen.error
        return await transact(work, **options)

    monkeypatch.setattr(database, "transact", noted)
    return seen


async def prompts(database):
    return sorted(await read_all(database, select(Generation.prompt)))


async def test_those_that_arrive_while_one_is_written_share_the_next(database, transactions):
    made = await asyncio.gather(*[enqueue(f"p{number}") for number in range(16)])

    assert sum(transactions) == 16
    assert len(transactions) <= 2
    assert [each.prompt for each in made] == [f"p{number}" for number in range(16)]
    assert len(await prompts(database)) == 16


async def test_one_alone_waits_for_nobody(transactions):
    await enqueue("rain")
    await enqueue("sun")

    assert transactions == [1, 1]


async def test_each_call_gets_its_own_rows(transactions):
    made = await asyncio.gather(
        enqueue_many(["a", "b"]), enqueue("c"), enqueue_many(["d", "e", "f"]), enqueue_many([])
    )

    first, second, third, fourth = made
    assert [each.prompt for each in first] == ["a", "b"]
    assert second.prompt == "c"
    assert [each.prompt for each in third] == ["d", "e", "f"]
    assert fourth == []
    assert sum(transactions) == 6


async def test_a_conflict_of_keys_fails_alone(database, transactions):
    await enqueue("rain", idempotency_key="k")

    made = await asyncio.gather(
        enqueue("sun"),
        enqueue("snow", idempotency_key="k"),
        enqueue("wind"),
        return_exceptions=True,
    )

    assert [type(each) for each in made] == [Generation, IdempotencyConflictError, Generation]
    assert await prompts(database) == ["rain", "sun", "wind"]
    used = await read_all(database, select(Prompt.used_count))
    assert used == [1, 1, 1]


async def test_two_that_say_the_same_under_one_key_get_one_row(database):
    made = await asyncio.gather(*[enqueue("rain", idempotency_key="k") for _ in range(5)])

    assert len({each.id for each in made}) == 1
    assert await prompts(database) == ["rain"]


async def test_an_unreachable_database_is_told_to_each(transactions):
    transactions.error = DatabaseUnavailableError("sqlite:///x", "it is away")

    made = await asyncio.gather(enqueue("a"), enqueue("b"), return_exceptions=True)

    assert [str(each) for each in made] == [str(transactions.error)] * 2
    assert made[0] is not made[1]
    assert transactions == [2]


async def test_a_cancelled_call_that_waits_leaves_nothing(database, transactions):
    transactions.hold.clear()
    first = asyncio.create_task(enqueue("first"))
    await transactions.begun.wait()
    late, other = asyncio.create_task(enqueue("late")), asyncio.create_task(enqueue("other"))
    while len(waiting(database)) < 2:
        await asyncio.sleep(0)

    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    transactions.hold.set()
    await asyncio.gather(first, other)

    assert await prompts(database) == ["first", "other"]


async def test_a_cancelled_call_that_is_being_written_ends_first(database, transactions):
    transactions.hold.clear()
    first, second = asyncio.create_task(enqueue("first")), asyncio.create_task(enqueue("second"))
    await transactions.begun.wait()

    first.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert not first.done()
    transactions.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await first
    await second

    assert await prompts(database) == ["first", "second"]


async def test_a_call_that_is_cancelled_as_its_transaction_ends_disturbs_no_other(
    database, monkeypatch
):
    transact = database.transact

    async def transact_and_cancel(work, **options):
        made = await transact(work, **options)
        first.cancel()
        return made

    monkeypatch.setattr(database, "transact", transact_and_cancel)
    first, second = asyncio.create_task(enqueue("first")), asyncio.create_task(enqueue("second"))

    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).prompt == "second"
    assert await prompts(database) == ["first", "second"]


@on("asyncpg", "psycopg")
async def test_what_waits_for_another_producers_key_holds_up_nobody_else(database):
    async with database.session() as session:
        await enqueue("rain", idempotency_key="k", session=session)
        keyed = asyncio.create_task(enqueue("rain", idempotency_key="k"))
        made = await enqueue("sun")
        assert not keyed.done()

    assert (await keyed).id != made.id
    assert await prompts(database) == ["rain", "sun"]


async def test_only_so_many_rows_share_a_transaction(database, transactions, monkeypatch):
    monkeypatch.setattr(gathering, "_MOST_ROWS", 3)

    made = await asyncio.gather(enqueue("a"), enqueue_many(["b", "c", "d"]), enqueue("e"))

    assert [each.prompt for each in made[1]] == ["b", "c", "d"]
    assert await prompts(database) == ["a", "b", "c", "d", "e"]
    assert transactions == [1, 3, 1]


async def test_one_conflict_costs_the_others_few_transactions(transactions):
    await enqueue("rain", idempotency_key="k")
    transactions.clear()

    made = await asyncio.gather(
        *[enqueue(f"p{number}") for number in range(32)],
        enqueue("snow", idempotency_key="k"),
        return_exceptions=True,
    )

    assert [type(each) for each in made] == [Generation] * 32 + [IdempotencyConflictError]
    assert len(transactions) <= 14  # of halves, and not one for each


async def test_two_calls_under_one_key_get_an_object_each(database):
    first, second = await asyncio.gather(*[enqueue("rain", idempotency_key="k") for _ in range(2)])

    assert first is not second
    assert first.to_dict() == second.to_dict()


async def test_a_writer_that_is_stopped_leaves_nobody_waiting(transactions):
    transactions.error = asyncio.CancelledError()
    calls = [asyncio.create_task(enqueue(f"p{number}")) for number in range(3)]

    done = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in done] == [NoAnswerError] * 3


async def test_a_closed_database_has_written_all(database, transactions):
    transactions.hold.clear()
    call = asyncio.create_task(enqueue("rain"))
    await transactions.begun.wait()
    closing = asyncio.create_task(database.dispose())
    await asyncio.sleep(0)
    transactions.hold.set()
    await closing

    assert (await call).prompt == "rain"
    assert database._connections._by_loop == {}  # nobody has opened a connection behind it


async def test_the_writer_does_not_run_in_its_first_callers_context(transactions, monkeypatch):
    name, seen = ContextVar("name", default="nobody"), []
    name.set("a caller")
    take = gathering.Gathering._take

    def noted(self):
        seen.append(name.get())
        return take(self)

    monkeypatch.setattr(gathering.Gathering, "_take", noted)
    await enqueue("rain")

    assert seen == ["nobody"]


@pytest.mark.parametrize("name", ["idempotency_key", *CLIP_COLUMNS])
def test_a_key_or_a_clip_needs_more_than_one_statement(name):
    row = dict.fromkeys(["idempotency_key", *CLIP_COLUMNS])

    assert is_single([row])
    assert not is_single([row, {**row, name: "x"}])


def waiting(database):
    return database._connections.here().inserts._waiting
