"""What must hold while the database is away: real daemons, a durable server, a proxy in front of it."""

import os
import secrets
import signal
import time
from contextlib import AsyncExitStack, suppress

import anyio
import pytest
from sqlalchemy import text, update

from dgx_music import enqueue, enqueue_many
from dgx_music.artifacts import LocalArtifacts
from dgx_music.config import load_settings
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.database import Database
from dgx_music.storage.models import Generation, WorkerInfo
from dgx_music.storage.schema import now_plus
from dgx_music.storage.workers import register_worker
from dgx_music.worker.worker import Worker
from tests.daemons import (
    add,
    add_many,
    attempts_of,
    check_everything_is_true,
    is_finished,
    is_running,
    rows_of,
    until,
    until_all,
    until_registered,
    url_of,
)
from tests.factories import MODEL, back_date, start_one
from tests.fakes import FakeEngine
from tests.patience import PATIENCE
from tests.postgres import OwnServer
from tests.proxy import Proxy

BOTH_DRIVERS = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
ON_ASYNCPG = pytest.mark.parametrize("driver", ["asyncpg"])
MOSTLY_ASYNCPG = pytest.mark.parametrize(
    "driver", ["asyncpg", pytest.param("psycopg", marks=pytest.mark.soak)]
)
ON_PSYCOPG = pytest.mark.parametrize("driver", ["psycopg"])
QUICK = {"lease_seconds": 3.0, "heartbeat_seconds": 0.3, "timeout_seconds": 2.0}
LIMITS = Limits(connect_seconds=1.0, statement_seconds=1.0, command_seconds=1.0)
DESCRIBED = {
    "id": "new",
    "host": "here",
    "pid": 1,
    "model_name": MODEL,
    "models": [MODEL],
    "device": "cpu",
    "slots": 1,
    "lease_seconds": 30.0,
}
CLAIMS = b"INSERT INTO attempts"
BEATS = b"heartbeat_at"
COMPLETES = b"generation_time_seconds"


@pytest.fixture(scope="module")
def server():
    """A server whose commits outlive its crashes; the disk need not hear of them, since nobody cuts the power."""
    server = OwnServer.start(durable=True)
    server.execute("ALTER SYSTEM SET fsync = off")
    server.execute("SELECT pg_reload_conf()")
    yield server
    server.close()


@pytest.fixture(scope="module")
def template(server):
    async def migrate():
        database = Database(server.create_database("template"))
        await database.migrate()
        await database.dispose()

    anyio.run(migrate)
    return "template"


@pytest.fixture
async def database(server, template, driver):
    """A database of this test, straight to the server; whatever becomes of the server, it runs again at the end."""
    name = f"test_{secrets.token_hex(4)}"
    url = server.create_database(name, template=template)
    # or a crash would set the copy's sequences back, which no original's ever are
    server.execute("CHECKPOINT")
    database = Database(url.replace("postgresql://", f"postgresql+{driver}://"), limits=LIMITS)
    yield database
    await database.dispose()
    if not server.is_running:
        server.start_again()


@pytest.fixture
def proxy(server, database):
    with Proxy(server.url("postgres")) as proxy:
        yield proxy


@pytest.fixture
def proxied(proxy, database):
    """The URL of the test's database by way of the proxy."""
    return proxy.url(url_of(database))


def new_worker(database, folder):
    return Worker(database, FakeEngine(), LocalArtifacts(folder), load_settings())


async def until_in_hand(database, daemons, count):
    """Return once these daemons have said of so many generations that they started."""
    with anyio.fail_after(PATIENCE):
        while sum(daemon.said().count(": started") for daemon in daemons) < count:
            await anyio.sleep(0.05)


async def check_the_outage_cost_nothing(database, folder, count):
    """All is true, nothing failed, and what was claimed more than once was given back before it began."""
    await check_everything_is_true(database, folder, count)
    assert {attempt.outcome for attempt in await attempts_of(database)} <= {"completed", "released"}
    assert {row.failures for row in (await rows_of(database)).values()} == {0}


async def check_nothing_ran_twice(database, folder, count):
    await check_everything_is_true(database, folder, count)
    assert [(attempt.attempt, attempt.outcome) for attempt in await attempts_of(database)] == [
        (1, "completed")
    ] * count


def check_all_live(daemons):
    assert [daemon.process.poll() for daemon in daemons] == [None] * len(daemons)


# -------------------------------------------------------------------------------------------------- the server goes


@MOSTLY_ASYNCPG
async def test_a_server_that_crashes_in_mid_drain_costs_nothing(
    database, tmp_path, start, script, server
):
    await add_many(database, 60)
    path = script({"do": "wait", "seconds": 0.3})
    daemons = [start("--drain", script=path, slots=3, **QUICK) for _ in range(2)]
    await until_in_hand(database, daemons, 12)
    server.stop("immediate")
    await anyio.sleep(0.5)
    server.start_again()
    await until_all(database, is_finished)
    assert [daemon.wait() for daemon in daemons] == [0, 0]
    await check_the_outage_cost_nothing(database, tmp_path, 60)


@ON_PSYCOPG
async def test_a_server_away_for_three_leases_under_three_workers_costs_nothing(
    database, tmp_path, start, script, server
):
    """Of what runs, a third ends in the outage and waits for its completion, the rest runs through and ends after."""
    await add_many(database, 9)
    path = script(
        {"prompt": "[036]$", "do": "wait", "seconds": 2.0}, {"do": "wait", "seconds": 12.0}
    )
    daemons = [start(script=path, slots=3, **QUICK) for _ in range(3)]
    await until_in_hand(database, daemons, 9)
    server.stop("immediate")
    await anyio.sleep(3 * QUICK["lease_seconds"])
    check_all_live(daemons)
    server.start_again()
    await until_all(database, is_finished)
    check_all_live(daemons)
    await check_nothing_ran_twice(database, tmp_path, 9)


@ON_PSYCOPG
async def test_backends_that_are_ended_one_after_the_other_cost_nothing(
    database, tmp_path, start, script, server
):
    await add_many(database, 40)
    daemons = [
        start("--drain", script=script({"do": "wait", "seconds": 0.3}), slots=2, **QUICK)
        for _ in range(2)
    ]
    await until_in_hand(database, daemons, 4)
    while not all(map(is_finished, (await rows_of(database)).values())):
        pids = server.backend_pids(database.url.database)
        server.execute(f"SELECT pg_terminate_backend({secrets.choice(pids)})")
        await anyio.sleep(0.1)
    assert [daemon.wait() for daemon in daemons] == [0, 0]
    await check_the_outage_cost_nothing(database, tmp_path, 40)


@ON_ASYNCPG
@pytest.mark.soak
async def test_a_backend_killed_with_all_the_others_in_its_wake_costs_nothing(
    database, tmp_path, start, script, server
):
    """PostgreSQL ends all its backends and recovers when one of them dies of a signal."""
    await add_many(database, 40)
    daemons = [
        start("--drain", script=script({"do": "wait", "seconds": 0.3}), slots=2, **QUICK)
        for _ in range(2)
    ]
    await until_in_hand(database, daemons, 8)
    os.kill(secrets.choice(server.backend_pids(database.url.database)), signal.SIGKILL)
    await until_all(database, is_finished)
    assert [daemon.wait() for daemon in daemons] == [0, 0]
    await check_the_outage_cost_nothing(database, tmp_path, 40)


@ON_ASYNCPG
async def test_a_worker_that_starts_after_an_outage_leaves_alone_what_others_are_about_to_renew(
    database, tmp_path, start, script, server
):
    settings = QUICK | {"lease_seconds": 6.0}
    await add(database)
    former = start(script=script({"do": "wait", "seconds": 12.0}), **settings)
    await until_in_hand(database, [former], 1)
    former.send(signal.SIGSTOP)
    server.stop("immediate")
    await anyio.sleep(6.5)
    server.start_again()
    fresh = start(**settings)
    await fresh.says("serves")
    await anyio.sleep(1.0)
    former.send(signal.SIGCONT)
    await until_all(database, is_finished)
    await check_nothing_ran_twice(database, tmp_path, 1)


@ON_PSYCOPG
async def test_a_new_worker_waits_for_the_slowest_of_those_that_an_outage_has_silenced(
    database, tmp_path
):
    """One of them is heard again already, which says nothing of the other."""
    lease = await start_one(database)
    async with database.session() as session:
        await back_date(session, lease.generation_id, lease_expires_at=30)
        for name in ("slow", "quick"):
            await register_worker(session, **DESCRIBED | {"id": name})
        await session.execute(
            update(WorkerInfo).where(WorkerInfo.id == "slow").values(heartbeat_at=now_plus(-60))
        )
        await session.execute(Generation.__table__.update().values(worker_id="slow"))
    await new_worker(database, tmp_path)._sweeping.rescue()
    assert is_running((await rows_of(database))[lease.generation_id])


@ON_PSYCOPG
async def test_a_new_worker_rescues_at_once_where_nobody_is_silent(database, tmp_path):
    lease = await start_one(database)
    async with database.session() as session:
        await back_date(session, lease.generation_id, lease_expires_at=30)
        await register_worker(session, **DESCRIBED | {"id": "other"})
    await new_worker(database, tmp_path)._sweeping.rescue()
    assert not is_running((await rows_of(database))[lease.generation_id])


@ON_PSYCOPG
async def test_a_worker_told_to_stop_in_an_outage_stops(database, start, script, server):
    await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 30.0}), grace_seconds=1.0, **QUICK)
    await until_in_hand(database, [daemon], 1)
    server.stop("immediate")
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0


# ------------------------------------------------------------------------------------------------- the network goes


@BOTH_DRIVERS
async def test_a_network_that_swallows_all_for_longer_than_the_lease_costs_nothing(
    database, tmp_path, start, script, proxy, proxied
):
    await add_many(database, 9)
    path = script(
        {"prompt": "[02468]$", "do": "wait", "seconds": 1.0}, {"do": "wait", "seconds": 9.0}
    )
    daemons = [start(url=proxied, script=path, slots=3, **QUICK) for _ in range(2)]
    await until_in_hand(database, daemons, 6)
    proxy.black_hole()
    await anyio.sleep(2 * QUICK["lease_seconds"])
    check_all_live(daemons)
    proxy.heal()
    await until_all(database, is_finished)
    check_all_live(daemons)
    await check_the_outage_cost_nothing(database, tmp_path, 9)


@MOSTLY_ASYNCPG
async def test_connections_that_a_network_has_forgotten_cost_no_lease(
    database, tmp_path, start, script, proxy, proxied
):
    """None of the pool's connections answers ever again: they are all given up before the lease has run out."""
    await add_many(database, 6)
    # half of the lease, as by default
    settings = QUICK | {"lease_seconds": 6.0, "timeout_seconds": 3.0}
    daemon = start(url=proxied, script=script({"do": "wait", "seconds": 8.0}), slots=6, **settings)
    await until_in_hand(database, [daemon], 6)
    other = start(**settings)
    await until_registered(database, [other])
    await anyio.sleep(1.0)
    proxy.forget()
    await until_all(database, is_finished)
    await check_nothing_ran_twice(database, tmp_path, 6)


@MOSTLY_ASYNCPG
async def test_a_heartbeat_that_a_network_has_forgotten_half_done_costs_no_lease(
    database, tmp_path, start, script, proxy, proxied
):
    """The server keeps its locks, for which the next heartbeats wait, until it undoes the transaction."""
    await add_many(database, 3)
    settings = QUICK | {"lease_seconds": 8.0}
    daemon = start(
        url=proxied,
        script=script({"do": "wait", "seconds": 10.0}),
        idle_transaction_timeout_seconds=600,
        **settings,
    )
    await until_in_hand(database, [daemon], 3)
    loss = proxy.lose_request(after=BEATS, cut=False)
    other = start(**settings)
    await until_registered(database, [other])
    await loss.wait()
    await until_all(database, is_finished)
    await check_nothing_ran_twice(database, tmp_path, 3)


@MOSTLY_ASYNCPG
async def test_a_worker_behind_a_black_hole_changes_nothing_of_what_another_has_finished(
    database, tmp_path, start, script, proxy, proxied
):
    generation = await add(database)
    cut_off = start(
        url=proxied, script=script({"attempts": [1], "do": "wait", "seconds": 2.0}), **QUICK
    )
    await until_in_hand(database, [cut_off], 1)
    proxy.black_hole()
    start(**QUICK)
    done = await until(database, generation, is_finished)
    proxy.heal()
    await cut_off.says(f"generation {generation.id} attempt 1: lease lost")
    await until_no_file_of(tmp_path, generation, attempt=1)
    await check_everything_is_true(database, tmp_path, 1)
    assert (await rows_of(database))[generation.id].completed_at == done.completed_at
    assert [attempt.outcome for attempt in await attempts_of(database)] == ["lost", "completed"]


async def until_no_file_of(folder, generation, attempt):
    with anyio.fail_after(PATIENCE):
        while (folder / "audio" / f"{generation.id}-{attempt}.wav").exists():
            await anyio.sleep(0.05)


@MOSTLY_ASYNCPG
async def test_a_worker_told_to_stop_in_a_black_hole_stops(database, start, script, proxy, proxied):
    await add(database)
    daemon = start(
        url=proxied, script=script({"do": "wait", "seconds": 30.0}), grace_seconds=1.0, **QUICK
    )
    await until_in_hand(database, [daemon], 1)
    proxy.black_hole()
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0


# -------------------------------------------------------------------------------------------------- a reply is lost


@pytest.mark.parametrize(
    ("driver", "cut"),
    [("asyncpg", True), ("asyncpg", False), ("psycopg", True), ("psycopg", False)],
)
async def test_a_claim_whose_commit_was_not_answered_is_given_back_and_made_at_no_cost(
    database, tmp_path, start, script, proxy, proxied, cut
):
    await add_many(database, 3)
    loss = proxy.lose_reply(after=CLAIMS, cut=cut)
    start(url=proxied, **QUICK)
    await loss.wait()
    await until_all(database, is_finished)
    await check_the_outage_cost_nothing(database, tmp_path, 3)
    assert {attempt.outcome for attempt in await attempts_of(database)} == {"completed", "released"}


@BOTH_DRIVERS
async def test_a_claim_whose_commit_arrives_when_the_worker_has_given_it_up_is_given_back(
    database, tmp_path, start, script, proxy, proxied
):
    await add_many(database, 3)
    loss = proxy.lose_request(after=CLAIMS, cut=False)
    # so long that the server still has the transaction when the commit arrives
    daemon = start(url=proxied, **QUICK | {"lease_seconds": 60.0})
    await loss.wait()
    await daemon.says("cannot claim")
    await until(database, await add(database, "after"), is_finished)
    proxy.deliver(loss)
    await until_all(database, is_finished)
    await check_the_outage_cost_nothing(database, tmp_path, 4)


@pytest.mark.parametrize(
    ("driver", "cut"),
    [("asyncpg", True), ("asyncpg", False), ("psycopg", True), ("psycopg", False)],
)
async def test_a_completion_whose_commit_was_not_answered_is_a_completion(
    database, tmp_path, start, script, proxy, proxied, cut
):
    await add_many(database, 3)
    loss = proxy.lose_reply(after=COMPLETES, cut=cut)
    daemon = start(url=proxied, **QUICK)
    await loss.wait()
    with anyio.fail_after(PATIENCE):
        while daemon.said().count("completed in") < 3:
            await anyio.sleep(0.05)
    await check_nothing_ran_twice(database, tmp_path, 3)


# ----------------------------------------------------------------------------------------------------- the producer


@pytest.fixture
async def producer(proxied):
    database = Database(proxied, limits=LIMITS)
    async with database.session() as session:  # so that there is a connection to be lost
        await enqueue("before", duration=0.1, model=MODEL, session=session)
    yield database
    await database.dispose()


async def prompts_of(database):
    return sorted(row.prompt for row in (await rows_of(database)).values())


@BOTH_DRIVERS
@pytest.mark.parametrize("outage", ["refuse", "black_hole"])
async def test_an_enqueue_in_an_outage_says_so_in_time_and_leaves_no_half(
    database, proxy, producer, outage
):
    getattr(proxy, outage)()
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailableError):
        async with producer.session() as session:
            await enqueue_many(["rain", "snow"], duration=0.1, model=MODEL, session=session)
    assert time.monotonic() - began < 10  # and not as long as by default
    proxy.heal()
    async with producer.session() as session:
        await enqueue("after", duration=0.1, model=MODEL, session=session)
    assert await prompts_of(database) == ["after", "before"]


async def fill_pool(database):
    """Have it keep as many connections as it may."""
    async with AsyncExitStack() as stack:
        for _ in range(database.limits.pool_size):
            session = await stack.enter_async_context(database.session())
            await session.execute(text("SELECT 1"))


@BOTH_DRIVERS
async def test_a_pool_is_closed_in_time_in_a_black_hole(proxy, producer):
    await fill_pool(producer)
    proxy.black_hole()
    began = time.monotonic()
    await producer.dispose()
    assert time.monotonic() - began < 4.5  # each of its five connections might take a second


@BOTH_DRIVERS
async def test_of_connections_that_are_forgotten_together_one_at_most_costs_an_enqueue(
    database, proxy, producer
):
    await fill_pool(producer)
    proxy.forget()
    began = time.monotonic()
    with suppress(DatabaseUnavailableError):
        async with producer.session() as session:
            await enqueue("lost", duration=0.1, model=MODEL, session=session)
    async with producer.session() as session:
        await enqueue("after", duration=0.1, model=MODEL, session=session)
    # one second for each of five, if all were asked
    assert time.monotonic() - began < 4 * LIMITS.command_seconds
    assert {"after", "before"} <= {*await prompts_of(database)}


@BOTH_DRIVERS
async def test_an_enqueue_whose_commit_is_not_answered_is_an_error_and_stored_whole(
    database, proxy, producer
):
    loss = proxy.lose_reply(cut=False)
    with pytest.raises(DatabaseUnavailableError):
        async with producer.session() as session:
            await enqueue_many(["rain", "snow"], duration=0.1, model=MODEL, session=session)
    await loss.wait()
    assert await prompts_of(database) == ["before", "rain", "snow"]
