from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest

from dgx_music.artifacts import LocalArtifacts, MemoryArtifacts, StoredFile
from dgx_music.client import prune as pruning
from dgx_music.client.prune import prune, prune_orphans
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError
from dgx_music.statuses import FINISHED
from dgx_music.storage import Database, count_generations, delete_generation, queue
from dgx_music.worker.worker import Worker
from tests.factories import (
    MODEL,
    add_generation,
    back_date,
    claim_one,
    completion_of,
    read,
    start_one,
)
from tests.fakes import FakeEngine

pytestmark = pytest.mark.any_driver

HOUR = 3_600.0


async def add_finished(
    database: Database, status: str, seconds_ago: float = 0, **values: Any
) -> str:
    async with database.session() as session:
        generation = await add_generation(session, status=status, **{"attempt": 1} | values)
        await back_date(session, generation.id, completed_at=seconds_ago)
    return generation.id


async def count(database: Database) -> int:
    async with database.session(read_only=True) as session:
        return await count_generations(session)


async def test_each_status_is_kept_for_its_own_time(database: Database) -> None:
    for status in FINISHED:
        for seconds_ago in (50, 150):
            await add_finished(database, status, seconds_ago)

    pruned = await prune(
        database, MemoryArtifacts(), {"completed": 200, "failed": 100, "cancelled": 10}
    )

    assert pruned == {"completed": 0, "failed": 1, "cancelled": 2}
    assert await count(database) == 3


async def test_a_status_that_is_left_out_is_kept_for_ever(database: Database) -> None:
    await add_finished(database, "completed", 1e9)

    assert await prune(database, MemoryArtifacts(), {"failed": 0}) == {"failed": 0}
    assert await count(database) == 1


@pytest.mark.parametrize("status", ["pending", "processing"])
async def test_what_is_not_finished_is_never_pruned(database: Database, status: str) -> None:
    await start_one(database)
    async with database.session() as session:
        await add_generation(session)

    assert await prune(database, MemoryArtifacts(), {status: 0}) == {status: 0}
    assert await count(database) == 2


async def test_the_files_of_every_attempt_go_and_no_others(database: Database) -> None:
    artifacts = MemoryArtifacts()
    generation_id = await add_finished(database, "completed", 100, attempt=2)
    for attempt in (1, 2, 3):
        await artifacts.publish(generation_id, attempt, "flac", b"music")
    await artifacts.publish("another", 1, "wav", b"music")

    await prune(database, artifacts, {"completed": 10})

    assert set(artifacts.files) == {f"{generation_id}-3.flac", "another-1.wav"}


async def test_a_path_in_the_row_is_never_followed(database: Database, tmp_path: Path) -> None:
    precious = tmp_path / "precious.wav"
    precious.write_text("mine")
    await add_finished(database, "completed", 100, file_path=str(precious))

    assert await prune(database, LocalArtifacts(tmp_path / "audio"), {"completed": 10}) == {
        "completed": 1
    }
    assert precious.exists()


async def test_a_dry_run_counts_and_deletes_nothing(database: Database) -> None:
    artifacts = MemoryArtifacts()
    generation_id = await add_finished(database, "failed", 100)
    await artifacts.publish(generation_id, 1, "wav", b"music")

    assert await prune(database, artifacts, {"failed": 10}, dry_run=True) == {"failed": 1}
    assert (await count(database), len(artifacts.files)) == (1, 1)


async def test_more_than_a_chunk_is_pruned(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 2)
    for _ in range(5):
        await add_finished(database, "failed", 100)

    assert await prune(database, MemoryArtifacts(), {"failed": 10}) == {"failed": 5}
    assert await count(database) == 0


async def test_a_file_that_cannot_be_deleted_keeps_its_row(
    database: Database, tmp_path: Path
) -> None:
    generation_id = await add_finished(database, "completed", 100)
    (tmp_path / "audio" / f"{generation_id}-1.wav").mkdir(parents=True)

    with pytest.raises(ArtifactError):
        await prune(database, LocalArtifacts(tmp_path / "audio"), {"completed": 10})

    assert await count(database) == 1


async def test_audio_in_another_place_is_refused_and_its_row_kept(database, tmp_path):
    kept = await add_finished(database, "completed", 10, sha256="ab", file_path="/elsewhere/x.wav")
    with pytest.raises(ArtifactError, match=r"x\.wav is not in .*audio; nothing more"):
        await prune(database, LocalArtifacts(tmp_path / "audio"), {"completed": 0.0})
    assert (await read(database, kept)).status == "completed"


# Orphans


async def publish(
    artifacts: MemoryArtifacts, generation_id: str, attempt: int, seconds_ago: float = 1e6
) -> str:
    """Publish a file that is so old, and return its name."""
    artifact = await artifacts.publish(generation_id, attempt, "wav", b"music")
    name = artifact.path.removeprefix("memory:")
    artifacts.modified_at[name] -= timedelta(seconds=seconds_ago)
    return name


async def with_a_known_file(database: Database) -> tuple[MemoryArtifacts, str]:
    """Return a place where the file of a completed generation is, and that file's name."""
    artifacts = MemoryArtifacts()
    return artifacts, await publish(artifacts, await add_finished(database, "completed"), 1)


async def test_a_file_without_a_generation_goes_once_it_is_old(database: Database) -> None:
    artifacts, known = await with_a_known_file(database)
    await publish(artifacts, str(uuid4()), 3, 25 * HOUR)
    young = await publish(artifacts, str(uuid4()), 3, 23 * HOUR)

    assert await prune_orphans(database, artifacts) == 1
    assert set(artifacts.files) == {known, young}


@pytest.mark.parametrize(
    ("status", "attempt", "kept"),
    [
        ("completed", 2, {2, 3}),
        ("processing", 2, {2, 3}),
        ("pending", 2, {3}),
        ("failed", 2, {3}),
        ("cancelled", 2, {3}),
        ("pending", 0, {1, 2, 3}),
    ],
)
async def test_the_files_of_attempts_that_can_never_complete_go(
    database: Database, status: str, attempt: int, kept: set[int]
) -> None:
    artifacts = MemoryArtifacts()
    values = {"worker_id": "worker-1"} if status == "processing" else {"status": status}
    async with database.session() as session:
        row = await add_generation(session, **values | {"attempt": attempt})
    names = {number: await publish(artifacts, row.id, number) for number in (1, 2, 3)}

    assert await prune_orphans(database, artifacts) == 3 - len(kept)
    assert set(artifacts.files) == {names[number] for number in kept}


@pytest.mark.parametrize(
    ("status", "kept"),
    [("completed", {3}), ("processing", {2, 3}), ("pending", {3}), ("failed", {3})],
)
async def test_the_previews_of_attempts_that_are_over_go_and_no_audio_with_them(
    database: Database, status: str, kept: set[int]
) -> None:
    artifacts, known = await with_a_known_file(database)
    values = {"worker_id": "worker-1"} if status == "processing" else {"status": status}
    async with database.session() as session:
        row = await add_generation(session, **values | {"attempt": 2})
    audio = {await publish(artifacts, row.id, 2)} if status == "completed" else set()
    for attempt in (1, 2, 3):
        for number in (0, 1):
            await artifacts.publish_preview(row.id, attempt, number, b"music")
    for name in artifacts.files:
        artifacts.modified_at[name] -= timedelta(days=2)

    assert await prune_orphans(database, artifacts) == 2 * (3 - len(kept))
    parts = {f"previews/{row.id}-{attempt}/{number}" for attempt in kept for number in (0, 1)}
    assert set(artifacts.files) == {known} | audio | parts


async def test_the_file_that_a_row_names_is_never_an_orphan(database: Database) -> None:
    artifacts = MemoryArtifacts()
    generation_id = str(uuid4())
    name = await publish(artifacts, generation_id, 1)
    await add_finished(
        database, "completed", id=generation_id, attempt=2, file_path=f"memory:{name}"
    )

    assert await prune_orphans(database, artifacts) == 0


async def test_somebodys_own_file_is_no_orphan(database: Database) -> None:
    artifacts, known = await with_a_known_file(database)
    own = {
        await publish(artifacts, name, 1) for name in ("my-song", "a" * 32, str(uuid4()).upper())
    }

    assert await prune_orphans(database, artifacts) == 0
    assert set(artifacts.files) == {known, *own}


async def test_a_dry_run_counts_orphans_and_deletes_none(database: Database) -> None:
    artifacts, _ = await with_a_known_file(database)
    await publish(artifacts, str(uuid4()), 1)

    assert await prune_orphans(database, artifacts, dry_run=True) == 1
    assert len(artifacts.files) == 2


async def test_a_database_that_knows_none_of_the_files_deletes_none(database: Database) -> None:
    artifacts = MemoryArtifacts()
    await publish(artifacts, str(uuid4()), 1)
    await add_finished(database, "completed")

    with pytest.raises(ArtifactError, match="knows none of the files in memory"):
        await prune_orphans(database, artifacts)
    assert len(artifacts.files) == 1


async def test_more_orphans_than_a_chunk_go(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 2)
    artifacts, known = await with_a_known_file(database)
    for _ in range(5):
        await publish(artifacts, str(uuid4()), 1)

    assert await prune_orphans(database, artifacts) == 5
    assert set(artifacts.files) == {known}


async def test_half_written_files_of_dead_workers_go_too(
    database: Database, tmp_path: Path
) -> None:
    (tmp_path / f"{uuid4()}-1.wav.part").write_bytes(b"half")
    known = tmp_path / f"{await add_finished(database, 'completed')}-1.wav"
    known.write_bytes(b"music")

    assert await prune_orphans(database, LocalArtifacts(tmp_path), older_than_seconds=0) == 1
    assert list(tmp_path.glob("*.wav*")) == [known]


class Meanwhile(MemoryArtifacts):
    """Lets something happen between the listing of the files and the reading of the rows."""

    happen: Callable[[], Awaitable[None]]

    async def list_files(self) -> AsyncIterator[StoredFile]:
        async for file in super().list_files():
            yield file
        await self.happen()


async def test_an_attempt_that_completes_during_the_listing_keeps_its_file(
    database: Database,
) -> None:
    artifacts, lease = Meanwhile(), await start_one(database)

    async def complete() -> None:
        async with database.session() as session:
            await queue.complete(session, [completion_of(lease, file_path="elsewhere")])

    artifacts.happen = complete
    await publish(artifacts, lease.generation_id, lease.attempt)

    assert await prune_orphans(database, artifacts) == 0


async def test_a_new_attempt_that_starts_during_the_listing_keeps_its_file_and_the_old_one_goes(
    database: Database,
) -> None:
    artifacts, lease = Meanwhile(), await start_one(database)
    await publish(artifacts, lease.generation_id, 1)

    async def start_again() -> None:
        async with database.session() as session:
            await queue.release(session, [lease])
            await claim_one(session)
        await publish(artifacts, lease.generation_id, 2)

    artifacts.happen = start_again

    assert await prune_orphans(database, artifacts) == 1
    assert set(artifacts.files) == {f"{lease.generation_id}-2.wav"}


async def test_a_generation_that_is_deleted_during_the_listing_leaves_an_orphan(
    database: Database,
) -> None:
    artifacts, known = Meanwhile(), await add_finished(database, "completed")
    gone = await add_finished(database, "completed")
    for generation_id in (known, gone):
        await publish(artifacts, generation_id, 1)

    async def delete() -> None:
        async with database.session() as session:
            await delete_generation(session, gone)

    artifacts.happen = delete

    assert await prune_orphans(database, artifacts) == 1
    assert set(artifacts.files) == {f"{known}-1.wav"}


async def test_a_working_worker_never_loses_a_file_to_the_collection(
    database: Database, tmp_path: Path
) -> None:
    """The safe age is turned off: the rule about rows has to hold by itself."""
    artifacts = LocalArtifacts(tmp_path / "audio")
    async with database.session() as session:
        ids = [(await add_generation(session, prompt=f"song {number}")).id for number in range(30)]
    await add_finished(database, "completed")
    settings = load_settings(
        model=MODEL, slots=4, poll_seconds=0.05, database_url="sqlite:///unused.db"
    )

    async def collect() -> None:
        while True:
            await prune_orphans(database, artifacts, older_than_seconds=-10)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect)
        await Worker(database, FakeEngine(slots=4), artifacts, settings).run(drain=True)
        tasks.cancel_scope.cancel()

    rows = [await read(database, generation_id) for generation_id in ids]
    assert [row.status for row in rows] == ["completed"] * 30
    assert all(Path(row.file_path or "").is_file() for row in rows)
