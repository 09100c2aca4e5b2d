"""The whole line with the real MusicGen classes at toy size: enqueue, the real daemon, its child process, files, rows."""

import hashlib
from pathlib import Path

import pytest
import soundfile
from sqlalchemy import select

from dgx_music import cancel_generation, enqueue
from dgx_music.catalog import UNTRAINED_NOTICE
from dgx_music.storage.models import Generation
from tests.daemons import Daemon, is_finished, is_running, until
from tests.patience import PATIENCE

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

TINY = {
    "engine": "musicgen",
    "model": "musicgen-tiny-untrained",
    "slots": 1,
    "lease_seconds": 30,
    "heartbeat_seconds": 0.3,
}


@pytest.fixture
def folder(database):
    return database.path.parent


async def add(database, duration, **options):
    async with database.session() as session:
        return await enqueue(
            "trap beat 140 BPM", duration=duration, model=TINY["model"], session=session, **options
        )


async def rows_of(database):
    async with database.session(read_only=True) as session:
        return list(await session.scalars(select(Generation).order_by(Generation.id)))


async def test_musicgen_makes_playable_audio_of_the_requested_lengths_that_is_labelled_as_noise(
    database, folder
):
    for duration, channels in ((1.0, 1), (0.5, 2), (0.08, 1)):
        await add(database, duration, channels=channels, sample_rate=44_100, seed=7)
    daemon = Daemon(folder, "--drain", is_fresh=True, **TINY)
    assert daemon.wait(PATIENCE) == 0
    rows = await rows_of(database)
    files = [soundfile.info(row.file_path) for row in rows]
    assert [(file.frames, file.channels, file.samplerate) for file in files] == [
        (44_100, 1, 44_100),
        (22_050, 2, 44_100),
        (3_528, 1, 44_100),
    ]
    assert [hashlib.sha256(Path(row.file_path).read_bytes()).hexdigest() for row in rows] == [
        row.sha256 for row in rows
    ]
    assert all(
        row.get_metadata()["audio"]["is_untrained"] and row.model_version == "untrained"
        for row in rows
    )
    assert UNTRAINED_NOTICE in Path(daemon.log.name).read_text()
    daemon.close()


async def test_a_running_musicgen_generation_is_cancelled_and_the_next_one_made(database, folder):
    long, following = await add(database, 30.0), await add(database, 0.1)
    daemon = Daemon(folder, **TINY)
    await until(database, long, lambda row: is_running(row) and row.progress > 0, seconds=60)
    async with database.session() as session:
        await cancel_generation(long.id, session=session)
    ended = [(await until(database, row, is_finished)).status for row in (long, following)]
    daemon.close()
    assert ended == ["cancelled", "completed"]
