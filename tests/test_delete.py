"""Delete means gone: row, audio and references, whatever it meets on the way and wherever it is broken off."""

import asyncio
import signal
from pathlib import Path

import anyio
import pytest
from sqlalchemy import func, insert, select

from dgx_music import (
    cancel_generations,
    delete_generation_and_audio,
    delete_generations,
    retry_generation,
    star_generations,
)
from dgx_music.artifacts import LocalArtifacts, MemoryArtifacts, open_output
from dgx_music.client import delete as client
from dgx_music.errors import (
    ArtifactError,
    CountDiffersError,
    DatabaseUnavailableError,
    GenerationNotFoundError,
    IllegalTransitionError,
    InvalidRequestError,
    PartlyDoneError,
)
from dgx_music.storage import (
    Attempt,
    Clip,
    Generation,
    queue,
    retention,
    update_generation_status,
)
from dgx_music.storage.bulk import BulkResult, Refusal
from dgx_music.storage.models import Batch, Tag
from tests.daemons import Daemon, is_finished, is_running, rows_of, until, url_of
from tests.daemons import add as enqueue
from tests.factories import add_generation, back_date, claim_up_to, on, read, start_one
from tests.mortal import die_deleting
from tests.object_store import proxy_fixture, s3_fixture, s3_port_fixture  # noqa: F401 - fixtures
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver

AUDIO = b"music"


@pytest.fixture
def database(default_database):
    return default_database


@pytest.fixture
def place(tmp_path):
    return LocalArtifacts(tmp_path / "audio")


async def add(database, **values):
    async with database.session() as session:
        return (await add_generation(session, **values)).id


async def add_completed(database, place, attempt=1, **values):
    """Add a completed row whose last attempt's file is there; return its id."""
    completed = await add(database, status="completed", attempt=attempt, **values)
    stored = await place.publish(completed, attempt, "wav", AUDIO)
    async with database.session() as session:
        row = await session.get(retention.Generation, completed)
        row.file_path, row.sha256 = stored.path, stored.sha256
    return completed


async def count(database, model):
    async with database.session(read_only=True) as session:
        return await session.scalar(select(func.count()).select_from(model))


async def files_in(place):
    return {Path(file.path).name async for file in place.list_files()}


# What goes


async def test_row_audio_attempts_and_tags_go_and_nothing_else(database, place):
    gone = await add_completed(database, place, attempt=2, tags=["rain"])
    await place.publish(gone, 1, "flac", b"of an attempt that was lost")
    kept = await add_completed(database, place)
    async with database.session() as session:
        session.add(Attempt(generation_id=gone, attempt=2, worker_id="w"))

    assert await delete_generations(ids=[gone], artifacts=place) == BulkResult(changed=1)

    assert set(await rows_of(database)) == {kept}
    assert await files_in(place) == {f"{kept}-1.wav"}
    assert (await count(database, Attempt), await count(database, Tag)) == (0, 0)


@pytest.mark.parametrize("status", ["pending", "failed", "cancelled"])
async def test_what_is_not_completed_goes_with_what_its_attempts_left(database, place, status):
    gone = await add(database, status=status, attempt=2)
    for attempt in (1, 2):
        await place.publish(gone, attempt, "wav", AUDIO)

    assert (await delete_generations(status=status, artifacts=place)).changed == 1

    assert (await rows_of(database), await files_in(place)) == ({}, set())


async def test_audio_goes_from_where_its_row_says_that_it_is(database, place, tmp_path):
    former = LocalArtifacts(tmp_path / "former")
    gone = await add_completed(database, former, attempt=2)
    await place.publish(gone, 1, "wav", AUDIO)

    await delete_generation_and_audio(gone, artifacts=place)

    assert (await files_in(place), await files_in(former)) == (set(), set())


async def test_the_output_of_the_settings_is_meant_if_none_is_given(database, place, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_OUTPUT", str(place.root))
    gone = await add(database, status="failed", attempt=1)
    await place.publish(gone, 1, "wav", AUDIO)
    await delete_generation_and_audio(gone)
    assert await files_in(place) == set()


async def test_audio_in_an_object_store_goes(database, s3, place):
    store = open_output(s3)
    gone = await add_completed(database, store, attempt=2)
    await store.publish(gone, 1, "wav", AUDIO)
    kept = await add_completed(database, store)

    await delete_generations(ids=[gone], artifacts=place)

    assert await files_in(store) == {f"{kept}-1.wav"}


@on("sqlite")
async def test_a_store_that_fails_half_way_keeps_the_rows_and_a_repetition_leaves_nothing(
    database, s3, proxy, place
):
    store = open_output(s3)
    ids = [await add_completed(database, store, attempt=2) for _ in range(3)]
    proxy.fail("POST", 403)  # how the client deletes

    with pytest.raises((ArtifactError, PartlyDoneError), match=r"cannot be removed"):
        await delete_generations(ids=ids, artifacts=place)
    left = set(await rows_of(database))
    assert {name.removesuffix("-2.wav") for name in await files_in(store)} <= left
    await delete_generations(ids=ids, artifacts=place)

    assert (await rows_of(database), await files_in(store)) == ({}, set())


async def test_a_path_that_no_worker_wrote_is_never_followed(database, place, tmp_path):
    precious = tmp_path / "precious-1.wav"
    precious.write_text("mine")
    wish = {"id": "precious", "file_path": str(precious)}
    await add(database, status="completed", attempt=1, **wish)
    assert (await delete_generations(status="completed", artifacts=place)).changed == 1
    assert precious.exists()


async def test_a_batch_goes_with_its_last_generation(database, place):
    async with database.session() as session:
        session.add_all([Batch(id="full"), Batch(id="empty soon")])
    gone = await add(database, batch_id="empty soon", status="failed")
    also = await add(database, batch_id="full", status="failed")
    await add(database, batch_id="full")

    await delete_generations(ids=[gone, also], artifacts=place)

    async with database.session(read_only=True) as session:
        assert list(await session.scalars(select(Batch.id))) == ["full"]


@pytest.mark.parametrize(("hours", "left"), [(25, {"shared"}), (1, {"own", "shared"})])
async def test_a_clip_that_nothing_refers_to_goes_if_nobody_used_it_for_a_day(
    database, place, hours, left
):
    used = retention.now_plus(-hours * 3600.0)
    async with database.session() as session:
        for name in ("own", "shared"):
            values = {"sha256": name, "data": b"x", "duration_seconds": 1.0, "last_used_at": used}
            await session.execute(insert(Clip).values(values))
    gone = await add(database, status="failed", continuation_sha256="own", melody_sha256="shared")
    await add(database, melody_sha256="shared")

    await delete_generations(ids=[gone], artifacts=place)

    async with database.session(read_only=True) as session:
        assert set(await session.scalars(select(Clip.sha256))) == left


async def test_a_child_of_a_deleted_generation_stays(database, place):
    gone = await add_completed(database, place)
    child = await add(database, parent_id=gone)
    await delete_generation_and_audio(gone, artifacts=place)
    assert (await read(database, child)).parent_id == gone


# What is refused


async def test_a_running_one_is_refused_and_keeps_all(database, place):
    lease = await start_one(database)
    await place.publish(lease.generation_id, 1, "wav", AUDIO)

    with pytest.raises(IllegalTransitionError, match="is processing and cannot become deleted"):
        await delete_generation_and_audio(lease.generation_id, artifacts=place)

    assert not (await read(database, lease.generation_id)).cancel_requested
    assert await files_in(place) == {f"{lease.generation_id}-1.wav"}


async def test_force_is_true_or_false(database, place):
    lease = await start_one(database)
    with pytest.raises(InvalidRequestError, match="force is 'no'"):
        await delete_generations(ids=[lease.generation_id], force="no", artifacts=place)
    assert not (await read(database, lease.generation_id)).cancel_requested


async def test_one_that_is_not_there_is_refused(database, place):
    with pytest.raises(GenerationNotFoundError):
        await delete_generation_and_audio("nothing", artifacts=place)


async def test_another_number_than_expected_deletes_nothing(database, place):
    await add(database, tenant="label-7", status="failed")
    with pytest.raises(CountDiffersError):
        await delete_generations(tenant="label-7", expected=2, artifacts=place)
    assert await count(database, retention.Generation) == 1


async def test_one_whose_folder_is_not_here_is_refused_and_keeps_its_row(database, place, tmp_path):
    unmounted = LocalArtifacts(tmp_path / "disk")
    kept = await add_completed(database, unmounted)
    gone = await add_completed(database, place)
    (tmp_path / "disk").rename(tmp_path / "elsewhere")

    done = await delete_generations(ids=[kept, gone], artifacts=place)

    assert (done.changed, [each.generation_id for each in done.refused]) == (1, [kept])
    assert "which is not on this machine" in done.refused[0].reason
    assert set(await rows_of(database)) == {kept}


async def test_a_file_that_cannot_be_deleted_keeps_its_row_and_those_before_it_are_gone(
    database, place, monkeypatch
):
    monkeypatch.setattr(client, "_AT_ONCE", 1)
    ids = sorted([await add_completed(database, place) for _ in range(3)])
    file = place.root / f"{ids[1]}-1.wav"
    file.unlink()
    file.mkdir()

    with pytest.raises(PartlyDoneError, match=r"^1 of 3 generations were changed") as caught:
        await delete_generations(ids=ids, artifacts=place)

    assert isinstance(caught.value.__cause__, ArtifactError)
    assert set(await rows_of(database)) == set(ids[1:])
    assert (place.root / f"{ids[2]}-1.wav").exists()


async def test_more_than_a_chunk_goes(database, place, monkeypatch):
    monkeypatch.setattr(client, "CHUNK", 2)
    for _ in range(5):
        await add_completed(database, place, tenant="label-7")
    done = await delete_generations(tenant="label-7", expected=5, artifacts=place)
    assert (done.changed, await files_in(place)) == (5, set())


# At the same moment as others


class Meanwhile(MemoryArtifacts):
    """Lets something happen after the files of a row are gone, before the row is."""

    async def delete(self, generation_id, attempts):
        count = await super().delete(generation_id, attempts)
        await self.happen()
        return count


async def test_one_that_is_claimed_at_the_same_moment_stays_with_its_worker(database):
    waiting, place = await add(database), Meanwhile()

    async def claim():
        async with database.session() as session:
            await claim_up_to(session, 1)

    place.happen = claim
    done = await delete_generations(ids=[waiting], artifacts=place)

    assert [each.reason for each in done.refused] == ["it was claimed or changed in the meantime"]
    assert (await read(database, waiting)).status == "processing"


async def test_one_that_is_retried_at_the_same_moment_stays(database):
    failed, place = await add(database, status="failed", attempt=1), Meanwhile()
    place.happen = lambda: retry_generation(failed)

    done = await delete_generations(status="failed", artifacts=place)

    assert (done.changed, done.refused_count) == (0, 1)
    assert (await read(database, failed)).status == "pending"


async def test_claims_and_a_deletion_of_all_meet_and_each_row_goes_or_runs(database, place):
    ids = {await add(database) for _ in range(40)}

    async def claim_some():
        return await database.transact(lambda session: claim_up_to(session, 3))

    done, *claims = await asyncio.gather(
        delete_generations(ids=ids, artifacts=place), *(claim_some() for _ in range(5))
    )

    running = {claim.lease.generation_id for some in claims for claim in some}
    assert set(await rows_of(database)) == running
    assert (done.changed, done.refused_count) == (40 - len(running), len(running))


async def test_one_that_is_starred_before_its_files_are_reached_keeps_them(database, monkeypatch):
    monkeypatch.setattr(client, "_AT_ONCE", 1)
    place = Meanwhile()
    _, second = sorted([await add_completed(database, place) for _ in range(2)])
    place.happen = lambda: star_generations(ids=[second])

    done = await delete_generations(starred=False, artifacts=place)

    assert done.refused == (Refusal(second, "completed", "it does not fit the filters"),)
    assert (set(await rows_of(database)), await files_in(place)) == (
        {second},
        {f"memory:{second}-1.wav"},
    )


# With force


async def test_with_force_one_that_is_starred_while_it_is_waited_for_stays(database, place):
    lease = await start_one(database)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(delete_generations(starred=False, force=True, artifacts=place))
        await until(database, await read(database, lease.generation_id), is_asked_to_stop)
        await star_generations(ids=[lease.generation_id])
        await database.transact(lambda session: queue.release(session, [lease]))

    assert [each.reason for each in task.result().refused] == ["it does not fit the filters"]
    assert set(await rows_of(database)) == {lease.generation_id}


async def test_with_force_one_that_no_longer_fits_is_not_cancelled(database, monkeypatch):
    monkeypatch.setattr(client, "_AT_ONCE", 1)
    place = Meanwhile()
    await add_completed(database, place, id="first")
    await add(database, id="second", worker_id="worker-1")
    place.happen = lambda: star_generations(ids=["second"])

    done = await delete_generations(starred=False, force=True, artifacts=place)

    assert (done.changed, done.refused_count) == (1, 1)
    assert not (await read(database, "second")).cancel_requested


async def test_a_cancel_that_failed_is_not_said_to_be_done(database, place, monkeypatch):
    lease = await start_one(database)

    async def fail(*_arguments, **_options):
        raise DatabaseUnavailableError("somewhere", "it is away")

    monkeypatch.setattr(client.bulk, "make_change", fail)
    with pytest.raises(DatabaseUnavailableError):
        await delete_generations(ids=[lease.generation_id], force=True, artifacts=place)


async def test_with_force_a_status_is_still_a_filter_once_it_is_cancelled(database, place):
    lease = await start_one(database)
    await add(database)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(
            delete_generations(status="processing", force=True, artifacts=place)
        )
        await until(database, await read(database, lease.generation_id), is_asked_to_stop)
        await database.transact(lambda session: queue.release(session, [lease]))

    assert task.result() == BulkResult(changed=1)


class Away(MemoryArtifacts):
    """A place that does not answer."""

    async def delete(self, generation_id, attempts):
        raise ArtifactError("The store does not answer.")


async def test_with_force_what_waits_stays_pending_if_the_store_does_not_answer(database):
    waiting, running = await add(database), await add(database, worker_id="worker-1")

    with pytest.raises(ArtifactError, match=r"^The store does not answer\.$"):
        await delete_generations(ids=[waiting, running], force=True, artifacts=Away())

    assert (await read(database, waiting)).status == "pending"
    assert not (await read(database, running)).cancel_requested


async def test_with_force_an_error_names_what_was_cancelled_and_is_not_deleted(database):
    lost = await add(database, worker_id="worker-1")
    async with database.session() as session:
        await back_date(session, lost, lease_expires_at=-0.5)

    with pytest.raises(PartlyDoneError, match=f"{lost}: cancelled and not deleted") as caught:
        await delete_generations(ids=[lost], force=True, artifacts=Away())

    assert caught.value.cancelled == (lost,)
    assert (await read(database, lost)).status == "cancelled"


async def test_with_force_one_worked_on_by_hand_goes_at_once(database, place):
    own = await add(database)
    async with database.session() as session:
        await update_generation_status(session, own, "processing")
    await delete_generation_and_audio(own, force=True, timeout=0, artifacts=place)
    assert await rows_of(database) == {}


async def test_with_force_the_row_of_a_lost_worker_goes_when_its_lease_has_ended(database, place):
    lease = await start_one(database)
    await place.publish(lease.generation_id, 1, "wav", AUDIO)
    async with database.session() as session:
        await back_date(session, lease.generation_id, lease_expires_at=-0.5)

    await delete_generation_and_audio(lease.generation_id, force=True, artifacts=place)

    assert (await rows_of(database), await files_in(place)) == ({}, set())


async def test_with_force_one_that_does_not_stop_in_time_is_refused_and_asked_to_stop(
    database, place
):
    lease = await start_one(database)
    done = await delete_generations(
        ids=[lease.generation_id], force=True, timeout=0.2, artifacts=place
    )
    assert "its worker has been asked to stop it" in done.refused[0].reason
    assert (await read(database, lease.generation_id)).cancel_requested


def is_asked_to_stop(row):
    return row.cancel_requested


@pytest.fixture
def daemon(start, script):
    """A worker that takes a minute for a storm, and no time for anything else."""
    return start(script=script({"prompt": "storm", "do": "wait", "seconds": 60}))


async def check_it_serves_on(database, place):
    """The worker makes the next generation, and its file is all that there is."""
    row = await until(database, await enqueue(database, "rain"), is_finished)
    assert row.status == "completed"
    assert set(await rows_of(database)) == {row.id}
    with anyio.fail_after(PATIENCE):
        while await files_in(place) != {Path(row.file_path).name}:
            await anyio.sleep(0.05)


async def test_with_force_a_worker_stops_what_is_deleted_and_serves_on(database, place, daemon):
    storm = await until(database, await enqueue(database, "storm"), is_running)

    done = await delete_generations(ids=[storm.id], force=True, artifacts=place)

    assert (done, daemon.process.poll()) == (BulkResult(changed=1), None)
    await check_it_serves_on(database, place)


async def test_with_force_what_a_killed_worker_ran_goes_when_its_lease_ends(
    database, place, daemon, start
):
    storm = await until(database, await enqueue(database, "storm"), is_running)
    daemon.send(signal.SIGKILL)

    await delete_generation_and_audio(storm.id, force=True, artifacts=place)

    start()
    await check_it_serves_on(database, place)


async def stop_between_writes(daemon, database):
    """Stop the process while it has no lock, which would last as long as it is stopped.

    A statement that it has sent may still lock a row: PostgreSQL ends that transaction after a
    second.
    """
    while True:
        daemon.send(signal.SIGSTOP)
        try:
            async with database.session() as session:
                await session.execute(select(Generation.id).with_for_update(nowait=True))
            return
        except DatabaseUnavailableError:
            daemon.send(signal.SIGCONT)


async def test_with_force_a_worker_that_hung_and_goes_on_leaves_nothing(database, place, start):
    """It is stopped for longer than its lease, and then publishes the audio of a row that is gone."""
    daemon: Daemon = start(idle_transaction_timeout_seconds=1)
    await until(database, await enqueue(database, "warm up"), is_finished)
    await delete_generations(status="completed", artifacts=place)
    song = await enqueue(database, "a long song", duration=120.0)
    await until(database, song, is_running)
    await stop_between_writes(daemon, database)

    await delete_generation_and_audio(song.id, force=True, artifacts=place)
    daemon.send(signal.SIGCONT)

    await check_it_serves_on(database, place)


async def test_many_that_wait_and_run_are_deleted_while_a_worker_takes_them(database, place, start):
    start()
    for number in range(40):
        await enqueue(database, f"song {number}", tenant="label-7")

    done = await delete_generations(tenant="label-7", force=True, artifacts=place)

    assert done == BulkResult(changed=40)
    await check_it_serves_on(database, place)


# Killed half-way

POINTS = [
    "cancel: before statement 1",
    "cancel: before the commit",
    "cancel: after the commit",
    "delete: before",
    "delete: after the first file",
    "delete: after",
    "rows: before statement 1",
    "rows: before statement 2",
    "rows: before the commit",
    "rows: after the commit",
]


@pytest.mark.parametrize("point", POINTS)
async def test_a_deletion_that_is_killed_and_repeated_leaves_nothing(database, place, point):
    ids = [await add_completed(database, place, attempt=2) for _ in range(3)]
    await place.publish(ids[0], 1, "wav", b"of an attempt that was lost")
    for worker in (None, "worker-that-is-lost"):
        ids.append(await add(database, attempt=1, worker_id=worker))
        await place.publish(ids[-1], 1, "wav", b"of an attempt that was lost")
    async with database.session() as session:
        await back_date(session, ids[-1], lease_expires_at=-0.5)

    ended = await die_deleting(point, url_of(database), place.root, ids)
    assert ended == -signal.SIGKILL
    orphans = {name.rpartition("-")[0] for name in await files_in(place)} - set(
        await rows_of(database)
    )
    done = await delete_generations(ids=ids, force=True, artifacts=place)

    assert orphans == set()
    assert {refusal.status for refusal in done.refused} <= {None}
    assert (await rows_of(database), await files_in(place)) == ({}, set())


@on("sqlite")
async def test_a_deletion_that_is_cancelled_and_repeated_leaves_nothing(database, place):
    ids = [await add_completed(database, place) for _ in range(30)]
    with anyio.move_on_after(0.02):
        await delete_generations(ids=ids, artifacts=place)
    await delete_generations(ids=ids, artifacts=place)
    assert (await rows_of(database), await files_in(place)) == ({}, set())


async def test_a_cancelled_one_can_be_deleted_while_its_worker_still_stops_it(database, place):
    lease = await start_one(database)
    await cancel_generations(ids=[lease.generation_id])
    done = await delete_generations(ids=[lease.generation_id], artifacts=place)
    assert [each.reason for each in done.refused] == [client._RUNS]
