"""Transactions of our own take a short way to the driver; what they do is what any session does."""

import asyncio
import sqlite3
from contextlib import AsyncExitStack
from contextvars import ContextVar

import pytest
from sqlalchemy import Integer, bindparam, event, func, select, text
from sqlalchemy.exc import DBAPIError, OperationalError, StatementError

from dgx_music.client.requests import plan, read_clips
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import Database, due, queue, repository
from dgx_music.storage.connection.direct import AsyncpgSession, DirectSession
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.connection.sqlite_thread import ThreadSession
from dgx_music.storage.insertion import insert_generations
from dgx_music.storage.models import Generation, Prompt
from dgx_music.storage.prepared import Prepared
from dgx_music.storage.prompts import count_overlooked_prompts
from tests.factories import SQLITE, add_generation, completion_of, on, read, read_all

WISH = {
    "duration": 2.5,
    "seed": 2**53 + 1,
    "guidance_scale": 1.5,
    "priority": -3,
    "tenant": "ö",
    "metadata": {"order": [1, None, {"é": 0.1}]},
    "run_at": "2020-01-31T12:00:00.123456+01:00",
}


async def on_the_short_way(database, work):
    """Do the work in a transaction of our own."""
    seen = []

    async def run(session):
        seen.append(isinstance(session, DirectSession))
        return await work(session)

    done = await database.transact(run, is_single=True)
    assert seen == [database.is_embedded or database.url.get_driver_name() == "asyncpg"]
    return done


async def on_the_long_way(database, work):
    """Do the work in a session such as anybody's."""
    async with database.session() as session:
        return await work(session)


WAYS = pytest.mark.parametrize("way", [on_the_short_way, on_the_long_way])


def rows_of(*prompts, **options):
    return read_clips([plan(prompt, options) for prompt in prompts]).rows


def insert(rows):
    async def work(session):
        return await insert_generations(session, rows, {})

    return work


def claim(**options):
    async def work(session):
        wish = {"worker_id": "w", "model_name": "musicgen-small", "limit": 10, "lease_seconds": 30}
        return await queue.claim(session, **wish, **options)

    return work


def complete(*completions):
    async def work(session):
        return await queue.complete(session, completions)

    return work


def without(row, *names):
    return {name: value for name, value in row.items() if name not in names}


@WAYS
async def test_the_object_of_a_new_row_is_what_is_stored(database, way):
    (made,) = await way(database, insert(rows_of("rain", **WISH)))

    stored = await read(database, made.id)
    assert made.to_dict() == stored.to_dict()
    assert {name: type(value) for name, value in made.to_dict().items()} == {
        name: type(value) for name, value in stored.to_dict().items()
    }


async def test_both_ways_store_and_claim_and_complete_the_same(database):
    seen = []
    for way in (on_the_short_way, on_the_long_way):
        (made,) = await way(database, insert(rows_of("rain", **WISH)))
        (claimed,) = await way(database, claim())
        facts = completion_of(
            claimed.lease, file_path="a.wav", audio={"peak": 0.5, "nan": float("nan")}
        )
        assert await way(database, complete(facts)) == {claimed.lease}
        row = (await read(database, made.id)).to_dict()
        times = ("id", "created_at", "started_at", "completed_at")
        async with database.session(read_only=True) as session:
            (attempt,) = await repository.get_attempts(session, made.id)
        ended = without(attempt.to_dict(), "generation_id", "started_at", "finished_at")
        seen.append((without(row, *times), without(vars(claimed), "lease"), ended))

    assert seen[0][0] == seen[1][0]
    assert seen[0][1:] == seen[1][1:]
    assert seen[0][0]["run_at"] == "2020-01-31T11:00:00.123456+00:00"
    assert seen[0][0]["metadata"]["audio"] == {"peak": 0.5, "nan": None}


@WAYS
async def test_a_stale_attempt_completes_nothing(database, way):
    await way(database, insert(rows_of("rain")))
    (first,) = await way(database, claim())
    await database.transact(lambda session: queue.release(session, [first.lease]))
    (second,) = await way(database, claim())

    assert await way(database, complete(completion_of(first.lease))) == set()
    assert (await read(database, first.lease.generation_id)).status == "processing"
    assert await way(database, complete(completion_of(second.lease))) == {second.lease}


@WAYS
async def test_a_request_to_cancel_refuses_a_completion(database, way):
    await way(database, insert(rows_of("rain")))
    (claimed,) = await way(database, claim())
    await database.transact(lambda session: queue.cancel(session, claimed.lease.generation_id))

    assert await way(database, complete(completion_of(claimed.lease))) == set()


@WAYS
async def test_a_completion_said_twice_is_answered_twice(database, way):
    await way(database, insert(rows_of("rain")))
    (claimed,) = await way(database, claim())
    said = complete(completion_of(claimed.lease))

    assert await way(database, said) == await way(database, said) == {claimed.lease}


@WAYS
async def test_many_rows_are_claimed_in_their_order(database, way):
    rows = [row for p in (1, 5, 3) for row in rows_of(f"rain {p}", priority=p)]
    await way(database, insert(rows))

    assert [each.prompt for each in await way(database, claim())] == ["rain 5", "rain 3", "rain 1"]
    assert await way(database, claim()) == []


async def test_a_claim_within_a_tenants_limit(database):
    await database.transact(insert(rows_of("a", "b", "c", tenant="x")))

    assert len(await database.transact(claim(tenant_limit=2))) == 2
    assert await database.transact(claim(tenant_limit=2)) == []


@WAYS
async def test_every_use_of_a_prompt_is_counted(database, way):
    await way(database, insert(rows_of("rain", "sun", "rain")))
    await way(database, insert(rows_of("rain")))

    assert await read_all(database, select(Prompt.used_count).order_by(Prompt.text)) == [3, 1]
    words = await read_all(database, select(Prompt.search_text).order_by(Prompt.text))
    assert words == ["rain", "sun"]


async def test_what_the_work_wants_beside_prepared_statements(database):
    async def work(session):
        generation = await add_generation(session)
        generation.set_metadata({"a": 1})
        async with session.begin_nested():
            session.add(Prompt(text="sun"))
        assert await session.scalar(select(Prompt.text)) == "sun"
        assert await session.get(Generation, generation.id) is generation
        return generation.id

    made = await database.transact(work)

    assert (await read(database, made)).get_metadata() == {"a": 1}


async def test_an_error_of_the_work_undoes_it(database):
    async def work(session):
        await add_generation(session)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await database.transact(work)

    assert await read_all(database, select(Generation.id)) == []
    await database.transact(insert(rows_of("rain")))  # and nothing is left locked


async def test_a_mistake_in_a_statement_is_the_callers_and_the_connection_stays(database):
    dropped = []
    event.listen(database.engine.sync_engine, "invalidate", lambda *call: dropped.append(call))
    wrong = [{**row, "model_name": None} for row in rows_of("rain")]

    with pytest.raises(DBAPIError, match=r"(?i)null"):
        await database.transact(insert(wrong), is_single=True)

    assert dropped == []
    assert len(await database.transact(insert(rows_of("rain")))) == 1


@on("asyncpg")
async def test_a_lost_connection_costs_all_that_are_as_old(database):
    """One network has lost them all: each would take a whole timeout to find that out."""
    async with AsyncExitStack() as stack:
        for _ in range(3):
            session = await stack.enter_async_context(database.session())
            await session.execute(text("SELECT 1"))
    made = []
    event.listen(database.engine.sync_engine, "connect", lambda *call: made.append(call))

    async def work(session):
        return await session.fetch("SELECT pg_terminate_backend(pg_backend_pid())", [])

    with pytest.raises(DatabaseUnavailableError):
        await database.transact(work, is_single=True)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            session = await stack.enter_async_context(database.session())
            await session.execute(text("SELECT 1"))

    assert len(made) == 3


@on("asyncpg", "psycopg")
async def test_a_server_that_only_reads_now_costs_the_connection(database):
    dropped = []
    event.listen(database.engine.sync_engine, "invalidate", lambda *call: dropped.append(call))

    async with database.session() as session:
        await session.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
    with pytest.raises(DatabaseUnavailableError):
        await database.transact(insert(rows_of("rain")), is_single=True)

    assert len(dropped) == 1


@on(SQLITE)
async def test_a_transaction_that_has_ended_executes_nothing_more(database):
    async def work(session):
        await insert(rows_of("rain"))(session)
        await session.rollback()
        await insert(rows_of("sun"))(session)

    with pytest.raises(RuntimeError, match="the transaction has ended"):
        await database.transact(work)

    assert await read_all(database, select(Generation.id)) == []


async def test_a_parameter_that_is_forgotten_is_an_error(database):
    statement = Prepared(lambda: select(bindparam("needed", type_=Integer).label("needed")))

    with pytest.raises((KeyError, StatementError)):
        await database.transact(lambda session: statement.rows(session, {}), is_single=True)


@on(SQLITE)
async def test_the_work_of_a_transaction_may_wait_for_nothing_else(database):
    async def work(session):
        await insert(rows_of("rain"))(session)
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="only await the calls of its session"):
        await database.transact(work)

    assert await read_all(database, select(Generation.id)) == []


@on(SQLITE)
async def test_the_work_sees_the_callers_context(database):
    name = ContextVar("name", default="")
    name.set("rain")

    async def work(_session):
        return name.get()

    assert await database.transact(work) == "rain"


@on(SQLITE)
async def test_a_reading_transaction_may_not_write(database):
    with pytest.raises(OperationalError, match="readonly"):
        await database.transact(insert(rows_of("rain")), read_only=True)


@on(SQLITE)
async def test_the_write_lock_is_held_from_the_beginning(database):
    async def work(session):
        assert isinstance(session, ThreadSession)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")

    other = sqlite3.connect(database.path, timeout=0, isolation_level=None, check_same_thread=False)
    await database.transact(work)
    other.close()


@on("asyncpg")
async def test_a_lost_connection_is_told_and_replaced(database):
    async def work(session):
        assert isinstance(session, AsyncpgSession)
        return await session.fetch("SELECT pg_terminate_backend(pg_backend_pid())", [])

    dropped = []
    event.listen(database.engine.sync_engine, "invalidate", lambda *call: dropped.append(call))
    with pytest.raises(DatabaseUnavailableError) as told:
        await database.transact(work, is_single=True)

    assert told.value.__cause__.connection_invalidated
    assert len(dropped) == 1
    assert len(await database.transact(insert(rows_of("rain")), is_single=True)) == 1


async def test_one_connection_is_enough_for_a_claim_that_looks_first(database_url):
    database = Database(database_url, limits=Limits(pool_size=1, command_seconds=3))
    await database.transact(insert(rows_of("rain", "sun")))

    async def work(session):
        share = await due.fair_share(session, "musicgen-small", 2, workers=2)
        return share, await claim()(session)

    share, claims = await database.transact(work, is_single=True)
    await database.dispose()

    assert (share, len(claims)) == (1, 2)


@on("asyncpg", "psycopg")
async def test_an_error_with_a_replica_is_told_as_without_one(database_url):
    limits = Limits(statement_seconds=0.2)
    database = Database(database_url, replica_url=f"{database_url}_replica", limits=limits)

    async def work(session):
        return await Prepared(lambda: select(func.pg_sleep(5).label("slept"))).rows(session, {})

    with pytest.raises(DatabaseUnavailableError, match="statement timeout"):
        await database.transact(work, is_single=True)
    await database.dispose()


@on("asyncpg", "psycopg")
async def test_a_prompt_that_one_caller_has_to_wait_for_fails_that_caller_alone(database_url):
    database = Database(database_url, limits=Limits(statement_seconds=1))
    async with database.session() as session:
        session.add(Prompt(text="rain"))
        await session.flush()
        prompts = ("sun", "rain", "snow", "wind")
        calls = [database.insert(rows_of(prompt), {}) for prompt in prompts]
        made = await asyncio.gather(*calls, return_exceptions=True)
        await session.rollback()
    stored = sorted(await read_all(database, select(Generation.prompt)))
    await database.dispose()

    assert [isinstance(each, list) for each in made] == [True, False, True, True]
    assert isinstance(made[1], DatabaseUnavailableError)
    assert stored == ["snow", "sun", "wind"]


@on("asyncpg", "psycopg")
async def test_a_race_of_keys_takes_back_only_what_it_counted(database):
    await database.transact(insert(rows_of("rain", "rain", "rain")))
    async with database.session() as session:
        await insert(rows_of("rain", idempotency_key="k"))(session)
        second = asyncio.create_task(database.insert(rows_of("rain", idempotency_key="k"), {}))
        await asyncio.sleep(0.2)
    await second
    await database.transact(count_overlooked_prompts)

    assert await read_all(database, select(Prompt.used_count)) == [4]
