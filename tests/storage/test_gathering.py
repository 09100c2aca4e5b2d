"""Inserts at the same time share a transaction; each keeps its own fate."""

import asyncio
from contextvars import ContextVar
from types import SimpleNamespace

import pytest
from sqlalchemy import event, select, text
from sqlalchemy.exc import DBAPIError

from dgx_music import enqueue, enqueue_many
from dgx_music.errors import DatabaseUnavailableError, IdempotencyConflictError
from dgx_music.storage import Database, gathering
from dgx_music.storage.connection.sessions import NoAnswerError
from dgx_music.storage.generation import CLIP_COLUMNS
from dgx_music.storage.insertion_postgres import is_single
from dgx_music.storage.models import Batch, Generation, Prompt
from tests.factories import on, read_all
from tests.patience import PATIENCE

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
        seen.append(len(work.keywords["rows"]))
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


async def test_calls_with_keys_share_a_transaction_too(database, transactions):
    keys = [f"k{number}" for number in range(16)]
    made = await asyncio.gather(*[enqueue("rain", idempotency_key=key) for key in keys])

    assert [each.idempotency_key for each in made] == keys
    assert (sum(transactions), len(transactions) <= 2) == (16, True)


ON_SERVERS = on("asyncpg", "psycopg")


@pytest.fixture
async def rival(database, monkeypatch):
    """A producer whose open transaction has the key ``k``, until it is committed or rolled back.

    Nobody waits for it in a shared transaction: what is seen to wait has been written apart.
    """
    monkeypatch.setattr(gathering, "_LOCK_TIMEOUT", "1ms")
    own = Database(database.url.render_as_string(hide_password=False))
    async with own.session() as session:
        session.generation = await enqueue("rain", idempotency_key="k", session=session)
        yield session
    await own.dispose()


async def waits(database):
    """Return once one of our statements waits for another transaction."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with asyncio.timeout(PATIENCE):
        while (await read_all(database, text(query)))[0] == 0:
            await asyncio.sleep(0.01)


@ON_SERVERS
async def test_what_waits_for_another_producers_key_holds_up_nobody_else(database, rival):
    keyed = asyncio.create_task(enqueue("rain", idempotency_key="k"))
    together = asyncio.create_task(
        enqueue_many([{"prompt": "rain", "idempotency_key": "k"}, "too"])
    )
    await asyncio.gather(
        enqueue("sun"),
        enqueue("snow", idempotency_key="j"),
        enqueue_many([{"prompt": "hail", "idempotency_key": "h"}, "fog"]),
    )
    for key in (None, "l"):
        await enqueue("wind", idempotency_key=key)
    assert await prompts(database) == ["fog", "hail", "snow", "sun", "wind", "wind"]
    assert [keyed.done(), together.done()] == [False, False]
    await rival.commit()

    same = rival.generation.id
    assert (await keyed).id == same
    assert [(row.id == same, row.prompt) for row in await together] == [
        (True, "rain"),
        (False, "too"),
    ]


@ON_SERVERS
async def test_those_that_wait_for_a_key_leave_connections_for_others(database, rival):
    count = 2 * database.limits.pool_size
    keyed = [asyncio.create_task(enqueue("rain", idempotency_key="k")) for _ in range(count)]
    await waits(database)
    for number in range(count):
        await enqueue("sun", idempotency_key=f"{number}")
        keyed.append(asyncio.create_task(enqueue("rain", idempotency_key="k")))
    requests = [{"prompt": "rain", "idempotency_key": "k"}, "never"]
    given_up = asyncio.create_task(enqueue_many(requests))
    await asyncio.sleep(0)
    given_up.cancel()  # it has not begun, so it need not wait
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert not any(each.done() for each in keyed)
    await rival.commit()

    assert {(await each).id for each in keyed} == {rival.generation.id}
    inserts = database._connections.here().inserts
    await inserts.close()
    assert inserts._ends == {}
    assert {*await prompts(database)} == {"rain", "sun"}


@ON_SERVERS
async def test_a_key_that_is_sent_again_and_again_costs_the_others_nothing(
    database, rival, transactions
):
    keyed = [asyncio.create_task(enqueue("rain", idempotency_key="k"))]
    await waits(database)
    transactions.clear()
    for number in range(9):
        keyed.append(asyncio.create_task(enqueue("rain", idempotency_key="k")))
        await enqueue("sun", idempotency_key=f"{number}")

    assert transactions == [1] * 9
    await rival.rollback()
    assert len({(await each).id for each in keyed}) == 1


@ON_SERVERS
async def test_a_short_wait_for_a_key_keeps_the_connection(database, rival):
    dropped = []
    event.listen(database.engine.sync_engine, "invalidate", lambda *call: dropped.append(call))
    keyed = asyncio.create_task(enqueue("rain", idempotency_key="k"))
    await waits(database)
    await rival.commit()
    await keyed

    assert dropped == []


@ON_SERVERS
async def test_who_waits_for_a_key_gets_it_if_its_rival_gives_up(database, rival):
    keyed = asyncio.create_task(enqueue("sun", idempotency_key="k"))
    await waits(database)
    await rival.rollback()

    assert (await keyed).prompt == "sun"
    assert await prompts(database) == ["sun"]


@ON_SERVERS
async def test_who_waits_for_a_key_of_another_request_is_refused(database, rival):
    keyed = asyncio.create_task(enqueue_many(["new", {"prompt": "sun", "idempotency_key": "k"}]))
    await waits(database)
    await rival.commit()

    with pytest.raises(IdempotencyConflictError):
        await keyed
    assert await prompts(database) == ["rain"]
    assert await read_all(database, select(Batch.id)) == []


@ON_SERVERS
async def test_a_call_that_is_cancelled_while_it_waits_for_a_key_ends_first(database, rival):
    keyed = asyncio.create_task(enqueue("rain", idempotency_key="k"))
    await waits(database)
    keyed.cancel()
    await enqueue("sun")
    assert not keyed.done()
    await rival.commit()

    with pytest.raises(asyncio.CancelledError):
        await keyed
    assert await prompts(database) == ["rain", "sun"]


@ON_SERVERS
async def test_a_closed_database_has_written_what_waited_for_a_key(database, rival):
    keyed = asyncio.create_task(enqueue("rain", idempotency_key="k"))
    await waits(database)
    closing = asyncio.create_task(database.dispose())
    await asyncio.wait([closing], timeout=0.3)  # long enough for one that does not wait
    assert not closing.done()
    await rival.commit()
    await closing

    assert keyed.done()
    assert (await keyed).id == rival.generation.id


@ON_SERVERS
async def test_a_writer_that_is_stopped_while_it_waits_for_a_key_tells_its_caller(
    database, rival, monkeypatch
):
    transact = database.transact

    async def stopped_if_patient(work, **options):
        if work.keywords["lock_timeout"] is None:
            raise asyncio.CancelledError
        return await transact(work, **options)

    monkeypatch.setattr(database, "transact", stopped_if_patient)
    with pytest.raises(NoAnswerError):
        await enqueue("rain", idempotency_key="k")


@ON_SERVERS
async def test_one_that_waits_apart_while_others_are_tried_alone_is_not_forgotten(
    database, rival, monkeypatch
):
    transact = database.transact

    async def too_slow_together(work, **options):
        if len(work.keywords["rows"]) > 1:
            slow = SimpleNamespace(sqlstate="57014")
            raise DatabaseUnavailableError("x", "y") from DBAPIError("", None, slow)
        return await transact(work, **options)

    monkeypatch.setattr(database, "transact", too_slow_together)
    keyed = asyncio.create_task(enqueue("rain", idempotency_key="k"))
    others = [enqueue("sun", idempotency_key="j"), enqueue("snow")]
    assert [row.prompt for row in await asyncio.gather(*others)] == ["sun", "snow"]
    assert not keyed.done()
    await rival.commit()

    assert (await keyed).id == rival.generation.id


@ON_SERVERS
async def test_a_short_wait_for_a_key_leaves_no_setting_behind(database):
    async def read_setting(session):
        return await session.scalar(text("SHOW lock_timeout"))

    await asyncio.gather(*[enqueue("rain", idempotency_key=f"k{number}") for number in range(4)])
    assert await database.transact(read_setting) == "0"

    async with database.session() as session:
        await session.execute(text("SET LOCAL lock_timeout = '7s'"))
        await enqueue("rain", idempotency_key="a", session=session)
        await enqueue_many([{"prompt": "rain", "idempotency_key": "b"}, "sun"], session=session)
        assert await read_setting(session) == "7s"


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


@pytest.mark.parametrize("name", CLIP_COLUMNS)
def test_a_clip_needs_more_than_one_statement(name):
    row = dict.fromkeys(["idempotency_key", *CLIP_COLUMNS])

    assert is_single([row, {**row, "idempotency_key": "k"}])
    assert not is_single([row, {**row, name: "x"}])


def waiting(database):
    return database._connections.here().inserts._waiting
