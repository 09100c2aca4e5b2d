"""Several workers, models and callers: which worker claims what, and when none does."""

import asyncio

import anyio
import pytest
from sqlalchemy import delete, select

from dgx_music import close_db, init_db, pause, resume
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.client.enqueue import enqueue
from dgx_music.client.generations import retry_generation
from dgx_music.config import load_settings
from dgx_music.errors import (
    ConfigurationError,
    DatabaseUnavailableError,
    EngineUnavailableError,
    InvalidRequestError,
)
from dgx_music.storage import queue, workers
from dgx_music.storage.models import Generation, WorkerInfo
from dgx_music.storage.pauses import get_pauses
from dgx_music.worker.daemon import engine_settings, within_lease
from dgx_music.worker.worker import Worker
from tests.factories import add_generation, back_date
from tests.fakes import FakeEngine
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver

SMALL, MEDIUM, LARGE = "musicgen-small", "musicgen-medium", "musicgen-large"


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def make_worker(database, engine):
    def make(own_engine=None, **changes):
        settings = load_settings(**{"heartbeat_seconds": 0.05, "poll_seconds": 0.1} | changes)
        return Worker(database, own_engine or engine, MemoryArtifacts(), settings)

    return make


@pytest.fixture
async def default(database_url):
    yield await init_db(database_url)
    await close_db()


async def add(database, prompt, model=SMALL, waiting=0.0, **options):
    async with database.session() as session:
        row = await enqueue(prompt, duration=0.08, model=model, session=session, **options)
        await back_date(session, row.id, run_at=waiting)
        return row


async def rows_of(database):
    async with database.session(read_only=True) as session:
        return {row.prompt: row for row in await session.scalars(select(Generation))}


async def until(is_so):
    """Return once this coroutine function says so."""
    with anyio.fail_after(PATIENCE):
        while not await is_so():
            await asyncio.sleep(0.01)


async def test_a_worker_of_several_models_makes_them_all(database, make_worker, engine):
    for number, model in enumerate([SMALL, MEDIUM, SMALL, LARGE]):
        await add(database, f"prompt {number}", model)
    await make_worker(models=f"{SMALL},{MEDIUM},{LARGE}").run(drain=True)
    assert {row.status for row in (await rows_of(database)).values()} == {"completed"}
    assert sorted(engine.loaded) == sorted([SMALL, MEDIUM, LARGE])


async def test_the_loaded_model_goes_first_however_long_another_waits_within_the_bound(
    database, make_worker, engine
):
    await add(database, "other", MEDIUM, waiting=50)
    first = await add(database, "own", SMALL)
    await make_worker(models=f"{SMALL},{MEDIUM}", model_switch_seconds=60).run(drain=True)
    rows = await rows_of(database)
    assert engine.loaded == [SMALL, MEDIUM]
    assert rows["own"].completed_at < rows["other"].completed_at
    assert rows["own"].id == first.id


async def test_a_model_that_waits_beyond_the_bound_goes_before_the_loaded_one(
    database, make_worker, engine
):
    worker = make_worker(models=f"{SMALL},{MEDIUM}", model_switch_seconds=60)
    worker._engine.loaded_at -= 3600
    assert worker._claiming._models.choose({SMALL: 10.0, MEDIUM: 59.0}) == SMALL
    assert worker._claiming._models.choose({SMALL: 10.0, MEDIUM: 61.0}) == MEDIUM
    assert worker._claiming._models.choose({SMALL: 9000.0, MEDIUM: 61.0}) == MEDIUM
    assert worker._claiming._models.choose({MEDIUM: 1.0}) == MEDIUM


async def test_two_backlogs_take_turns_and_each_turn_gets_work_done(database, make_worker):
    worker = make_worker(models=f"{SMALL},{MEDIUM}", model_switch_seconds=60)
    waits = {SMALL: 1000.0, MEDIUM: 2000.0}
    assert worker._claiming._models.choose(waits) == SMALL  # it was loaded a moment ago
    worker._engine.loaded_at -= 61
    assert worker._claiming._models.choose(waits) == MEDIUM


async def test_a_model_is_switched_only_when_nothing_runs(database, make_worker, engine):
    engine.slots = 2
    released = engine.hold("long")
    await add(database, "long", SMALL)
    worker = make_worker(models=f"{SMALL},{MEDIUM}", model_switch_seconds=0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.started["long"].wait()
        await add(database, "other", MEDIUM)
        await asyncio.sleep(0.3)
        assert engine.loaded == [SMALL]
        released.set()
        await engine.started["other"].wait()
        worker.stop()
    assert {row.status for row in (await rows_of(database)).values()} == {"completed"}


async def test_after_a_stop_nothing_is_claimed_of_a_model_that_was_being_loaded(
    database, make_worker, engine, monkeypatch
):
    await add(database, "other", MEDIUM)
    worker, start = make_worker(models=f"{SMALL},{MEDIUM}", model_switch_seconds=0), engine.start

    async def start_and_stop(model):
        started = await start(model)
        if model == MEDIUM:
            worker.stop()
        return started

    monkeypatch.setattr(engine, "start", start_and_stop)
    await worker.run()
    assert (engine.loaded, (await rows_of(database))["other"].attempt) == ([SMALL, MEDIUM], 0)


async def test_a_model_whose_tenants_have_enough_in_hand_does_not_keep_the_worker_from_another(
    database, make_worker, engine
):
    async with database.session() as session:
        await add_generation(
            session, prompt="elsewhere", model_name=MEDIUM, tenant="a", worker_id="other"
        )
    await add(database, "held back", MEDIUM, waiting=500, tenant="a")
    await add(database, "own", SMALL, waiting=100, tenant="b")
    worker = make_worker(models=f"{MEDIUM},{SMALL}", tenant_limit=1, poll_seconds=600)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await until(lambda: has_status(database, "own", "completed"))
        worker.stop()
    assert await has_status(database, "held back", "pending")


async def test_a_model_that_cannot_be_loaded_leaves_the_others_served(
    database, make_worker, engine
):
    engine.unloadable = {MEDIUM}
    await add(database, "other", MEDIUM)
    await add(database, "own", SMALL)
    await make_worker(models=f"{SMALL},{MEDIUM}").run(drain=True)
    rows = await rows_of(database)
    assert (rows["own"].status, rows["other"].status, rows["other"].failures) == (
        "completed",
        "pending",
        0,
    )


async def test_the_only_model_that_cannot_be_loaded_stops_the_worker(make_worker, engine):
    engine.unloadable = {MEDIUM}
    with pytest.raises(EngineUnavailableError):
        await make_worker(models=MEDIUM).run(drain=True)


async def test_the_workers_row_says_what_it_serves_has_loaded_and_has_in_hand(
    database, make_worker, engine
):
    released = engine.hold("long")
    generation = await add(database, "long", MEDIUM)
    worker = make_worker(models=f"{SMALL},{MEDIUM}")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.started["long"].wait()
        await until(lambda: has_beaten_with(database, MEDIUM))
        async with database.session(read_only=True) as session:
            [row] = await workers.get_workers(session)
        released.set()
        worker.stop()
    assert (row["is_alive"], row["model_name"], row["models"]) == (True, MEDIUM, [SMALL, MEDIUM])
    assert [item["id"] for item in row["running"]] == [generation.id]


async def has_beaten_with(database, model):
    async with database.session(read_only=True) as session:
        return bool(
            await session.scalar(select(WorkerInfo.id).where(WorkerInfo.model_name == model))
        )


async def test_a_worker_whose_row_is_deleted_is_listed_again_at_its_next_heartbeat(
    database, make_worker, engine
):
    engine.hold("long")
    await add(database, "long")
    worker = make_worker()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.started["long"].wait()
        async with database.session() as session:
            await session.execute(delete(WorkerInfo))
        await until(lambda: has_beaten_with(database, SMALL))
        async with database.session(read_only=True) as session:
            assert [*await session.scalars(select(WorkerInfo.id))] == [worker.id]
        worker.stop()
        worker.stop()


async def test_the_last_few_are_spread_over_the_workers_that_are_free(database, make_worker):
    engines = [FakeEngine(slots=4) for _ in range(4)]
    for engine in engines:
        for number in range(4):
            engine.hold(f"prompt {number}")
    crew = [make_worker(engine) for engine in engines]
    async with anyio.create_task_group() as tasks:
        for worker in crew:
            tasks.start_soon(worker.run)
        await until(lambda: all_know(crew, 4))
        async with database.session() as session:
            for number in range(4):
                await enqueue(f"prompt {number}", duration=0.08, model=SMALL, session=session)
        await until(lambda: all_run(engines, 4))
        spread = sorted(engine.running for engine in engines)
        for worker in crew * 2:
            worker.stop()
    assert spread[-1] <= 2, spread


async def all_know(crew, count):
    for worker in crew:
        await worker._leases.renew()
    return all(worker._presence.free_workers == count for worker in crew)


async def all_run(engines, count):
    return sum(engine.running for engine in engines) == count


async def test_what_a_claim_without_an_answer_took_is_given_back_at_no_cost(
    database, make_worker, engine, monkeypatch
):
    generation = await add(database, "lofi rain")
    real_claim, lost = queue.claim, []

    async def claim(session, **options):
        claims = await real_claim(session, **options)
        if claims and not lost:
            lost.extend(claims)
            await session.commit()
            raise DatabaseUnavailableError("it", "its answer was lost")
        return claims

    monkeypatch.setattr(queue, "claim", claim)
    with anyio.fail_after(PATIENCE):
        await make_worker().run(drain=True)
    row = (await rows_of(database))["lofi rain"]
    assert (row.id, row.status, row.attempt, row.failures) == (generation.id, "completed", 2, 0)


async def test_a_pause_holds_back_what_waits_and_lets_finish_what_runs(
    database, default, make_worker, engine
):
    released = engine.hold("running")
    await add(database, "running")
    worker = make_worker()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.started["running"].wait()
        await pause()
        await add(database, "waiting")
        released.set()
        await until(lambda: has_status(database, "running", "completed"))
        await asyncio.sleep(0.3)
        assert await has_status(database, "waiting", "pending")
        await resume()
        await until(lambda: has_status(database, "waiting", "completed"))
        worker.stop()


async def has_status(database, prompt, status):
    return (await rows_of(database))[prompt].status == status


async def test_a_pause_of_one_model_leaves_the_others_going(database, default, make_worker):
    await pause(MEDIUM)
    await add(database, "own", SMALL)
    await add(database, "other", MEDIUM)
    await make_worker(models=f"{SMALL},{MEDIUM}").run(drain=True)
    assert await has_status(database, "own", "completed")
    assert await has_status(database, "other", "pending")


async def test_resuming_one_model_does_not_end_a_pause_of_everything(default):
    await pause()
    await pause(SMALL)
    await pause(SMALL)
    assert [item.model_name for item in await resume(SMALL)] == ["*"]
    assert await resume() == []
    async with default.session(read_only=True) as session:
        assert await get_pauses(session) == []


@pytest.mark.parametrize("model", ["unknown", "", "*", "a\0b"])
async def test_an_unknown_model_is_not_paused(default, model):
    with pytest.raises(InvalidRequestError, match="model"):
        await pause(model)
    async with default.session(read_only=True) as session:
        assert await get_pauses(session) == []


async def test_no_tenant_has_more_in_hand_than_its_limit_and_others_go_past_it(
    database, make_worker, engine
):
    engine.slots = 8
    for number in range(6):
        await add(database, f"a{number}", tenant="a")
        engine.hold(f"a{number}")
    await add(database, "b", tenant="b")
    await add(database, "nobody's")
    worker = make_worker(tenant_limit=2, slots=8)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.stopped["b"].wait()
        await engine.stopped["nobody's"].wait()
        running = [
            row.prompt
            for row in (await rows_of(database)).values()
            if row.is_processing and row.tenant == "a"
        ]
        worker.stop()
        worker.stop()
    assert len(running) == 2


async def test_all_of_a_tenants_are_made_in_the_end(database, make_worker, engine):
    engine.slots = 4
    for number in range(10):
        await add(database, f"a{number}", tenant="a")
    await make_worker(tenant_limit=1).run(drain=True)
    assert engine.most_running == 1
    assert {row.status for row in (await rows_of(database)).values()} == {"completed"}


async def test_a_new_worker_waits_for_the_living_after_everybody_was_silent(database, make_worker):
    if database.is_embedded:  # on one machine a silent worker is dead
        return
    async with database.session() as session:
        await workers.register_worker(
            session, **make_worker()._presence.describe() | {"id": "somebody"}
        )
        await session.execute(
            WorkerInfo.__table__.update().values(heartbeat_at=workers.now_plus(-100.0))
        )
        generation = await add_generation(session, worker_id="somebody")
        await back_date(session, generation.id, lease_expires_at=50)
    await make_worker()._sweeping.rescue()
    assert (await rows_of(database))["lofi rain"].worker_id == "somebody"


def test_a_worker_waits_for_the_database_no_longer_than_a_quarter_of_its_lease():
    limited = within_lease(load_settings(lease_seconds=8, connect_timeout_seconds=1))
    assert (limited.connect_timeout_seconds, limited.command_timeout_seconds) == (1, 2)
    assert limited.idle_transaction_timeout_seconds == 4
    assert within_lease(load_settings(lease_seconds=3600)) == load_settings(lease_seconds=3600)


@pytest.mark.parametrize(
    "slots", [0, 257, "0", "257", "", "many", "1.5", "-1", "\u0664", True, 1.0, None]
)
def test_slots_that_are_neither_auto_nor_a_number_are_refused_in_one_sentence(slots):
    with pytest.raises(ConfigurationError) as refused:
        load_settings(slots=slots)
    assert (
        str(refused.value)
        == f"DGX_MUSIC_SLOTS is {slots!r}; use auto or a whole number from 1 to 256."
    )


def test_slots_are_auto_where_nothing_else_is_said(monkeypatch):
    assert engine_settings(load_settings()).slots is None
    assert engine_settings(load_settings(slots="auto")).slots is None
    monkeypatch.setenv("DGX_MUSIC_SLOTS", "256")
    assert engine_settings(load_settings()).slots == 256
    assert engine_settings(load_settings(slots=1)).slots == 1


def test_the_engine_knows_how_many_models_share_its_memory():
    assert engine_settings(load_settings(models=f"{SMALL},{MEDIUM}")).model_count == 2
    assert engine_settings(load_settings()).model_count == 1


def test_a_revision_is_for_one_model_only():
    with pytest.raises(ConfigurationError, match="DGX_MUSIC_REVISION"):
        load_settings(models=f"{SMALL},{MEDIUM}", revision="abc")


def test_an_unknown_model_among_several_is_named():
    with pytest.raises(ConfigurationError, match="musicgen-huge"):
        load_settings(models=f"{SMALL},musicgen-huge")


def test_the_models_served_are_the_one_where_no_list_is_given():
    assert load_settings(model=MEDIUM).served_models == (MEDIUM,)
    assert load_settings(models=f" {LARGE} , {SMALL},{LARGE},").served_models == (LARGE, SMALL)


async def test_a_retry_of_another_tenants_generation_keeps_its_tenant(database, default):
    generation = await add(database, "lofi rain", tenant="a")
    async with database.session() as session:
        await queue.cancel(session, generation.id)
    await retry_generation(generation.id)
    assert (await rows_of(database))["lofi rain"].tenant == "a"
