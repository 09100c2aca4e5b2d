"""The worker with a real database and real files; only the engine is imitated."""

import asyncio
import hashlib
import io
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import anyio
import numpy as np
import pytest
import soundfile
from sqlalchemy import select, text, update
from sqlalchemy.exc import InterfaceError, InternalError

from dgx_music import cancel_generation, enqueue
from dgx_music.artifacts import LocalArtifacts, MemoryArtifacts
from dgx_music.config import load_settings
from dgx_music.errors import (
    ArtifactError,
    ConfigurationError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationRejectedError,
)
from dgx_music.storage import clips, create_generation, migrations, queue, workers
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.models import Attempt, Clip, Generation, WorkerInfo
from dgx_music.storage.queue import Lease
from dgx_music.storage.schema import now_plus
from dgx_music.worker import daemon, performing
from dgx_music.worker.daemon import run_worker
from dgx_music.worker.engine_deaths import BROKEN_AFTER
from dgx_music.worker.leases import Stop
from dgx_music.worker.worker import Worker
from tests.factories import MODEL, SQLITE, audio_file, back_date, on, rescue_lapsed
from tests.fakes import FakeEngine
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def output(tmp_path):
    return tmp_path / "audio"


@pytest.fixture
def make_worker(database, engine, output):
    def make(artifacts=None, **changes):
        settings = load_settings(
            **{"lease_seconds": 30.0, "heartbeat_seconds": 0.05, "poll_seconds": 0.1} | changes
        )
        settings = replace(settings, backoff_base_seconds=0.01)
        return Worker(database, engine, artifacts or LocalArtifacts(output), settings)

    return make


@asynccontextmanager
async def at_work(worker, **options):
    """Run the worker beside the block, and stop it, at once, at its end."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.run(**options))
        yield
        worker.stop()
        worker.stop()


async def add(database, prompt="lofi rain", **options):
    async with database.session() as session:
        return await enqueue(
            prompt, session=session, **{"duration": 0.08, "model": MODEL} | options
        )


async def read(database, generation):
    async with database.session(read_only=True) as session:
        return await session.get(Generation, generation.id)


async def attempts_of(database, generation):
    query = select(Attempt).where(Attempt.generation_id == generation.id).order_by(Attempt.attempt)
    async with database.session(read_only=True) as session:
        return [(attempt.attempt, attempt.outcome) for attempt in await session.scalars(query)]


async def until(database, generation, status, is_so=lambda row: True):
    """Return the row once it has this status, and this holds of it."""
    with anyio.fail_after(PATIENCE), database.changes.subscribe() as changes:
        while (row := await read(database, generation)).status != status or not is_so(row):
            await changes.wait(0.1)
        return row


async def test_a_drained_generation_is_completed_with_what_its_file_has(database, make_worker):
    generation = await add(database)
    await make_worker().run(drain=True)
    row = await read(database, generation)
    data = Path(row.file_path).read_bytes()
    assert (row.status, row.attempt, row.progress, row.model_version) == (
        "completed",
        1,
        1.0,
        "fake",
    )
    assert (row.file_size_bytes, row.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert row.get_metadata()["audio"]["duration_seconds"] == pytest.approx(0.08)


async def test_the_producers_metadata_survives_completion(database, make_worker):
    generation = await add(database, metadata={"album": "night", "duration_seconds": "mine"})
    await make_worker().run(drain=True)
    metadata = (await read(database, generation)).get_metadata()
    assert (metadata["album"], metadata["duration_seconds"]) == ("night", "mine")


async def test_an_attempt_keeps_who_and_how_long(database, make_worker):
    generation = await add(database)
    worker = make_worker()
    await worker.run(drain=True)
    async with database.session() as session:
        attempt = await session.get(Attempt, (generation.id, 1))
    assert (attempt.worker_id, attempt.outcome) == (worker.id, "completed")
    assert attempt.device_seconds >= 0
    assert attempt.finished_at >= attempt.started_at


async def test_no_more_run_at_once_than_there_are_slots(database, make_worker, engine):
    engine.slots = 3
    for number in range(10):
        await add(database, f"prompt {number}")
    await make_worker().run(drain=True)
    assert engine.most_running == 3


async def test_a_slot_that_is_free_before_its_audio_is_made_serves_the_next(
    database, make_worker, engine
):
    first, second = await add(database, "first"), await add(database, "second")
    sounding = engine.sounding["first"] = asyncio.Event()
    async with at_work(make_worker(poll_seconds=600.0)):
        await until(database, second, "completed")
        assert (await read(database, first)).status == "processing"
        sounding.set()
        await until(database, first, "completed")
    assert (engine.most_in_slots, engine.most_running) == (1, 2)


async def test_no_more_than_as_many_again_wait_for_their_audio(database, make_worker, engine):
    engine.slots = 2
    sounding = asyncio.Event()
    for number in range(8):
        await add(database, f"prompt {number}")
        engine.sounding[f"prompt {number}"] = sounding
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: make_worker().run(drain=True))
        await engine.started["prompt 3"].wait()
        await anyio.sleep(0.3)
        most, _ = engine.most_running, sounding.set()
    assert (most, engine.most_in_slots) == (4, 2)


class SlowArtifacts(MemoryArtifacts):
    """A place where nothing is stored before it is told to go on."""

    def __init__(self):
        super().__init__()
        self.waiting, self.go_on = 0, asyncio.Event()

    async def publish(self, *arguments):
        self.waiting += 1
        await self.go_on.wait()
        return await super().publish(*arguments)


async def test_three_times_as_many_as_slots_are_claimed_while_storing_is_slow(
    database, make_worker, engine
):
    engine.slots, artifacts = 2, SlowArtifacts()
    rows = [await add(database, f"prompt {number}") for number in range(9)]
    worker = make_worker(artifacts)
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            while artifacts.waiting < 6:
                await anyio.sleep(0.01)
        await anyio.sleep(0.3)
        assert (artifacts.waiting, len(worker._leases.running)) == (6, 6)
        artifacts.go_on.set()
        for row in rows:
            await until(database, row, "completed")


async def test_a_generation_whose_slot_is_free_can_be_cancelled(database, make_worker, engine):
    generation = await add(database)
    engine.sounding["lofi rain"] = asyncio.Event()
    worker = make_worker(poll_seconds=600.0)
    async with at_work(worker):
        await engine.started["lofi rain"].wait()
        with anyio.fail_after(PATIENCE):
            while any(running.has_slot for running in worker._leases.running.values()):
                await anyio.sleep(0.01)
        async with database.session() as session:
            await cancel_generation(generation.id, session=session)
        await until(database, generation, "cancelled")
        assert worker._claiming.free_slots() == 1


async def test_an_engine_that_has_come_to_have_fewer_slots_is_given_no_more_and_its_row_says_so(
    database, make_worker, engine
):
    engine.slots = 4
    rows = [await add(database, f"prompt {number}", max_attempts=1) for number in range(12)]

    def shrink():
        engine.slots, engine.most_in_slots = 2, 0
        raise EngineReplacedError("There is no memory for as many generations at a time.")

    engine.script["prompt 3"] = [shrink, None]
    held = {prompt: engine.hold(prompt) for prompt in ("prompt 9", "prompt 10")}
    worker = make_worker()
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            for prompt in held:  # which fill the two slots
                await engine.started[prompt].wait()
            while await slots_of(database) != 2:
                await anyio.sleep(0.01)
        for go_on in held.values():
            go_on.set()
        for row in rows:
            await until(database, row, "completed")
    assert (engine.most_in_slots, await attempts_of(database, rows[3])) == (
        2,
        [(1, "released"), (2, "completed")],
    )


async def slots_of(database):
    async with database.session(read_only=True) as session:
        [listed] = await workers.get_workers(session)
    return listed["slots"]


async def test_another_models_generations_are_left_alone(database, make_worker):
    other = await add(database, model="musicgen-large")
    await make_worker().run(drain=True)
    assert (await read(database, other)).status == "pending"


async def test_a_failure_is_retried_until_it_succeeds(database, make_worker, engine):
    generation = await add(database)
    engine.script["lofi rain"] = [EngineError("boom"), TimeoutError("slow"), None]
    await make_worker().run(drain=True)
    assert await attempts_of(database, generation) == [
        (1, "failed"),
        (2, "failed"),
        (3, "completed"),
    ]
    assert (await read(database, generation)).error_message is None


async def test_a_spent_budget_fails_with_the_reason(database, make_worker, engine):
    generation = await add(database, max_attempts=2)
    engine.script["lofi rain"] = [EngineError("first"), EngineError("second\x00")]
    await make_worker().run(drain=True)
    row = await read(database, generation)
    assert (row.status, row.failures, row.error_message) == ("failed", 2, "second\ufffd")


async def test_an_unexpected_error_fails_its_generation_and_not_the_worker(
    database, make_worker, engine
):
    generation, other = await add(database, max_attempts=1), await add(database, "other")
    engine.script["lofi rain"] = KeyError("surprise")
    await make_worker().run(drain=True)
    assert [(await read(database, row)).status for row in (generation, other)] == [
        "failed",
        "completed",
    ]


async def test_only_an_unexpected_error_is_logged_with_its_trace(
    database, make_worker, engine, caplog
):
    errors = [KeyError("surprise"), EngineError("boom"), TimeoutError("slow")]
    for number, error in enumerate(errors):
        await add(database, f"prompt {number}", max_attempts=1)
        engine.script[f"prompt {number}"] = error
    await make_worker().run(drain=True)
    assert [type(log.exc_info[1]) for log in caplog.records if log.exc_info] == [KeyError]
    assert sum(log.levelname == "WARNING" for log in caplog.records) == 3


async def test_a_timeout_of_the_engine_itself_is_not_taken_for_the_deadline(
    database, make_worker, engine
):
    generation = await add(database, max_attempts=1)
    engine.script["lofi rain"] = TimeoutError("slow")
    await make_worker().run(drain=True)
    assert (await read(database, generation)).error_message == "slow"


async def test_only_beside_a_server_clips_are_finished_in_turns(
    database, make_worker, engine, monkeypatch
):
    notes, finish = [], performing.audio.finish

    def note_and_finish(*arguments, **options):
        notes.append("finished")
        return finish(*arguments, **options)

    async def note_each_turn():
        while True:
            notes.append("turn")
            await asyncio.sleep(0)

    monkeypatch.setattr(performing.audio, "finish", note_and_finish)
    engine.slots = 4
    for number in range(4):
        await add(database, f"prompt {number}")
    ticking = asyncio.create_task(note_each_turn())
    await make_worker(MemoryArtifacts()).run(drain=True)
    ticking.cancel()
    places = [place for place, note in enumerate(notes) if note == "finished"]
    is_between = [second - first > 1 for first, second in pairwise(places)]
    assert is_between == [not database.is_embedded] * 3


async def test_a_rejected_generation_is_not_retried(database, make_worker, engine):
    generation = await add(database)
    engine.script["lofi rain"] = GenerationRejectedError("not this one")
    await make_worker().run(drain=True)
    row = await read(database, generation)
    assert (row.status, row.failures, row.error_message) == ("failed", 1, "not this one")


async def test_a_row_that_no_engine_can_make_fails_with_a_sentence(database, make_worker):
    async with database.session() as session:
        generation = await create_generation(session, "epic", MODEL, 4000.0, 32_000, 1)
    await make_worker().run(drain=True)
    row = await read(database, generation)
    assert (row.status, row.error_message) == (
        "failed",
        "duration is 4000 s; use 0.08 to 300 seconds.",
    )


async def test_a_format_that_cannot_hold_the_sample_rate_is_refused_before_the_engine_works(
    database, make_worker, engine
):
    generation = await add(database, sample_rate=96_000)
    await make_worker(audio_format="mp3").run(drain=True)
    assert (await read(database, generation)).status == "failed"
    assert not engine.started


async def test_a_request_may_have_a_format_of_its_own(database, make_worker):
    generation = await add(database, audio_format="flac")
    await make_worker(audio_format="mp3").run(drain=True)

    row = await read(database, generation)
    assert (row.file_path[-5:], row.get_metadata()["audio"]["format"]) == (".flac", "flac")


async def test_the_file_has_the_title_that_the_row_has_when_it_is_claimed(database, make_worker):
    generation = await add(database)
    async with database.session() as session:
        (await session.get(Generation, generation.id)).title = "Rain"
    await make_worker().run(drain=True)

    with soundfile.SoundFile((await read(database, generation)).file_path) as file:
        assert (file.title, file.artist) == ("Rain", MODEL)
        assert f"Generation: {generation.id}" in file.comment


async def test_a_format_that_this_machine_cannot_write_costs_a_failure_and_no_inference(
    database, make_worker, engine, monkeypatch
):
    monkeypatch.setattr("soundfile.available_formats", lambda: {"FLAC": "", "OGG": ""})
    generation = await add(database, audio_format="mp3", max_attempts=1)
    await make_worker().run(drain=True)

    row = await read(database, generation)
    assert (row.status, row.error_message) == (
        "failed",
        "This machine's libsndfile cannot write MP3; update it, or use WAV.",
    )
    assert not engine.started


async def test_a_worker_whose_own_format_cannot_be_written_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setattr("soundfile.available_formats", dict)
    with pytest.raises(ConfigurationError, match=r"^DGX_MUSIC_AUDIO_FORMAT is ogg, which this"):
        await run_worker(load_settings(audio_format="ogg", output=str(tmp_path)))


@on(SQLITE)
async def test_a_daemon_keeps_what_it_has_imported_out_of_the_search_for_garbage(
    database, monkeypatch, output
):
    spared = []
    monkeypatch.setattr(daemon, "spare_collections", lambda: spared.append(True))
    settings = load_settings(engine="tone", database_url=str(database.url), output=str(output))
    with anyio.fail_after(PATIENCE):
        await run_worker(settings, drain=True)
    assert spared == [True]


async def test_a_replaced_engine_costs_no_budget(database, make_worker, engine):
    generation = await add(database, max_attempts=1)
    engine.script["lofi rain"] = [EngineReplacedError("another one hung"), None]
    await make_worker().run(drain=True)
    assert await attempts_of(database, generation) == [(1, "released"), (2, "completed")]


async def test_a_deadline_ends_an_attempt_that_hangs(database, make_worker, engine):
    generation = await add(database, max_attempts=1)
    engine.hold("lofi rain")
    worker = make_worker()
    worker._performing._settings = replace(
        worker._settings, deadline_floor_seconds=0.05, deadline_factor=0.0
    )
    await worker.run(drain=True)
    assert (
        await read(database, generation)
    ).error_message == "The attempt took longer than its deadline of 0.05 s."


async def test_a_cancelled_generation_stops_and_its_slot_serves_the_next(
    database, make_worker, engine
):
    generation, other = await add(database), await add(database, "other")
    engine.hold("lofi rain")
    async with at_work(
        make_worker(lease_seconds=3600.0, heartbeat_seconds=600.0, poll_seconds=600.0)
    ):
        await engine.started["lofi rain"].wait()
        async with database.session() as session:
            assert await cancel_generation(generation.id, session=session) == "processing"
        assert (await until(database, generation, "cancelled")).file_path is None
        await until(database, other, "completed")
    assert await attempts_of(database, generation) == [(1, "cancelled")]


async def test_a_cancel_that_comes_while_audio_is_stored_wins_over_completion(
    database, make_worker, output
):
    generation = await add(database)

    class CancelMeanwhile(LocalArtifacts):
        async def publish(self, *args):
            artifact = await super().publish(*args)
            async with database.session() as session:
                await queue.cancel(session, generation.id)
            return artifact

    worker = make_worker(CancelMeanwhile(output))
    worker._leases.notice_cancels = anyio.sleep_forever
    await worker.run(drain=True)
    assert (await read(database, generation)).status == "cancelled"
    assert list(output.iterdir()) == []


async def test_a_lost_lease_stops_the_generation_and_leaves_the_successor_alone(
    database, make_worker, engine
):
    generation = await add(database)
    engine.hold("lofi rain")
    async with at_work(make_worker()):
        await engine.started["lofi rain"].wait()
        async with database.session() as session:
            await back_date(session, generation.id, lease_expires_at=1)
            await rescue_lapsed(session)
            await queue.claim(
                session, worker_id="rival", model_name=MODEL, limit=1, lease_seconds=60
            )
        await engine.stopped["lofi rain"].wait()
    row = await read(database, generation)
    assert (row.status, row.worker_id, row.attempt) == ("processing", "rival", 2)


async def test_audio_of_a_lost_lease_is_dropped(database, make_worker, output):
    generation = await add(database)

    class LoseMeanwhile(LocalArtifacts):
        async def publish(self, *args):
            artifact = await super().publish(*args)
            async with database.session() as session:
                await back_date(session, generation.id, lease_expires_at=1)
                await rescue_lapsed(session)
                await queue.claim(
                    session, worker_id="rival", model_name=MODEL, limit=1, lease_seconds=60
                )
            return artifact

    worker = make_worker(LoseMeanwhile(output))
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            while not output.exists() or list(output.iterdir()) or worker._leases.running:
                await anyio.sleep(0.01)
    assert (await read(database, generation)).worker_id == "rival"


async def test_heartbeats_store_progress_and_extend_the_lease(database, make_worker, engine):
    generation = await add(database)
    engine.hold("lofi rain")
    engine.progress["lofi rain"] = 0.25
    async with at_work(make_worker()):
        await engine.started["lofi rain"].wait()
        before = (await read(database, generation)).lease_expires_at
        with anyio.fail_after(PATIENCE):
            while (
                row := await read(database, generation)
            ).lease_expires_at == before or not row.progress:
                await anyio.sleep(0.01)
    assert row.lease_expires_at > before
    assert row.progress == 0.25


async def test_a_stop_lets_what_runs_finish_and_claims_nothing_more(database, make_worker, engine):
    generation, other = await add(database), await add(database, "other")
    release = engine.hold("lofi rain")
    worker = make_worker()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.started["lofi rain"].wait()
        worker.stop()
        release.set()
    assert (await read(database, generation)).status == "completed"
    assert (await read(database, other)).status == "pending"


@pytest.mark.parametrize(("grace", "stops"), [(0.0, 1), (30.0, 2)])
async def test_what_outlives_the_grace_or_a_second_stop_is_released_at_no_cost(
    database, make_worker, engine, grace, stops
):
    generation = await add(database)
    engine.hold("lofi rain")
    worker = make_worker(grace_seconds=grace)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await engine.started["lofi rain"].wait()
        for _ in range(stops):
            worker.stop()
    row = await read(database, generation)
    assert (row.status, row.failures, row.attempt) == ("pending", 0, 1)
    assert await attempts_of(database, generation) == [(1, "released")]


async def test_a_cancelled_worker_task_releases_what_it_holds(database, make_worker, engine):
    generation = await add(database)
    engine.hold("lofi rain")
    task = asyncio.create_task(make_worker().run())
    await engine.started["lofi rain"].wait()
    task.cancel()
    await asyncio.wait([task])
    assert (await read(database, generation)).status == "pending"


async def test_an_engine_that_dies_of_everything_stops_the_worker_and_spares_the_queue(
    database, make_worker, engine
):
    rows = [await add(database, f"prompt {number}") for number in range(BROKEN_AFTER + 3)]
    for number in range(len(rows)):
        engine.script[f"prompt {number}"] = EngineCrashedError("killed by SIGSEGV")
    with pytest.raises(EngineCrashedError):
        await make_worker().run(drain=True)
    failures = [(await read(database, row)).failures for row in rows]
    # one more may have been in the slot already
    assert BROKEN_AFTER <= sum(failures) <= BROKEN_AFTER + 1
    assert failures[-1] == 0


async def test_one_death_of_the_engine_is_no_reason_to_stop_however_many_it_hits(
    database, make_worker, engine
):
    engine.slots = 2 * BROKEN_AFTER
    rows = [await add(database, f"prompt {number}") for number in range(engine.slots)]
    for row in rows:
        engine.script[row.prompt] = [EngineCrashedError("killed by SIGKILL"), None]
    engine.dies_at_once = True
    await make_worker().run(drain=True)
    assert {(await read(database, row)).status for row in rows} == {"completed"}


async def test_one_prompt_that_kills_its_engine_runs_out_of_budget_and_the_next_is_served(
    database, make_worker, engine
):
    poison, other = await add(database, max_attempts=3), await add(database, "other")
    engine.script["lofi rain"] = EngineCrashedError("died")
    await make_worker().run(drain=True)
    assert [(await read(database, row)).status for row in (poison, other)] == [
        "failed",
        "completed",
    ]


async def test_a_full_disk_stops_the_worker_and_costs_no_budget(database, make_worker):
    generation, other = await add(database), await add(database, "other")

    class FullDisk(MemoryArtifacts):
        async def publish(self, *args):
            raise ArtifactError("no space left")

    with pytest.raises(ArtifactError):
        await make_worker(FullDisk()).run(drain=True)
    assert [(await read(database, row)).failures for row in (generation, other)] == [0, 0]


async def test_an_engine_that_cannot_start_at_first_stops_the_worker(database, make_worker, engine):
    engine.start_errors = [EngineUnavailableError("no weights")]
    with pytest.raises(EngineUnavailableError, match="no weights"):
        await make_worker().run(drain=True)


async def test_a_stop_while_the_engine_loads_ends_the_worker(
    database, make_worker, engine, monkeypatch
):
    generation = await add(database)
    monkeypatch.setattr(engine, "start", lambda model: anyio.sleep_forever())
    worker = make_worker()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await anyio.wait_all_tasks_blocked()
        worker.stop()
    assert engine.is_closed
    assert (await read(database, generation)).attempt == 0


async def test_an_unusable_output_folder_stops_the_worker_before_anything_is_claimed(
    database, make_worker, tmp_path
):
    generation = await add(database)
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(ArtifactError):
        await make_worker(LocalArtifacts(blocked / "audio")).run(drain=True)
    assert (await read(database, generation)).attempt == 0


@on(SQLITE)  # the worker's own database, in whose place another one is put
async def test_a_database_that_is_not_migrated_is_refused(make_worker, empty_database):
    worker = make_worker()
    worker._database = empty_database
    with pytest.raises(DatabaseNotMigratedError, match="run `dgx-music db migrate`"):
        await worker.run()


def fail_commits(database, monkeypatch, *, times, after):
    """Make this many completing transactions fail, before or after they were committed."""
    complete = queue.complete
    left = [times]

    async def failing(session, completions):
        if left[0] and not after:
            left[0] -= 1
            raise DatabaseUnavailableError("db", "gone")
        done = await complete(session, completions)
        if left[0]:
            left[0] -= 1
            await session.commit()
            raise DatabaseUnavailableError("db", "gone after the commit")
        return done

    monkeypatch.setattr(queue, "complete", failing)


@pytest.mark.parametrize("after", [False, True])
async def test_a_database_hiccup_at_completion_loses_nothing(
    database, make_worker, monkeypatch, after
):
    generation = await add(database)
    monkeypatch.setattr("dgx_music.worker.completions._RETRY_SECONDS", (0.01,))
    fail_commits(database, monkeypatch, times=3, after=after)
    await make_worker().run(drain=True)
    row = await read(database, generation)
    assert (row.status, row.failures) == ("completed", 0)
    assert Path(row.file_path).exists()


def note_call(monkeypatch, name, note):
    """Call this before each call of the queue's function."""
    function = getattr(queue, name)

    async def noted(*args, **options):
        note()
        return await function(*args, **options)

    monkeypatch.setattr(queue, name, noted)


RAISED = [
    MemoryError(),
    RuntimeError("can't start new thread"),
    OSError(12, "Cannot allocate memory"),
    InternalError("COMMIT", None, Exception("the driver is confused")),
    InterfaceError("COMMIT", None, Exception("another operation is in progress")),
    asyncio.CancelledError(),
]


def fail_after_commit(monkeypatch, errors, then=lambda: None):
    """Have completions raise these, one after the other, each after its commit; ``then`` is called just before."""
    complete = queue.complete

    async def completing(session, completions):
        done = await complete(session, completions)
        for error in errors if done else ():  # a renewal that has the row just now makes it wait
            await session.commit()
            then()
            raise error
        return done

    monkeypatch.setattr(queue, "complete", completing)


def raising(error):
    async def function(*args, **options):
        raise error

    return function


async def completed_file(database, generation):
    row = await read(database, generation)
    assert (row.status, row.failures, row.attempt) == ("completed", 0, 1)
    return Path(row.file_path).read_bytes()


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
async def test_whatever_is_raised_after_its_commit_a_completed_row_keeps_its_file(
    database, make_worker, monkeypatch, error
):
    generation, raised = await add(database), iter([error])
    fail_after_commit(monkeypatch, raised)
    await make_worker().run(drain=True)
    assert await completed_file(database, generation)
    assert next(raised, None) is None


@pytest.mark.parametrize("error", RAISED[:-1], ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("unreadable", [1, 2])
async def test_a_completed_row_keeps_its_file_when_nobody_can_tell_that_it_is_completed(
    database, make_worker, monkeypatch, error, unreadable
):
    generation = await add(database)

    def hide():
        for name, module in [("find_completed", queue), ("find_owners", performing)][:unreadable]:
            monkeypatch.setattr(module, name, raising(error))

    fail_after_commit(monkeypatch, iter([error]), hide)
    await make_worker().run(drain=True)
    assert await completed_file(database, generation)


@pytest.mark.parametrize("error", RAISED[:-1], ids=lambda error: type(error).__name__)
async def test_audio_whose_completion_was_not_written_is_dropped(
    database, make_worker, monkeypatch, output, error
):
    generation = await add(database, max_attempts=1)
    monkeypatch.setattr(queue, "complete", raising(error))
    await make_worker().run(drain=True)
    assert ((await read(database, generation)).status, list(output.iterdir())) == ("failed", [])


async def test_completions_that_were_written_together_all_keep_their_files(
    database, make_worker, engine, monkeypatch
):
    engine.slots = 4
    rows = [await add(database, f"prompt {number}") for number in range(4)]
    fail_after_commit(monkeypatch, iter(RAISED))
    await make_worker().run(drain=True)
    assert [bool(await completed_file(database, row)) for row in rows] == [True] * 4


@pytest.mark.parametrize("lets_go", ["fail", "release"])
@pytest.mark.parametrize("error", RAISED[:-1], ids=lambda error: type(error).__name__)
async def test_an_error_while_a_row_is_let_go_ends_no_worker(
    database, make_worker, engine, monkeypatch, lets_go, error
):
    generation, other = await add(database), await add(database, "other")
    engine.script["lofi rain"] = [
        EngineError("boom") if lets_go == "fail" else EngineReplacedError("full"),
        None,
    ]
    monkeypatch.setattr(queue, lets_go, raising(error))
    worker = make_worker()
    async with at_work(worker):
        await until(database, other, "completed")
    assert (await read(database, generation)).failures == 0


async def test_files_that_no_thread_can_be_had_to_remove_end_no_worker(
    database, make_worker, engine
):
    generation = await add(database)
    engine.script["lofi rain"] = [EngineError("boom"), None]

    class NoThreads(MemoryArtifacts):
        async def delete(self, generation_id, attempts):
            raise RuntimeError("can't start new thread")

    await make_worker(NoThreads()).run(drain=True)
    assert (await read(database, generation)).status == "completed"


async def test_a_completion_that_cannot_be_stored_fails_alone(database, make_worker, engine):
    engine.slots = 4
    bad = await add(database, "bad", max_attempts=1)
    good = [await add(database, f"prompt {number}") for number in range(3)]
    engine.facts["bad"] = {"x": "\ud800"}
    await make_worker(MemoryArtifacts()).run(drain=True)
    assert (await read(database, bad)).status == "failed"
    assert {(await read(database, row)).status for row in good} == {"completed"}


async def test_a_stop_while_audio_is_stored_never_takes_the_file_of_a_completed_row(
    database, make_worker, output
):
    generation = await add(database)
    storing, stored = asyncio.Event(), asyncio.Event()

    class Slow(LocalArtifacts):
        async def publish(self, *args):
            storing.set()
            with anyio.CancelScope(shield=True):
                await stored.wait()
                return await super().publish(*args)

    worker = make_worker(Slow(output))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        await storing.wait()
        worker.stop()
        worker.stop()
        with anyio.fail_after(PATIENCE):
            while not all(running.stopped_for for running in worker._leases.running.values()):
                await asyncio.sleep(0)
        stored.set()
    row = await read(database, generation)
    assert (row.status, row.failures, list(output.iterdir())) == ("pending", 0, [])


async def test_a_folder_that_nothing_can_be_removed_from_stops_no_worker(
    database, make_worker, engine, output
):
    generation, other = await add(database, max_attempts=1), await add(database, "other")
    engine.script["lofi rain"] = EngineError("boom")

    class Stuck(MemoryArtifacts):
        async def delete(self, generation_id, attempts):
            if generation_id == generation.id:
                raise ArtifactError("read-only file system")
            return 0

    await make_worker(Stuck()).run(drain=True)
    assert [(await read(database, row)).status for row in (generation, other)] == [
        "failed",
        "completed",
    ]


@pytest.mark.parametrize("progress", [1.0000001, -0.5, float("nan")])
async def test_progress_out_of_range_is_not_stored(database, make_worker, engine, progress):
    generation = await add(database)
    engine.hold("lofi rain")
    engine.progress["lofi rain"] = progress
    async with at_work(make_worker()):
        await engine.started["lofi rain"].wait()
        before = (await read(database, generation)).lease_expires_at
        await until(database, generation, "processing", lambda row: row.lease_expires_at > before)
    assert (await read(database, generation)).progress == 0.0


async def test_heartbeats_that_fail_for_a_while_cost_nothing(
    database, make_worker, engine, monkeypatch
):
    generation = await add(database)
    held = engine.hold("lofi rain")
    renew, failures = queue.renew, iter([DatabaseUnavailableError("db", "gone")] * 3)

    async def failing(session, progress, **options):
        for error in failures:
            raise error
        held.set()
        return await renew(session, progress, **options)

    monkeypatch.setattr(queue, "renew", failing)
    await make_worker().run(drain=True)
    assert await attempts_of(database, generation) == [(1, "completed")]


async def test_what_was_claimed_for_a_worker_that_is_cancelled_meanwhile_is_released(
    database, make_worker, monkeypatch
):
    generation = await add(database)
    claim, committing = queue.claim, asyncio.Event()

    async def claiming(session, **options):
        claims = await claim(session, **options)
        committing.set()
        await session.commit()
        return claims

    monkeypatch.setattr(queue, "claim", claiming)
    task = asyncio.create_task(make_worker().run())
    await committing.wait()
    task.cancel()
    await asyncio.wait([task])
    row = await read(database, generation)
    assert (row.status, row.failures, row.worker_id) == ("pending", 0, None)


async def test_completions_that_are_ready_together_share_a_transaction(
    database, make_worker, engine, monkeypatch
):
    engine.slots = 8
    for number in range(8):
        await add(database, f"prompt {number}")
    sizes = []
    complete = queue.complete

    async def counting(session, completions):
        done = await complete(session, completions)
        # a heartbeat may hold the rows just then: those are written a moment later
        sizes.append(len(done))
        return done

    monkeypatch.setattr(queue, "complete", counting)
    await make_worker(MemoryArtifacts()).run(drain=True)
    assert sum(sizes) == 8
    assert max(sizes) > 1


async def test_a_lost_workers_generation_is_rescued_and_its_file_removed(
    database, make_worker, output
):
    generation = await add(database)
    async with database.session() as session:
        await queue.claim(session, worker_id="dead", model_name=MODEL, limit=1, lease_seconds=30)
        await back_date(session, generation.id, lease_expires_at=1)
    await LocalArtifacts(output).publish(generation.id, 1, "wav", b"half a generation")
    await make_worker().run(drain=True)
    assert await attempts_of(database, generation) == [(1, "lost"), (2, "completed")]
    assert [file.name for file in output.iterdir()] == [f"{generation.id}-2.wav"]


async def test_a_rescue_removes_the_lost_attempts_file_by_itself(database, make_worker, output):
    generation = await add(database)
    async with database.session() as session:
        await queue.claim(session, worker_id="dead", model_name=MODEL, limit=1, lease_seconds=30)
        await back_date(session, generation.id, lease_expires_at=1)
    await LocalArtifacts(output).publish(generation.id, 1, "wav", b"half a generation")
    await make_worker()._sweeping.rescue()
    assert ((await read(database, generation)).status, list(output.iterdir())) == ("pending", [])


async def test_a_rescue_removes_the_lost_attempts_preview(database, make_worker, output):
    generation = await add(database)
    async with database.session() as session:
        await queue.claim(session, worker_id="dead", model_name=MODEL, limit=1, lease_seconds=30)
        await back_date(session, generation.id, lease_expires_at=1)
    await LocalArtifacts(output).publish_preview(generation.id, 1, 0, b"a second of music")
    await make_worker()._sweeping.rescue()
    assert [*output.glob("previews/*")] == []


async def test_files_of_earlier_attempts_are_removed_before_completion(
    database, make_worker, output, monkeypatch
):
    generation = await add(database)
    # the first attempt's worker ended before it could remove anything
    async with database.session() as session:
        [claimed] = await queue.claim(
            session, worker_id="former", model_name=MODEL, limit=1, lease_seconds=30
        )
        await queue.release(session, [claimed.lease])
    await LocalArtifacts(output).publish(generation.id, 1, "flac", b"left behind")
    there = []
    note_call(monkeypatch, "complete", lambda: there.extend(file.name for file in output.iterdir()))
    await make_worker().run(drain=True)
    assert set(there) == {f"{generation.id}-2.wav"}  # looked at again if a heartbeat held the row


async def test_a_worker_is_listed_while_it_runs(database, make_worker, engine):
    await add(database)
    engine.hold("lofi rain")
    worker = make_worker()
    async with at_work(worker):
        await engine.started["lofi rain"].wait()
        async with database.session() as session:
            [listed] = await workers.get_workers(session)
        assert (listed["id"], listed["is_alive"], listed["slots"]) == (worker.id, True, 1)
    async with database.session() as session:
        [listed] = await workers.get_workers(session)
    assert (listed["state"], listed["is_alive"], listed["end_reason"]) == (
        "ended",
        False,
        "it was stopped",
    )


async def test_a_worker_is_listed_while_it_loads_its_model(database, make_worker, engine):
    worker = make_worker()
    loaded = engine.hold_load()
    async with at_work(worker):
        await engine.loading.wait()
        async with database.session(read_only=True) as session:
            [listed] = await workers.get_workers(session)
            service = await workers.find_service(session, MODEL)
        loaded.set()
    assert (listed["state"], listed["is_alive"], service.serving_count, service.loading_count) == (
        "loading",
        True,
        0,
        1,
    )


async def test_a_worker_that_loads_its_model_goes_on_saying_that_it_lives(
    database, make_worker, engine
):
    loaded = engine.hold_load()
    async with at_work(make_worker(lease_seconds=1.0)):
        await engine.loading.wait()
        async with database.session() as session:
            await session.execute(update(WorkerInfo).values(heartbeat_at=now_plus(-1000.0)))
        with anyio.fail_after(PATIENCE):
            while not (await service_of(database)).loading_count:
                await anyio.sleep(0.02)
        loaded.set()


async def until_serving(database):
    with anyio.fail_after(PATIENCE):
        while not (await service_of(database)).serving_count:
            await anyio.sleep(0.01)


async def service_of(database):
    async with database.session(read_only=True) as session:
        return await workers.find_service(session, MODEL)


async def test_a_worker_that_cannot_load_its_model_leaves_word_of_why(
    database, make_worker, engine
):
    engine.start_errors = [EngineUnavailableError("The weights are not here.")]
    with pytest.raises(EngineUnavailableError):
        await make_worker().run()
    service = await service_of(database)
    assert (service.serving_count, service.loading_count, service.end_reason) == (
        0,
        0,
        "The weights are not here.",
    )


async def test_a_worker_that_cannot_store_audio_leaves_word_of_why(database, make_worker, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ArtifactError) as raised:
        await make_worker(LocalArtifacts(tmp_path / "file" / "audio")).run()
    assert (await service_of(database)).end_reason == str(raised.value)


async def test_a_worker_that_cannot_say_that_it_is_ready_serves_all_the_same(
    database, make_worker, monkeypatch
):
    generation = await add(database)
    heartbeat, failures = workers.heartbeat_worker, []

    async def fail_once_loaded(session, **values):
        if values["state"] == "serving" and not failures:
            failures.append(DatabaseUnavailableError("db", "it restarts"))
            raise failures[0]
        await heartbeat(session, **values)

    monkeypatch.setattr(workers, "heartbeat_worker", fail_once_loaded)
    await make_worker().run(drain=True)
    assert ((await read(database, generation)).status, len(failures)) == ("completed", 1)


async def test_a_worker_leaves_word_of_its_end_before_it_waits_for_that_of_its_engine(
    database, make_worker, engine, monkeypatch
):
    found = []

    async def close():
        found.append((await service_of(database)).end_reason)

    monkeypatch.setattr(engine, "close", close)
    async with at_work(make_worker()):
        await until_serving(database)
    assert found == ["it was stopped"]


@on(SQLITE)
async def test_a_worker_whose_file_stays_gone_for_a_lease_ends_with_a_sentence(
    database, make_worker
):
    async def delete():
        await until_serving(database)
        database.path.unlink()

    error = await end_of(make_worker(lease_seconds=1.0), delete(), DatabaseUnavailableError)
    assert str(error).endswith(
        "cannot be used: its file is gone; put it back, or make a new one: dgx-music db init."
    )
    assert not database.path.exists()


@on(SQLITE)
async def test_a_worker_whose_file_is_put_back_within_a_lease_goes_on(database, make_worker):
    async with at_work(make_worker(lease_seconds=30.0)):
        await until_serving(database)
        database.path.rename(away := database.path.with_name("away.db"))
        with pytest.raises(DatabaseUnavailableError):
            await add(database)
        away.rename(database.path)
        generation = await add(database)
        await until(database, generation, "completed")


async def test_a_drained_worker_leaves_word_of_that(database, make_worker):
    await make_worker().run(drain=True)
    assert (await service_of(database)).end_reason == "its queue was empty, as --drain asks for"


# --------------------------------------------------------------------------------- another version's schema, meanwhile


async def become(database, revision):
    """Do what matters of a migration to another version's schema, in either direction."""
    async with database.session() as session:
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'"))


OTHER_REVISIONS = pytest.mark.parametrize(
    ("revision", "remedy"), [("9999", "upgrade dgx-music"), ("0001", "run `dgx-music db migrate`")]
)


async def end_of(worker, meanwhile=None, kind=DatabaseNotMigratedError):
    """Return the error that ends the worker while this is done beside it."""
    task = asyncio.ensure_future(meanwhile) if meanwhile is not None else None
    with pytest.raises(kind) as raised:
        await worker.run()
    if task is not None:
        await task
    return raised.value


@OTHER_REVISIONS
async def test_a_worker_whose_schema_has_changed_finishes_claims_nothing_and_ends(
    database, make_worker, engine, revision, remedy
):
    released = engine.hold("first")
    first, second = await add(database, "first"), await add(database, "second")

    async def migrate():
        await engine.started["first"].wait()
        await become(database, revision)
        released.set()

    error = await end_of(make_worker(), migrate())
    assert (error.exit_code, str(error).endswith(f"{remedy}.")) == (5, True)
    assert [(await read(database, row)).status for row in (first, second)] == [
        "completed",
        "pending",
    ]
    assert ((await service_of(database)).end_reason, [r.prompt for r in engine.requests]) == (
        str(error),
        ["first"],
    )


@OTHER_REVISIONS
async def test_an_idle_worker_notices_that_its_schema_has_changed(
    database, make_worker, revision, remedy
):
    async def migrate():
        await until_serving(database)
        await become(database, revision)

    assert remedy in str(await end_of(make_worker(), migrate()))


async def test_a_drain_that_meets_another_schema_does_not_end_as_if_all_were_done(
    database, make_worker, engine
):
    await add(database)
    engine.on_start = lambda: become(database, "9999")
    with pytest.raises(DatabaseNotMigratedError):
        await make_worker().run(drain=True)
    assert engine.requests == []


async def test_a_worker_whose_tables_lost_a_column_ends_with_the_schema_that_it_met(
    database, make_worker
):
    async def downgrade():
        await until_serving(database)
        async with database.migrating() as engine, engine.begin() as connection:
            await connection.run_sync(migrations.downgrade, "0002")

    error = await end_of(make_worker(), downgrade())
    assert (error.found, error.exit_code) == ("0002", 5)


async def test_a_worker_lives_on_while_its_database_is_made_anew(database, make_worker):
    worker = make_worker()
    async with at_work(worker):
        await until_serving(database)
        await database.reset()
        generation = await add(database)
        await until(database, generation, "completed")
    assert await attempts_of(database, generation) == [(1, "completed")]


async def test_a_drain_leaves_what_is_scheduled_for_later(database, make_worker):
    generation = await add(database, run_at="2999-01-01T00:00:00Z")
    await make_worker().run(drain=True)
    assert (await read(database, generation)).status == "pending"


async def test_a_completion_under_way_is_not_stopped(database, make_worker, engine, monkeypatch):
    generation = await add(database)
    complete = queue.complete
    worker = make_worker(heartbeat_seconds=10.0)

    async def completing(session, completions):
        done = await complete(session, completions)
        worker._leases.running[Lease(generation.id, 1)].stop(Stop.LOST)
        return done

    monkeypatch.setattr(queue, "complete", completing)
    await worker.run(drain=True)
    assert Path((await read(database, generation)).file_path).exists()


# what a request brings


async def test_the_engine_gets_what_the_request_brings(database, make_worker, engine):
    given = {
        "continuation": audio_file(0.5, channels=2),
        "melody": audio_file(0.25),
        "model": "musicgen-stereo-melody",
    }
    await add(database, "", duration=1, negative_prompt="drums", **given)
    await make_worker(model="musicgen-stereo-melody").run(drain=True)
    (request,) = engine.requests
    assert (request.prompt, request.negative_prompt) == ("", "drums")
    assert (request.continuation.samples.shape, request.melody.samples.shape) == (
        (2, 16_000),
        (1, 8_000),
    )
    assert (request.continuation.sample_rate, request.melody.sample_rate) == (32_000, 32_000)


async def test_the_engine_hears_a_tune_of_50_s_whole_if_the_music_is_long(
    database, make_worker, engine
):
    tune = audio_file(50)
    for duration in (60, 30):
        await add(database, duration=duration, melody=tune, model="musicgen-melody")
    await make_worker(model="musicgen-melody").run(drain=True)
    expected, rate = soundfile.read(io.BytesIO(tune), dtype="float32")
    heard = {request.duration: request.melody.samples for request in engine.requests}
    assert np.array_equal(heard[60], expected[None])
    assert np.array_equal(heard[30], expected[None, : 30 * rate])


async def test_a_clip_that_is_damaged_fails_its_generation_for_good(database, make_worker):
    generation = await add(database, duration=2, continuation=audio_file())
    async with database.session() as session:
        await session.execute(update(Clip).values(data=b"noise"))
    await make_worker().run(drain=True)
    row = await read(database, generation)
    told = "The continuation is damaged in the database; enqueue the request again with the clip."
    assert (row.status, row.attempt, row.error_message) == ("failed", 1, told)


async def test_a_database_that_is_away_while_a_clip_is_read_costs_no_attempt(
    database, make_worker, monkeypatch
):
    away = [DatabaseUnavailableError("db", "it is away")]

    async def read_later(session, sha256s, read=clips.read_clips):
        if away:
            raise away.pop()
        return await read(session, sha256s)

    monkeypatch.setattr("dgx_music.worker.performing.read_clips", read_later)
    monkeypatch.setattr("dgx_music.worker.performing._CLIP_RETRY_SECONDS", 0.01)
    generation = await add(database, duration=2, continuation=audio_file())
    await make_worker().run(drain=True)
    assert (
        (await read(database, generation)).status,
        await attempts_of(database, generation),
        away,
    ) == (
        "completed",
        [(1, "completed")],
        [],
    )
