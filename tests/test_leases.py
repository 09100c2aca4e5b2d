"""Whose leases have lapsed: on every database, whatever becomes of its clock."""

import asyncio
import math
import time
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from sqlalchemy import Interval, func, literal, select, update

from dgx_music import enqueue
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError, DatabaseUnavailableError
from dgx_music.storage import (
    by_hand,
    claims,
    due,
    lease_end,
    leases,
    prompts,
    queue,
    rescue,
    workers,
)
from dgx_music.storage.models import Generation, Speed
from dgx_music.storage.queue import Held, Lease
from dgx_music.storage.schema import now_plus
from dgx_music.worker.sweeping import Watch
from dgx_music.worker.worker import Worker
from tests.factories import (
    MODEL,
    add_generation,
    back_date,
    claim_one,
    read,
    rescue_lapsed,
    start_one,
)
from tests.fakes import FakeEngine

pytestmark = pytest.mark.any_driver

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
ONE = Lease("one", 1)
DESCRIBED = {
    "id": "sweeper",
    "host": "here",
    "pid": 1,
    "model_name": MODEL,
    "models": [MODEL],
    "device": "cpu",
    "slots": 1,
    "lease_seconds": 10.0,
}


def at(seconds):
    return NOON + timedelta(seconds=seconds)


def held(until, length=None):
    return {ONE: Held(at(until), length)}


def new_worker(database=None):
    settings = load_settings(lease_seconds=10.0, heartbeat_seconds=3.0)
    return Worker(database, FakeEngine(), MemoryArtifacts(), settings)


def lapses(worker, held_until, clock, now=None):
    """Return whether the one lease has lapsed at this moment; the database's clock shows the same, if nothing is said."""
    return ONE in worker._sweeping.look(held(held_until), clock, at(clock if now is None else now))


def test_a_lease_says_itself_in_a_log_line():
    assert str(Lease("one", 2)) == "generation one attempt 2"


# the watch, without a database


@pytest.mark.parametrize(
    ("until", "now", "lapses_at"),
    [
        (4, 0, 4),  # what the database's clock leaves of it
        (-100, 0, 0),  # it ran out long ago
        (3600, 0, 10),  # that clock went back: its length
        (-3600, None, 10),  # that clock is not to be trusted
    ],
)
def test_a_lease_lapses_after_what_is_left_of_it_and_never_later_than_its_length(
    until, now, lapses_at
):
    watch = Watch(10.0)
    trusted = None if now is None else at(now)
    watch.look(held(until), 0.0, trusted)
    assert not watch.look(held(until), lapses_at - 0.01, trusted)
    assert watch.look(held(until), lapses_at, trusted) == {ONE: at(until)}


def test_a_lease_is_of_the_length_that_its_own_worker_gives_it():
    watch = Watch(10.0)
    watch.look(held(3600, length=60.0), 0.0, NOON)
    assert not watch.look(held(3600, length=60.0), 59.0, NOON)
    assert watch.look(held(3600, length=60.0), 60.0, NOON)


def test_a_lease_that_is_renewed_is_another_one():
    watch = Watch(10.0)
    for clock in range(0, 100, 3):
        assert not watch.look(held(clock + 10), clock, at(clock))


def test_the_watch_says_when_the_next_one_lapses():
    watch = Watch(10.0)
    assert watch.next_after(0.0) == math.inf
    watch.look(held(4) | {Lease("two", 1): Held(at(7), None)}, 0.0, NOON)
    assert [watch.next_after(clock) for clock in (0.0, 4.0, 7.0)] == [4.0, 7.0, math.inf]


# the sweeper, on clocks that are told


def test_who_could_not_look_for_most_of_a_lease_gives_everybody_a_whole_one():
    worker = new_worker()
    assert not lapses(worker, 10, 0)
    assert not lapses(worker, 10, 5.9)
    assert not lapses(worker, 10, 12.1)
    assert not any(lapses(worker, 10, clock) for clock in (17.0, 22.0))
    assert lapses(worker, 10, 22.2)


def test_who_could_not_renew_for_most_of_a_lease_gives_everybody_a_whole_one():
    """A server that has turned read-only: it can be looked at all the time."""
    worker = new_worker()
    worker._leases.renewed_at = 0.0
    assert not any(lapses(worker, 8, clock) for clock in range(0, 20, 2))
    for clock in range(20, 28, 2):
        worker._leases.renewed_at = clock - 1.0
        assert not lapses(worker, 8, clock)
    assert lapses(worker, 8, 28.1)


def test_a_clock_that_jumps_ahead_takes_nothing_from_the_living():
    worker = new_worker()
    assert not lapses(worker, 10, 0)
    assert not lapses(worker, 12, 2, now=3602)  # it was renewed just before
    assert not lapses(worker, 3613, 4, now=3604)
    assert not lapses(worker, 3613, 6, now=7206)
    assert not lapses(worker, 7217, 8, now=7208)


def test_a_clock_that_jumps_ahead_costs_the_dead_nothing():
    worker = new_worker()
    assert not lapses(worker, 10, 0)
    assert not lapses(worker, 10, 2, now=3602)
    assert not lapses(worker, 10, 8, now=3608)
    assert lapses(worker, 10, 10, now=3610)


@pytest.mark.parametrize("step", [-2, -5, -60, -3600])
def test_a_clock_that_is_set_back_makes_no_lease_longer(step):
    worker = new_worker()
    assert not lapses(worker, 10, 0)
    assert not any(lapses(worker, 10, clock, now=clock + step) for clock in range(2, 10, 2))
    assert lapses(worker, 10, 10, now=10 + step)


# on every database


async def shift(database, seconds, *columns):
    """Move these stored times of every generation: for who reads them, the clock has been set the other way."""
    moved = {name: _moved(database, getattr(Generation, name), seconds) for name in columns}
    async with database.session() as session:
        await session.execute(
            update(Generation).values(moved).execution_options(synchronize_session=False)
        )


def _moved(database, column, seconds):
    if not database.is_embedded:
        return column + literal(timedelta(seconds=seconds), Interval)
    return func.strftime("%Y-%m-%d %H:%M:%f", column, f"{seconds:+} seconds").op("||")("000")


class Clock:
    """The database's clock as the transitions see it, to be set by so many seconds."""

    def __init__(self, monkeypatch):
        self.seconds = 0.0
        for module in (by_hand, claims, due, lease_end, rescue, workers):
            monkeypatch.setattr(module, "now", self.now_plus)
        for module in (claims, lease_end, leases, workers):
            monkeypatch.setattr(module, "now_plus", self.now_plus)

    def set(self, seconds):
        self.seconds += seconds
        claims._claim_statement.cache_clear()

    def now_plus(self, seconds=0.0):
        return now_plus(seconds + self.seconds)


@pytest.fixture
def clock(monkeypatch):
    claims._claim_statement.cache_clear()
    yield Clock(monkeypatch)
    claims._claim_statement.cache_clear()


def make_worker(database, engine, **changes):
    settings = {"lease_seconds": 1.0, "heartbeat_seconds": 0.1, "poll_seconds": 0.1} | changes
    return Worker(database, engine, MemoryArtifacts(), load_settings(**settings))


def count_sweeps(worker):
    """Return a function that waits for so many more sweeps of this worker."""
    sweeping, swept = worker._sweeping, asyncio.Event()
    rescue = sweeping.rescue

    async def counted():
        await rescue()
        swept.set()

    async def sweeps(count):
        for _ in range(count):
            swept.clear()
            await swept.wait()

    sweeping.rescue = counted
    return sweeps


@pytest.mark.parametrize("seconds", [3600, -3600, 0.5, -0.5])
async def test_a_living_worker_keeps_its_rows_however_the_clock_is_set(database, clock, seconds):
    async with database.session() as session:
        generation = await enqueue("lofi rain", duration=0.08, model=MODEL, session=session)
    engine = FakeEngine()
    done = engine.hold("lofi rain")
    one, other = make_worker(database, engine), make_worker(database, FakeEngine())
    sweeps = count_sweeps(other)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one.run)
        await engine.started["lofi rain"].wait()
        tasks.start_soon(other.run)
        await sweeps(3)
        clock.set(seconds)
        await sweeps(6)
        done.set()
        while not (row := await read(database, generation.id)).is_finished:
            await anyio.sleep(0.05)
        [worker.stop() for worker in (one, other)]
    assert (row.status, row.attempt, row.failures) == ("completed", 1, 0)


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_a_dead_workers_row_is_rescued_after_its_lease_however_the_clock_is_set(
    database, clock, seconds
):
    async with database.session() as session:
        await add_generation(session, duration_seconds=0.08)
        lease = await claim_one(session, lease_seconds=1.0)
    worker = make_worker(database, FakeEngine())
    sweeps = count_sweeps(worker)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await sweeps(1)
        clock.set(seconds)
        while not (row := await read(database, lease.generation_id)).is_finished:
            await anyio.sleep(0.05)
        worker.stop()
    assert (row.status, row.attempt, row.failures) == ("completed", 2, 1)


async def test_what_was_enqueued_before_the_clock_went_back_is_made_at_once(database):
    async with database.session() as session:
        generations = [
            await enqueue("rain", duration=0.08, model=MODEL, session=session) for _ in range(3)
        ]
    await shift(database, 3600, "created_at", "run_at")
    await make_worker(database, FakeEngine()).run(drain=True)
    assert [(await read(database, row.id)).status for row in generations] == ["completed"] * 3


async def test_a_worker_that_is_waiting_notices_that_the_clock_has_gone_back(database):
    async with database.session() as session:
        generation = await enqueue(
            "rain", duration=0.08, model=MODEL, session=session, run_at="2999-01-01T00:00:00Z"
        )
    worker = make_worker(database, FakeEngine())
    sweeps = count_sweeps(worker)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await sweeps(2)
        async with database.session() as session:
            await session.execute(
                update(Generation).values(run_at=now_plus(3600), created_at=now_plus(3600))
            )
        while not (row := await read(database, generation.id)).is_finished:
            await anyio.sleep(0.05)
        worker.stop()
    assert row.status == "completed"


@pytest.mark.parametrize("how", ["release", "rescue"])
async def test_what_was_given_back_before_the_clock_went_back_is_made_at_once(database, how):
    lease = await start_one(database, duration_seconds=0.08, run_at=now_plus(-1))
    async with database.session() as session:
        if how == "release":
            await queue.release(session, [lease])
        else:
            await back_date(session, lease.generation_id, lease_expires_at=1)
            await rescue_lapsed(session)
    await shift(database, 3600, "run_at", "started_at")
    await make_worker(database, FakeEngine()).run(drain=True)
    assert (await read(database, lease.generation_id)).status == "completed"


@pytest.mark.parametrize("seconds", [60, 0.5])
async def test_what_is_scheduled_for_later_or_waits_for_a_retry_is_not_hastened(database, seconds):
    async with database.session() as session:
        await add_generation(session, run_at=now_plus(seconds))
        await add_generation(
            session, run_at=now_plus(seconds), attempt=1, started_at=now_plus(-1), failures=1
        )
        assert await due.find_overtaken(session, [MODEL]) == []
        assert await queue.hasten(session, MODEL) == 0


async def test_a_hastened_row_that_is_locked_is_passed_over(database):
    async with database.session() as session:
        ids = [(await add_generation(session)).id for _ in range(2)]
    await shift(database, 3600, "created_at", "run_at")
    async with database.session() as holder:
        await holder.execute(update(Generation).where(Generation.id == ids[0]).values(priority=1))
        if not database.is_embedded:
            async with database.session() as session:
                assert await queue.hasten(session, MODEL) == 1


async def test_a_rescue_names_the_lease_that_lapsed(database):
    """One that was renewed since is its worker's again."""
    lease = await start_one(database)
    async with database.session() as session:
        seen = (await queue.find_leases(session))[lease].expires_at
        await queue.renew(session, {lease: 0.5}, lease_seconds=60)
        assert await queue.rescue(session, {lease: seen}) == []
        renewed = (await queue.find_leases(session))[lease].expires_at
        assert [item.lease for item in await queue.rescue(session, {lease: renewed})] == [lease]


async def test_a_rescue_of_nothing_that_is_named_takes_nothing(database):
    lease = await start_one(database)
    async with database.session() as session:
        await back_date(session, lease.generation_id, lease_expires_at=1)
        assert await queue.rescue(session, {}) == []


async def test_a_lease_is_found_with_the_length_that_its_worker_gives_it(database):
    leases = [await start_one(database), await start_one(database)]
    async with database.session() as session:
        await workers.register_worker(
            session, **DESCRIBED | {"id": "worker-1", "lease_seconds": 45.0}
        )
        await session.execute(
            update(Generation).where(Generation.id == leases[1].generation_id).values(worker_id="x")
        )
        found = await queue.find_leases(session)
    assert [found[lease].length_seconds for lease in leases] == [45.0, None]


@pytest.mark.parametrize(
    "error", [ArtifactError("read-only"), RuntimeError("can't start new thread")]
)
async def test_files_that_cannot_be_removed_keep_nobody_from_being_rescued(database, error):
    worker, lost = new_worker(database), [await start_one(database) for _ in range(2)]
    worker._artifacts.delete = raising(error)
    async with database.session() as session:
        for lease in lost:
            await back_date(session, lease.generation_id, lease_expires_at=1)
    await worker._sweeping.rescue()
    assert [(await read(database, lease.generation_id)).status for lease in lost] == ["pending"] * 2


# what is noted only once it is done


async def test_speeds_that_could_not_be_told_are_told_the_next_time(database, monkeypatch):
    worker = new_worker(database)
    for _ in range(5):
        worker._engine.speeds.note(MODEL, 1.0, 2.0)
    with monkeypatch.context() as patched:
        patched.setattr(
            "dgx_music.worker.sweeping.record_speed",
            raising(DatabaseUnavailableError("db", "gone")),
        )
        with pytest.raises(DatabaseUnavailableError):
            await worker._sweeping.record_speeds()
    await worker._sweeping.record_speeds()
    async with database.session() as session:
        assert len((await session.execute(select(Speed))).all()) == 1


async def test_a_tidying_that_failed_is_done_again_at_once(database, monkeypatch):
    worker, calls = new_worker(database), []

    async def count(session):
        calls.append(session)
        if len(calls) == 1:
            raise DatabaseUnavailableError("db", "gone")

    monkeypatch.setattr(prompts, "count_overlooked_prompts", count)
    with pytest.raises(DatabaseUnavailableError):
        await worker._sweeping.tidy()
    await worker._sweeping.tidy()
    await worker._sweeping.tidy()
    assert len(calls) == 2


def test_an_idle_worker_that_was_not_heard_tries_again_at_the_next_beat():
    worker = new_worker()
    assert worker._leases._has_to_be_heard(3.0)
    worker._leases.renewed_at = time.monotonic()
    assert not worker._leases._has_to_be_heard(3.0)
    worker._leases.renewed_at -= 0.5
    assert worker._leases._has_to_be_heard(3.0)


def raising(error):
    async def function(*args, **options):
        raise error

    return function
