"""What happens when the system has no more to give: the disk of the database, the memory of the engine."""

import asyncio
import contextlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
from functools import partial

import pytest

from dgx_music.errors import EngineError
from tests.daemons import (
    Daemon,
    add_many,
    check_everything_is_true,
    is_finished,
    rows_of,
    until_all,
    url_of,
)
from tests.factories import ROOT, on
from tests.inference.factories import make_process
from tests.patience import PATIENCE

LARGEST_FILE = 65_536
"""Of a process whose disk is full: enough for SQLite's shared memory, and for a log of fifteen pages."""
ENQUEUE = """
import asyncio, json, sys
from dgx_music import enqueue_many
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import close_db, init_db

async def main():
    await init_db(sys.argv[1])
    try:
        rows = await enqueue_many([f"prompt {number}" for number in range(int(sys.argv[2]))], duration=0.1)
        print(json.dumps([row.id for row in rows]))
    except DatabaseUnavailableError as error:
        print(json.dumps(str(error)))
    await close_db()

asyncio.run(main())
"""

NO_ROOM = "There is no memory for the loudness meter; raise the limit (`ulimit -v`)."
full_disk = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def enqueue_elsewhere(url, count, **options):
    """Return the ids of rows that another process has enqueued, or what it was told."""
    command = [sys.executable, "-c", ENQUEUE, url, str(count)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, timeout=PATIENCE, check=True, **options
    )
    return json.loads(done.stdout)


def check_sound(database):
    with contextlib.closing(sqlite3.connect(database.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@on("sqlite")
async def test_where_the_disk_of_the_database_is_full_nothing_is_stored_and_the_next_try_is(
    database, sqlite_url
):
    told = await asyncio.to_thread(enqueue_elsewhere, sqlite_url, 500, preexec_fn=full_disk)
    assert told.startswith(f"The database {sqlite_url} cannot be used: ")
    assert not await rows_of(database)

    ids = await asyncio.to_thread(enqueue_elsewhere, sqlite_url, 500)
    assert sorted(await rows_of(database)) == sorted(ids)
    check_sound(database)


@pytest.fixture
def daemon(database, tmp_path):
    daemon = Daemon(tmp_path, slots=4)
    yield daemon
    daemon.close()


def limit_files(pid, size):
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@on("sqlite")
async def test_a_worker_outlives_a_full_disk_of_its_database_and_completes_what_it_has(
    database, tmp_path, daemon
):
    await daemon.says("serves")
    limit_files(daemon.pid, LARGEST_FILE // 2)
    await add_many(database, 20)
    await daemon.says("cannot claim")
    assert daemon.process.poll() is None

    limit_files(daemon.pid, resource.RLIM_INFINITY)
    await until_all(database, is_finished)
    await check_everything_is_true(database, tmp_path, 20)
    check_sound(database)


@on("sqlite")
async def test_a_worker_without_memory_for_the_loudness_meter_ends_in_a_sentence_and_spares_the_queue(
    database, tmp_path
):
    await add_many(database, 1)
    poor = subprocess.run(
        [
            sys.executable,
            str(ROOT / "worker.py"),
            "--engine",
            "tone",
            "--output",
            str(tmp_path / "audio"),
        ],
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (300_000 * 1024,) * 2),
        env=os.environ | {"DGX_MUSIC_DATABASE_URL": url_of(database)},
        capture_output=True,
        timeout=PATIENCE,
    )
    last = poor.stderr.decode().splitlines()[-1]
    assert (poor.returncode, last) == (7, f"Error: {NO_ROOM}")
    assert {row.attempt for row in (await rows_of(database)).values()} == {0}


async def test_an_engine_without_memory_is_told_in_a_sentence_and_starts_where_there_is_some(
    tmp_path, monkeypatch
):
    poor = tmp_path / "python"
    poor.write_text(
        f"#!{sys.executable}\nimport os, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (48 * 2**20,) * 2)\n"
        f"os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])\n"
    )
    poor.chmod(0o755)
    async with make_process() as process:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(poor))
            with pytest.raises(EngineError, match=r"^The engine.*\.$"):
                await process.start()
        assert (await process.start()).slots == 4
