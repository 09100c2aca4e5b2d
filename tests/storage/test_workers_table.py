"""The workers' own rows, on every database."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import delete, update

from dgx_music.storage import queue
from dgx_music.storage.models import WorkerInfo
from dgx_music.storage.schema import now_plus
from dgx_music.storage.workers import (
    count_free_workers,
    end_worker,
    find_service,
    get_workers,
    heartbeat_worker,
    longest_silent,
    register_worker,
)
from tests.factories import add_generation, claim_one, start_one

pytestmark = pytest.mark.any_driver

WORKER = {
    "id": "worker-1",
    "host": "dgx",
    "pid": 4711,
    "model_name": "musicgen-small",
    "models": ["musicgen-small", "musicgen-medium"],
    "device": "cuda:0",
    "slots": 4,
    "lease_seconds": 30.0,
}


async def register(session, **overrides):
    await register_worker(session, **WORKER | overrides)


async def beat(session, **overrides):
    await heartbeat_worker(session, **WORKER | {"running_count": 0} | overrides)


async def is_served(session, model_name):
    return (await find_service(session, model_name)).serving_count > 0


async def silence(session, worker_id, seconds):
    """Let the worker's last heartbeat be so many seconds ago."""
    heartbeat_at = now_plus(-float(seconds))
    await session.execute(
        update(WorkerInfo).where(WorkerInfo.id == worker_id).values(heartbeat_at=heartbeat_at)
    )


async def test_a_worker_that_registers_is_alive_with_all_it_said(database):
    async with database.session() as session:
        await register(session)
        (worker,) = await get_workers(session)

    assert worker | WORKER | {"running_count": 0, "is_alive": True} == worker
    assert abs(datetime.fromisoformat(worker["heartbeat_at"]) - datetime.now(UTC)) < timedelta(
        minutes=1
    )


async def test_a_worker_that_registers_again_takes_over_its_row(database):
    async with database.session() as session:
        await register(session)
        await beat(session, running_count=3)
        await silence(session, "worker-1", 3600)
        await session.execute(update(WorkerInfo).values(started_at=now_plus(-3600)))
        await register(session, pid=4712)
        (worker,) = await get_workers(session)

    assert (worker["pid"], worker["running_count"], worker["is_alive"]) == (4712, 0, True)
    assert datetime.now(UTC) - datetime.fromisoformat(worker["started_at"]) < timedelta(minutes=1)


async def test_a_heartbeat_tells_how_many_are_in_hand(database):
    async with database.session() as session:
        await register(session)
        await register(session, id="worker-2")
        await silence(session, "worker-1", 3600)
        await beat(session, running_count=3)
        workers = await get_workers(session)

    assert [(worker["running_count"], worker["is_alive"]) for worker in workers] == [
        (3, True),
        (0, True),
    ]


async def test_a_heartbeat_tells_which_model_is_loaded_and_leaves_the_start_as_it_was(database):
    async with database.session() as session:
        await register(session)
        (before,) = await get_workers(session)
        await beat(session, model_name="musicgen-medium")
        (after,) = await get_workers(session)

    assert (after["model_name"], after["started_at"]) == ("musicgen-medium", before["started_at"])
    assert after["heartbeat_at"] >= before["heartbeat_at"]


async def test_a_heartbeat_of_a_worker_that_was_removed_adds_it_again(database):
    async with database.session() as session:
        await register(session)
        await session.execute(delete(WorkerInfo))
        await beat(session, running_count=2)
        (worker,) = await get_workers(session)

    assert worker | WORKER | {"running_count": 2, "is_alive": True} == worker


@pytest.mark.parametrize(("silent_seconds", "is_alive"), [(29, True), (31, False)])
async def test_a_worker_silent_for_its_own_lease_is_taken_for_dead(
    database, silent_seconds, is_alive
):
    async with database.session() as session:
        await register(session)
        await silence(session, "worker-1", silent_seconds)

        assert [worker["is_alive"] for worker in await get_workers(session)] == [is_alive]
        assert await is_served(session, "musicgen-small") is is_alive


async def test_a_live_worker_is_one_that_serves_the_model(database):
    async with database.session() as session:
        await register(session)

        assert await is_served(session, "musicgen-small")
        assert await is_served(session, "musicgen-medium")
        assert not await is_served(session, "musicgen-large")


async def test_a_worker_that_names_no_models_serves_the_one_it_has_loaded(database):
    async with database.session() as session:
        await register(session, models=[])

        assert await is_served(session, "musicgen-small")
        assert not await is_served(session, "musicgen-medium")


@pytest.mark.parametrize(
    ("overrides", "silent_seconds", "count"),
    [
        ({}, 0, 1),
        ({"running_count": 3}, 0, 1),
        ({"running_count": 4}, 0, 0),
        ({"model_name": "musicgen-medium"}, 0, 0),
        ({}, 31, 0),
    ],
)
async def test_a_free_worker_is_alive_with_the_model_loaded_and_a_slot_to_spare(
    database, overrides, silent_seconds, count
):
    async with database.session() as session:
        await beat(session, **overrides)
        await silence(session, "worker-1", silent_seconds)

        assert await count_free_workers(session, "musicgen-small") == count


async def test_what_a_worker_has_in_hand_is_listed_with_it(database):
    lease = await start_one(database)
    async with database.session() as session:
        await register(session)
        await register(session, id="worker-2")
        await queue.renew(session, {lease: 0.25}, lease_seconds=30)
        running = {worker["id"]: worker["running"] for worker in await get_workers(session)}

    (fact,) = running["worker-1"]
    assert (fact["id"], fact["model_name"], fact["progress"]) == (
        lease.generation_id,
        "musicgen-small",
        0.25,
    )
    assert running["worker-2"] == []


async def test_the_longest_silent_of_the_others_is_the_one_heard_of_first(database):
    async with database.session() as session:
        await register(session)
        assert await longest_silent(session, other_than="worker-1") is None
        for worker_id, seconds in (("worker-2", 60), ("worker-3", 20)):
            await add_generation(session)
            await claim_one(session, worker_id=worker_id)
            await register(session, id=worker_id)
            await silence(session, worker_id, seconds)
        since = await longest_silent(session, other_than="worker-1")

    assert timedelta(seconds=50) < datetime.now(UTC) - since < timedelta(seconds=80)


async def test_a_silent_worker_that_holds_nothing_keeps_nobody_waiting(database):
    async with database.session() as session:
        await register(session, id="killed")
        await silence(session, "killed", 600)

        assert await longest_silent(session, other_than="worker-1") is None


async def test_workers_are_listed_oldest_first(database):
    async with database.session() as session:
        for worker_id in ("worker-3", "worker-1", "worker-2"):
            await register(session, id=worker_id)
        await session.execute(
            update(WorkerInfo).values(started_at=datetime(2026, 1, 31, tzinfo=UTC))
        )
        await session.execute(
            update(WorkerInfo)
            .where(WorkerInfo.id == "worker-3")
            .values(started_at=datetime(2026, 1, 30, tzinfo=UTC))
        )

        assert [worker["id"] for worker in await get_workers(session)] == [
            "worker-3",
            "worker-1",
            "worker-2",
        ]


def ended(worker):
    return (
        worker["state"],
        worker["is_alive"],
        worker["end_reason"],
        worker["ended_at"] is not None,
    )


async def test_a_worker_that_ends_leaves_word_of_why(database):
    async with database.session() as session:
        await register(session)
        await end_worker(session, **WORKER, reason="its weights are damaged")
        (worker,) = await get_workers(session)
        service = await find_service(session, "musicgen-small")

    assert ended(worker) == ("ended", False, "its weights are damaged", True)
    assert (service.serving_count, service.last_id) == (0, "worker-1")
    assert service.end_reason == "its weights are damaged"


async def test_a_worker_that_fell_silent_has_given_no_reason(database):
    async with database.session() as session:
        await register(session, id="ended")
        await end_worker(session, **WORKER | {"id": "ended"}, reason="it was stopped")
        await register(session, id="killed")
        await silence(session, "ended", 600)
        await silence(session, "killed", 60)
        service = await find_service(session, "musicgen-small")

    assert (service.last_id, service.end_reason) == ("killed", None)
    assert timedelta(seconds=55) < datetime.now(UTC) - service.gone_since < timedelta(seconds=90)


async def test_a_worker_that_loads_its_model_is_alive_and_takes_no_share(database):
    async with database.session() as session:
        await register(session, state="loading")
        service = await find_service(session, "musicgen-small")

        assert (service.serving_count, service.loading_count) == (0, 1)
        assert await count_free_workers(session, "musicgen-small") == 0
        assert [worker["is_alive"] for worker in await get_workers(session)] == [True]


async def test_a_worker_that_has_ended_is_not_silent_however_long_ago(database):
    async with database.session() as session:
        await register(session, id="ended")
        await end_worker(session, **WORKER | {"id": "ended"}, reason="it was stopped")
        await silence(session, "ended", 600)

        assert await longest_silent(session, other_than="worker-1") is None
        assert await count_free_workers(session, "musicgen-small") == 0


async def test_a_worker_that_ended_and_comes_back_under_its_name_is_alive(database):
    async with database.session() as session:
        await end_worker(session, **WORKER, reason="it was stopped")
        await beat(session)
        (worker,) = await get_workers(session)

    assert ended(worker) == ("serving", True, None, False)


async def test_who_ended_or_fell_silent_a_day_ago_is_forgotten(database):
    async with database.session() as session:
        for worker_id in ("silent", "forgotten", "ended"):
            await register(session, id=worker_id)
        await end_worker(session, **WORKER | {"id": "ended"}, reason="it was stopped")
        await silence(session, "silent", 86_390)
        await silence(session, "forgotten", 86_410)
        await silence(session, "ended", 86_410)
        await end_worker(session, **WORKER | {"id": "ends"}, reason="it was stopped")

        assert [worker["id"] for worker in await get_workers(session)] == ["silent", "ends"]


async def test_a_worker_that_is_started_again_and_again_does_not_fill_the_table(database):
    async with database.session() as session:
        await end_worker(
            session,
            **WORKER | {"id": "other", "model_name": "musicgen-large"},
            reason="it was stopped",
        )
        for number in range(25):
            await end_worker(session, **WORKER | {"id": f"{number:02}"}, reason="no weights")
        ids = {worker["id"] for worker in await get_workers(session)}

    assert ids == {"other", *(f"{number:02}" for number in range(5, 25))}
