"""The workers' own rows, on every database."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import update

from dgx_music.storage.models import WorkerInfo
from dgx_music.storage.schema import now_plus
from dgx_music.storage.workers import (
    get_workers,
    has_live_worker,
    heartbeat_worker,
    register_worker,
    remove_worker,
)

WORKER = {
    "id": "worker-1",
    "host": "dgx",
    "pid": 4711,
    "model_name": "musicgen-small",
    "device": "cuda:0",
    "slots": 4,
    "lease_seconds": 30.0,
}


async def register(session, **overrides):
    await register_worker(session, **WORKER | overrides)


async def silence(session, worker_id, seconds):
    """Let the worker's last heartbeat be so many seconds ago."""
    heartbeat_at = now_plus(-float(seconds))
    await session.execute(update(WorkerInfo).where(WorkerInfo.id == worker_id).values(heartbeat_at=heartbeat_at))


async def test_a_worker_that_registers_is_alive_with_all_it_said(database):
    async with database.session() as session:
        await register(session)
        (worker,) = await get_workers(session)

    assert worker | WORKER | {"running_count": 0, "is_alive": True} == worker
    assert abs(datetime.fromisoformat(worker["heartbeat_at"]) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_worker_that_registers_again_takes_over_its_row(database):
    async with database.session() as session:
        await register(session)
        await heartbeat_worker(session, "worker-1", 3)
        await silence(session, "worker-1", 3600)
        await register(session, pid=4712)
        (worker,) = await get_workers(session)

    assert (worker["pid"], worker["running_count"], worker["is_alive"]) == (4712, 0, True)


async def test_a_heartbeat_tells_how_many_are_in_hand(database):
    async with database.session() as session:
        await register(session)
        await register(session, id="worker-2")
        await silence(session, "worker-1", 3600)
        await heartbeat_worker(session, "worker-1", 3)
        workers = await get_workers(session)

    assert [(worker["running_count"], worker["is_alive"]) for worker in workers] == [(3, True), (0, True)]


async def test_a_heartbeat_of_an_unknown_worker_adds_none(database):
    async with database.session() as session:
        await heartbeat_worker(session, "unknown", 1)

        assert await get_workers(session) == []


@pytest.mark.parametrize(("silent_seconds", "is_alive"), [(29, True), (31, False)])
async def test_a_worker_silent_for_its_own_lease_is_taken_for_dead(database, silent_seconds, is_alive):
    async with database.session() as session:
        await register(session)
        await silence(session, "worker-1", silent_seconds)

        assert [worker["is_alive"] for worker in await get_workers(session)] == [is_alive]
        assert await has_live_worker(session, "musicgen-small") is is_alive


async def test_a_live_worker_is_one_that_serves_the_model(database):
    async with database.session() as session:
        await register(session)

        assert await has_live_worker(session, "musicgen-small")
        assert not await has_live_worker(session, "musicgen-large")


async def test_workers_are_listed_oldest_first(database):
    async with database.session() as session:
        for worker_id in ("worker-3", "worker-1", "worker-2"):
            await register(session, id=worker_id)
        await session.execute(update(WorkerInfo).values(started_at=datetime(2026, 1, 31, tzinfo=UTC)))
        await session.execute(
            update(WorkerInfo).where(WorkerInfo.id == "worker-3").values(started_at=datetime(2026, 1, 30, tzinfo=UTC))
        )

        assert [worker["id"] for worker in await get_workers(session)] == ["worker-3", "worker-1", "worker-2"]


async def test_a_worker_that_stops_takes_those_silent_for_a_day_along(database):
    async with database.session() as session:
        for worker_id in ("stops", "silent", "forgotten"):
            await register(session, id=worker_id)
        await silence(session, "silent", 86_390)
        await silence(session, "forgotten", 86_410)
        await remove_worker(session, "stops")

        assert [worker["id"] for worker in await get_workers(session)] == ["silent"]
