"""A worker's rare moments: what comes between audio and completion, and deaths of the engine with successes between."""

import asyncio
import time
from dataclasses import replace

import anyio
import pytest

from dgx_music.artifacts import LocalArtifacts, MemoryArtifacts
from dgx_music.config import load_settings
from dgx_music.errors import EngineCrashedError
from dgx_music.storage import queue
from dgx_music.storage.connection.sqlite_thread import ThreadSession
from dgx_music.worker.engine_deaths import BROKEN_AFTER
from dgx_music.worker.worker import Worker
from tests.daemons import add, attempts_of, is_finished, rows_of, until
from tests.factories import SQLITE, add_generation, back_date, on
from tests.fakes import FakeEngine
from tests.patience import PATIENCE

pytestmark = on(SQLITE)


class HeldArtifacts(LocalArtifacts):
    """A folder whose next publication ends when it is let go."""

    def __init__(self, root):
        super().__init__(root)
        self.storing, self.let_go = asyncio.Event(), asyncio.Event()

    async def publish(self, *arguments):
        self.storing.set()
        with anyio.CancelScope(shield=True):
            await self.let_go.wait()
            return await super().publish(*arguments)


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def make_worker(database, engine):
    def make(artifacts, **changes):
        settings = load_settings(**{"heartbeat_seconds": 0.05, "poll_seconds": 0.1} | changes)
        return Worker(database, engine, artifacts, replace(settings, backoff_base_seconds=0.01))

    return make


async def only_row(database):
    [row] = (await rows_of(database)).values()
    return row


async def test_a_stop_while_audio_is_stored_begins_no_completion(database, make_worker, tmp_path):
    """Or another's completion would take it along, and the release would delete the file of a completed row."""
    await add(database)
    artifacts, begun = HeldArtifacts(tmp_path / "audio"), []
    worker = make_worker(artifacts)
    worker._performing._completions.write = begun.append
    running = asyncio.create_task(worker.run())
    await artifacts.storing.wait()
    worker.stop()
    worker.stop()
    async with asyncio.timeout(PATIENCE):
        while not all(each.stopped_for for each in worker._leases.running.values()):
            await asyncio.sleep(0.001)
        artifacts.let_go.set()
        await running
    assert (begun, (await only_row(database)).status) == ([], "pending")


async def test_a_completion_that_cannot_be_stored_leaves_no_file(
    database, make_worker, engine, tmp_path
):
    await add(database, max_attempts=1)
    engine.facts["lofi rain"] = {"x": "\ud800"}
    await make_worker(LocalArtifacts(tmp_path / "audio")).run(drain=True)
    assert (await only_row(database)).status == "failed"
    assert list((tmp_path / "audio").iterdir()) == []


async def test_a_worker_cancelled_in_its_completion_leaves_the_row_to_the_lease(
    database, make_worker, monkeypatch, tmp_path
):
    """Its commit may still be on its way: only the lease tells when it cannot come any more."""
    await add(database)
    completing, loop = asyncio.Event(), asyncio.get_running_loop()

    async def complete(session, _completions):
        loop.call_soon_threadsafe(completing.set)
        if isinstance(session, ThreadSession):
            time.sleep(0.05)
        else:
            await asyncio.sleep(0.05)
        raise asyncio.CancelledError

    monkeypatch.setattr(queue, "complete", complete)
    running = asyncio.create_task(make_worker(LocalArtifacts(tmp_path / "audio")).run())
    await completing.wait()
    running.cancel()
    await asyncio.wait([running])
    row = await only_row(database)
    assert (row.status, row.worker_id is not None) == ("processing", True)
    assert [attempt.outcome for attempt in await attempts_of(database)] == [None]


async def test_deaths_of_the_engine_count_from_its_last_success(database, make_worker, engine):
    """Else a worker of many months would stop one day, since from time to time some prompt kills its engine."""
    for number in range(2 * BROKEN_AFTER - 1):
        await add(database, f"prompt {number}", max_attempts=1)
        if number != BROKEN_AFTER - 1:
            engine.script[f"prompt {number}"] = EngineCrashedError("killed")
    await make_worker(MemoryArtifacts()).run(drain=True)
    statuses = {row.prompt: row.status for row in (await rows_of(database)).values()}
    assert [prompt for prompt, status in statuses.items() if status == "completed"] == [
        f"prompt {BROKEN_AFTER - 1}"
    ]


async def test_a_heartbeat_hears_of_a_cancel_that_nobody_told_of(database, make_worker, engine):
    generation = await add(database)
    engine.hold("lofi rain")
    worker = make_worker(MemoryArtifacts())
    worker._leases.notice_cancels = anyio.sleep_forever
    running = asyncio.create_task(worker.run())
    await engine.started["lofi rain"].wait()
    async with database.session() as session:
        await queue.cancel(session, generation.id)
    await until(database, generation, is_finished)
    worker.stop()
    await running
    assert (await only_row(database)).status == "cancelled"


async def test_a_sweep_rescues_all_that_is_lost_however_much(database, make_worker):
    async with database.session() as session:
        for _ in range(queue.RESCUE_CHUNK + 1):
            lost = await add_generation(session, worker_id="lost")
            await back_date(session, lost.id, lease_expires_at=1)
    await make_worker(MemoryArtifacts())._sweeping.rescue()
    assert {row.status for row in (await rows_of(database)).values()} == {"pending"}
