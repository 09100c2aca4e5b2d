"""One database on several event loops, one after another and at once, and on both sides of a fork."""

import asyncio
import gc
import threading

import pytest
from sqlalchemy import func, select

from dgx_music import enqueue, init_db, wait_for_generation
from dgx_music.client.generations import cancel_generation
from dgx_music.storage import close_db
from dgx_music.storage.connection import connections as connections_module
from dgx_music.storage.connection.snapshots import snapshot
from dgx_music.storage.database import get_database
from dgx_music.storage.models import Generation
from tests.factories import POSTGRES, SQLITE, Program, on, read_all


@pytest.fixture(autouse=True)
def _default(database_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)
    yield
    with asyncio.Runner() as runner:
        runner.run(close_db())
    gc.collect()  # what was left open complains now


@pytest.fixture
def backends(request, database_url):
    """Return how many connections the server has of this database."""
    postgres = request.getfixturevalue("postgres")
    return lambda: len(postgres.backend_pids(database_url.rpartition("/")[2]))


def run(call):
    with asyncio.Runner() as runner:
        return runner.run(call)


def run_and_close_at_once(call):
    """End an event loop without closing its asynchronous generators."""
    loop = asyncio.new_event_loop()
    result = loop.run_until_complete(call)
    loop.close()
    return result


async def count():
    return (await read_all(get_database(), select(func.count()).select_from(Generation)))[0]


@pytest.mark.parametrize("on_a_loop", [run, run_and_close_at_once])
def test_event_loops_one_after_another_share_the_default_database(on_a_loop):
    for number in range(3):
        on_a_loop(enqueue(f"rain {number}"))

    assert on_a_loop(count()) == 3


def test_init_db_on_one_event_loop_serves_another(database_url):
    database = run(init_db(database_url))
    run(enqueue("rain"))

    assert (run(count()), get_database()) == (1, database)


@on(*POSTGRES)
def test_an_event_loop_that_ends_leaves_no_connection(backends):
    run(enqueue("rain"))

    assert until_none_is_left(backends) == 0


@on(*POSTGRES)
def test_event_loops_that_are_closed_at_once_leave_the_last_ones_connections_only(backends):
    for number in range(8):
        run_and_close_at_once(enqueue(f"rain {number}"))

    assert backends() <= 2


def until_none_is_left(backends):
    """The server takes a moment to end what was told to end."""
    for _ in range(1000):
        if not (left := backends()):
            return 0
    return left


def in_threads(count, work):
    errors = []

    def call(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=call, args=[number]) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("on_a_loop", [run, run_and_close_at_once])
def test_event_loops_in_several_threads_at_once_share_the_default_database(on_a_loop):
    def work(number):
        for _ in range(3):
            on_a_loop(enqueue(f"rain {number}"))

    assert in_threads(4, work) == []
    assert run(count()) == 12


def test_a_set_that_another_thread_adds_to_meanwhile_is_read_again():
    class Grown(list):
        def __iter__(self):
            if len(self) == 1:
                self.append(2)
                raise RuntimeError("Set changed size during iteration")
            return super().__iter__()

    assert snapshot(Grown([1])) == [1, 2]


def test_an_event_loop_that_another_thread_forgot_meanwhile_is_passed_over(database_url):
    ended = asyncio.new_event_loop()
    ended.close()

    class Emptied(dict):
        def __iter__(self):
            return iter([ended])

    database = run(init_db(database_url))
    database._connections._by_loop = Emptied()

    assert run(count()) == 0


async def test_connections_that_are_closed_late_take_no_others_with_them(database_url):
    connections = (await init_db(database_url))._connections
    connections.here()
    ((_, closing),) = connections._by_loop.values()
    connections._by_loop.clear()
    later = connections.here()
    await closing.aclose()

    assert connections.here() is later
    await close_db()


async def test_an_event_loop_that_ends_just_now_has_closed_its_connections_itself():
    ending, begun = asyncio.new_event_loop(), []
    ending.close()

    async def generate():
        begun.append(True)
        yield

    await connections_module._close_elsewhere(ending, generate())

    assert begun == []


def test_a_waiter_on_another_event_loop_is_woken():
    row = run(enqueue("rain"))

    async def wait_and_cancel():
        waiting = asyncio.create_task(wait_for_generation(row.id, timeout=30))
        await asyncio.sleep(0)
        await cancel_generation(row.id)
        return (await waiting).status

    assert run(wait_and_cancel()) == "cancelled"


def test_a_waiter_that_its_event_loop_leaves_behind_is_forgotten():
    row = run(enqueue("rain"))

    async def leave():
        left.append(asyncio.create_task(wait_for_generation(row.id)))
        await enqueue("more rain")

    left = []
    run(leave())

    assert run(count()) == 2


async def test_closing_closes_what_other_running_event_loops_have_open(database_url):
    database, opened, done = await init_db(database_url), threading.Event(), threading.Event()

    async def hold():
        pool = database.engine.pool
        await enqueue("rain")
        opened.set()
        await asyncio.to_thread(done.wait, 30)
        return pool.checkedin()

    held = asyncio.create_task(asyncio.to_thread(run, hold()))
    await asyncio.to_thread(opened.wait, 30)
    await close_db()
    done.set()

    assert await held == 0


async def test_parent_and_child_both_go_on_after_a_fork_beside_a_waiter(database_url):
    program = await Program.start("fork_beside_a_waiter", database_url)
    program.begin()
    told = await asyncio.wait_for(program.rest(), 90)

    assert told == [0, 0, 0, ["cancelled", 13]]


async def test_a_child_that_ends_in_pythons_own_way_disturbs_nobody(database_url):
    program = await Program.start("fork_between_runs", database_url)
    program.begin()
    told = await asyncio.wait_for(program.rest(), 90)

    assert told == [0, 0, 0, 7]


@on(SQLITE)
async def test_a_fork_inside_a_transaction_is_refused_in_the_child(database_url):
    program = await Program.start("fork_in_a_session", database_url)
    program.begin()
    told = await asyncio.wait_for(program.rest(), 90)

    assert "forked while a transaction was open in it" in told[0]
    assert told[1] == 1
