"""Waking up by PostgreSQL's notifications, by both drivers; and everything works without them."""

import asyncio
import sys
from contextlib import asynccontextmanager
from types import SimpleNamespace

import anyio
import pytest

from dgx_music import (
    cancel_generation,
    enqueue,
    pause,
    resume,
    retry_generation,
    wait_for_generation,
)
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.config import load_settings
from dgx_music.storage import close_db, init_db, queue
from dgx_music.storage.connection import notifications
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database
from dgx_music.worker.worker import Worker
from tests.factories import (
    MODEL,
    POSTGRES,
    add_generation,
    back_date,
    claim_one,
    completion_of,
    on,
    read,
    rescue_lapsed,
    start_one,
)
from tests.fakes import FakeEngine
from tests.patience import PATIENCE
from tests.proxy import Proxy

pytestmark = on(*POSTGRES)

LONG = 600.0


@asynccontextmanager
async def listening(database, topic=None, keys=()):
    """Give a subscription; the first one only once it has heard that the connection listens."""
    is_first = not database.changes._subscriptions
    with anyio.fail_after(2 * PATIENCE), database.changes.subscribe(topic, keys) as subscription:
        if is_first:
            await subscription.wait(LONG)
        yield subscription


async def is_woken(subscription):
    """Return whether the subscription hears of a change, however long that takes on a busy machine."""
    with anyio.move_on_after(PATIENCE):
        await subscription.wait(LONG)
        return True
    return False


async def enqueue_one(session):
    await enqueue("lofi rain", session=session, model=MODEL)


async def release_one(session):
    await queue.release(session, [await claim_one(session)])


async def retry_one(session):
    await retry_generation((await add_generation(session, status="failed")).id, session=session)


async def rescue_one(session):
    lease = await claim_one(session)
    await back_date(session, lease.generation_id, lease_expires_at=1)
    await rescue_lapsed(session)


@pytest.mark.parametrize("move", [enqueue_one, release_one, retry_one, rescue_one])
async def test_whatever_makes_work_wakes_who_waits_for_work_of_its_model(database, move):
    async with database.session() as session:
        await add_generation(session)
    async with listening(database, Topic.WORK, [MODEL]) as subscription:
        async with database.session() as session:
            await move(session)

        assert await is_woken(subscription)


async def complete_one(session):
    await queue.complete(session, [completion_of(await claim_one(session))])


async def fail_one(session):
    await queue.fail(session, await claim_one(session), "no GPU", retry_in_seconds=None)


async def cancel_one(session):
    await queue.cancel(session, (await add_generation(session)).id)


@pytest.mark.parametrize("move", [complete_one, fail_one, cancel_one])
async def test_whatever_ends_a_generation_wakes_who_waits_for_its_end(database, move):
    async with database.session() as session:
        await add_generation(session)
    async with listening(database, Topic.DONE) as subscription:
        async with database.session() as session:
            await move(session)

        assert await is_woken(subscription)


async def test_a_request_to_cancel_wakes_the_worker_that_runs_it_and_no_other(database):
    lease = await start_one(database)
    async with (
        listening(database, Topic.CANCEL, ["worker-1"]) as own,
        listening(database, Topic.CANCEL, ["x"]) as other,
    ):
        async with database.session() as session:
            await queue.cancel(session, lease.generation_id)

        await own.wait(LONG)
        assert not other._changed.is_set()


async def test_an_end_of_another_generation_wakes_nobody(database):
    async with database.session() as session:
        ids = [(await add_generation(session)).id for _ in range(2)]
    async with (
        listening(database, Topic.DONE, ids[:1]) as first,
        listening(database, Topic.DONE, ids[1:]) as second,
    ):
        await cancel_in(database, ids[1])
        await second.wait(LONG)

        assert not first._changed.is_set()


async def cancel_in(database, generation_id):
    async with database.session() as session:
        await queue.cancel(session, generation_id)


async def test_nothing_is_heard_of_what_is_rolled_back(database):
    async with database.session() as session:
        row = await add_generation(session)
    async with (
        listening(database, Topic.DONE) as later,
        listening(database, Topic.WORK) as subscription,
    ):
        async with database.session() as session:
            await enqueue_one(session)
            await session.rollback()
        await cancel_in(database, row.id)
        await later.wait(LONG)

        assert not subscription._changed.is_set()


async def test_a_resumption_wakes_workers_of_every_model(default_database):
    await pause()
    async with listening(default_database, Topic.WORK, ["musicgen-large"]) as subscription:
        await resume()

        assert await is_woken(subscription)


async def test_a_waiter_hears_of_the_end_and_does_not_have_to_ask(default_database, monkeypatch):
    monkeypatch.setattr(sys.modules["dgx_music.client.generations"], "_POLL_SECONDS", LONG)
    generation = await enqueue("lofi rain")
    async with listening(default_database):
        waiting = asyncio.create_task(wait_for_generation(generation.id))
        await until(lambda: len(default_database.changes._subscriptions) == 2)
        await cancel_generation(generation.id)

        assert (await waiting).status == "cancelled"


async def until(is_so):
    while not is_so():
        await anyio.sleep(0.005)


async def test_a_connection_that_is_lost_is_made_again_and_its_waiters_look(
    postgres, database_url, monkeypatch
):
    monkeypatch.setattr(notifications, "_RETRY_SECONDS", (0.01,))
    with Proxy(database_url) as proxy:
        database = Database(proxy.url(database_url))
        async with listening(database, Topic.WORK, [MODEL]) as subscription:
            proxy.cut()
            assert await is_woken(subscription)
            async with database.session() as session:
                await enqueue_one(session)

            assert await is_woken(subscription)
        await database.dispose()


async def test_a_connection_that_cannot_be_had_is_tried_again_ever_more_slowly(
    database_url, monkeypatch
):
    waits = []

    async def note(seconds):
        waits.append(seconds)
        if len(waits) == 6:
            raise asyncio.CancelledError

    monkeypatch.setattr(notifications, "asyncio", SimpleNamespace(sleep=note))
    with Proxy(database_url) as proxy:
        proxy.refuse()
        with pytest.raises(asyncio.CancelledError):
            await Database(proxy.url(database_url)).changes._listen_for_ever()

    assert waits == [0.1, 0.5, 1.0, 2.0, 2.0, 2.0]


async def test_a_connection_that_has_fallen_silent_is_given_up(database_url, monkeypatch):
    monkeypatch.setattr(notifications, "_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(notifications, "_RETRY_SECONDS", (0.01,))
    with Proxy(database_url) as proxy:
        database = Database(
            proxy.url(database_url), limits=notifications.Limits(command_seconds=0.3)
        )
        async with listening(database) as subscription:
            proxy.black_hole()
            await until(lambda: proxy.connection_count == 2)
            proxy.heal()

            assert await is_woken(subscription)
        await database.dispose()


async def test_the_connection_ends_with_the_last_who_waits(postgres, database):
    name = database.url.database
    async with listening(database), listening(database):
        assert len(postgres.backend_pids(name)) == 1
    with anyio.fail_after(PATIENCE):
        await until(lambda: not postgres.backend_pids(name))


# workers


@asynccontextmanager
async def at_rest(database, engine):
    """Run a worker that has found nothing to do, and will not look again by itself within the test."""
    settings = load_settings(lease_seconds=300, heartbeat_seconds=100, poll_seconds=LONG)
    worker = Worker(database, engine, MemoryArtifacts(), settings)
    resting, wait = anyio.Event(), worker._claiming._wait_for_work

    async def note_and_wait():
        resting.set()
        await wait()

    worker._claiming._wait_for_work = note_and_wait
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await resting.wait()
        yield
        worker.stop()
        worker.stop()


async def status_after(database, subscription, generation_id):
    """Return the status of the generation once it is finished; looks only when woken."""
    while not (row := await read(database, generation_id)).is_finished:
        assert await is_woken(subscription)
    return row.status


async def test_a_worker_that_has_nothing_to_do_is_woken_by_an_enqueue(database):
    async with listening(database, Topic.DONE) as done, at_rest(database, FakeEngine()):
        async with database.session() as session:
            generation = await enqueue("lofi rain", session=session, model=MODEL)

        assert await status_after(database, done, generation.id) == "completed"


async def test_a_worker_stops_a_generation_at_the_word_that_it_is_cancelled(database):
    engine = FakeEngine()
    engine.hold("lofi rain")
    async with listening(database, Topic.DONE) as done, at_rest(database, engine):
        async with database.session() as session:
            generation = await enqueue("lofi rain", session=session, model=MODEL)
        await engine.started["lofi rain"].wait()
        await cancel_in(database, generation.id)

        assert await status_after(database, done, generation.id) == "cancelled"


# behind a pooler in transaction mode


@pytest.fixture
async def pooled(database_url):
    """The default database, by a URL that says that a pooler is before it."""
    yield await init_db(f"{database_url}?pgbouncer=true")
    await close_db()


async def statements_prepared(database):
    """Return what the one connection in the pool has prepared on the server, the question itself aside."""
    async with database.engine.connect() as connection:
        rows = await connection.exec_driver_sql("SELECT statement FROM pg_prepared_statements")
        return [statement for (statement,) in rows if "pg_prepared_statements" not in statement]


async def test_behind_a_pooler_nothing_is_prepared_and_nobody_listens(pooled):
    for number in range(6):
        await enqueue(f"rain {number % 2}")
    with pooled.changes.subscribe():
        assert pooled.changes._listening is None

    assert await statements_prepared(pooled) == []


async def test_behind_a_pooler_a_waiter_asks_now_and_then(pooled, monkeypatch):
    monkeypatch.setattr(sys.modules["dgx_music.client.generations"], "_POLL_SECONDS", 0.01)
    generation = await enqueue("lofi rain")
    waiting = asyncio.create_task(wait_for_generation(generation.id))
    await asyncio.sleep(0)
    await cancel_generation(generation.id)

    with anyio.fail_after(PATIENCE):
        assert (await waiting).status == "cancelled"


async def test_behind_a_pooler_a_worker_does_all_its_work(pooled):
    ids = [(await enqueue(f"rain {number}", duration=0.08, model=MODEL)).id for number in range(5)]
    settings = load_settings(poll_seconds=0.1)
    await Worker(pooled, FakeEngine(), MemoryArtifacts(), settings).run(drain=True)

    assert {(await read(pooled, generation_id)).status for generation_id in ids} == {"completed"}


async def test_who_subscribes_right_after_the_last_one_has_left_is_told_as_well(database):
    async with listening(database):
        pass
    async with listening(database, Topic.WORK) as subscription:
        async with database.session() as session:
            await enqueue_one(session)
        assert await is_woken(subscription)


async def test_a_worker_is_not_told_of_every_end(database, monkeypatch):
    heard, wake = [], database.changes._wake

    def note(topic, key):
        heard.append(topic)
        wake(topic, key)

    monkeypatch.setattr(database.changes, "_wake", note)
    lease = await start_one(database)
    async with listening(database, Topic.WORK) as subscription:
        async with database.session() as session:
            await queue.complete(session, [completion_of(lease)])
        async with database.session() as session:
            await enqueue_one(session)
        assert await is_woken(subscription)
    assert {*heard} == {Topic.WORK}


async def test_who_waits_for_an_end_beside_a_worker_is_told(database):
    lease = await start_one(database)
    async with listening(database, Topic.WORK), listening(database, Topic.DONE) as end:
        assert await is_woken(end)  # the connection that hears more listens
        async with database.session() as session:
            await queue.complete(session, [completion_of(lease)])
        assert await is_woken(end)


async def test_who_waits_for_a_generation_is_woken_by_its_end_only(default_database):
    async with default_database.session() as session:
        generation = await enqueue("lofi rain", session=session, model=MODEL)
    waiting = asyncio.create_task(wait_for_generation(generation.id, timeout=20))
    while not (subscriptions := default_database.changes._subscriptions):
        await asyncio.sleep(0.01)
    [subscription] = subscriptions
    wanted = [
        subscription.wants(Topic.DONE, generation.id),
        subscription.wants(Topic.DONE, "another"),
    ]
    waiting.cancel()
    assert [*wanted, subscription.wants(Topic.WORK, MODEL)] == [True, False, False]
