from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dgx_music import prune as pruning
from dgx_music.artifacts import LocalArtifacts, MemoryArtifacts
from dgx_music.errors import ArtifactError
from dgx_music.prune import prune
from dgx_music.storage import Database, count_generations
from dgx_music.storage.schema import FINISHED
from tests.factories import add_generation, back_date, read, start_one


async def add_finished(database: Database, status: str, seconds_ago: float = 0, **values: Any) -> str:
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

    pruned = await prune(database, MemoryArtifacts(), {"completed": 200, "failed": 100, "cancelled": 10})

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

    assert await prune(database, LocalArtifacts(tmp_path / "audio"), {"completed": 10}) == {"completed": 1}
    assert precious.exists()


async def test_a_dry_run_counts_and_deletes_nothing(database: Database) -> None:
    artifacts = MemoryArtifacts()
    generation_id = await add_finished(database, "failed", 100)
    await artifacts.publish(generation_id, 1, "wav", b"music")

    assert await prune(database, artifacts, {"failed": 10}, dry_run=True) == {"failed": 1}
    assert (await count(database), len(artifacts.files)) == (1, 1)


async def test_more_than_a_chunk_is_pruned(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "CHUNK", 2)
    for _ in range(5):
        await add_finished(database, "failed", 100)

    assert await prune(database, MemoryArtifacts(), {"failed": 10}) == {"failed": 5}
    assert await count(database) == 0


async def test_a_file_that_cannot_be_deleted_keeps_its_row(database: Database, tmp_path: Path) -> None:
    generation_id = await add_finished(database, "completed", 100)
    (tmp_path / "audio" / f"{generation_id}-1.wav").mkdir(parents=True)

    with pytest.raises(ArtifactError):
        await prune(database, LocalArtifacts(tmp_path / "audio"), {"completed": 10})

    assert await count(database) == 1


async def test_audio_in_another_place_is_refused_and_its_row_kept(database, tmp_path):
    kept = await add_finished(database, "completed", 10, sha256="ab", file_path="/elsewhere/x.wav")
    with pytest.raises(ArtifactError, match="not in the output folder"):
        await prune(database, LocalArtifacts(tmp_path / "audio"), {"completed": 0.0})
    assert (await read(database, kept)).status == "completed"
