"""What must hold when things die: real daemons, real signals, the torch-free engine."""

import asyncio
import hashlib
import json
import os
import random
import signal
import sqlite3
from pathlib import Path

import anyio
import pytest
from sqlalchemy import select

from dgx_music import cancel_generation, enqueue, enqueue_many
from dgx_music.storage import queue
from dgx_music.storage.models import Attempt, Generation
from dgx_music.storage.workers import get_workers
from tests.daemons import Daemon


@pytest.fixture
def folder(database):
    return database.path.parent


@pytest.fixture
def start(database, folder):
    daemons = []

    def start_daemon(*options, **settings):
        daemons.append(Daemon(folder, *options, **settings))
        return daemons[-1]

    yield start_daemon
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def script(folder):
    """Return a function that sets what the tone engine does from the next generation on."""
    path = folder / "script.json"

    def write(*rules):
        path.with_suffix(".new").write_text(json.dumps(rules))
        path.with_suffix(".new").rename(path)
        return path

    return write


async def add(database, prompt="lofi rain", **options):
    async with database.session() as session:
        return await enqueue(prompt, session=session, **{"duration": 0.5, "model": "musicgen-small"} | options)


async def rows_of(database):
    async with database.session(read_only=True) as session:
        return {row.id: row for row in await session.scalars(select(Generation))}


async def until(database, generation, is_so, seconds=20):
    """Return the row once this holds of it."""
    with anyio.fail_after(seconds), database.changes.subscribe() as changes:
        while not is_so(row := (await rows_of(database))[generation.id]):
            await changes.wait(0.1)
        return row


async def until_registered(database, daemons):
    """Return once each of these has loaded its engine and said so."""
    with anyio.fail_after(20), database.changes.subscribe() as changes:
        while True:
            async with database.session(read_only=True) as session:
                if {daemon.pid for daemon in daemons} <= {row["pid"] for row in await get_workers(session)}:
                    return
            await changes.wait(0.1)


def is_running(row):
    return row.status == "processing"


def is_finished(row):
    return row.is_finished


async def check_everything_is_true(database, folder, count):
    """Every row completed once, by its last attempt; one file each, as the row says; history and database are sound."""
    rows = await rows_of(database)
    assert [row.status for row in rows.values()] == ["completed"] * count
    async with database.session(read_only=True) as session:
        attempts = list(await session.scalars(select(Attempt)))
    assert sorted(a.generation_id for a in attempts if a.outcome == "completed") == sorted(rows)
    assert all(rows[a.generation_id].attempt == a.attempt for a in attempts if a.outcome == "completed")
    assert {a.outcome for a in attempts} <= {"completed", "lost", "released", "failed"}
    assert len(attempts) == sum(row.attempt for row in rows.values())
    files = {str(file): file.read_bytes() for file in (folder / "audio").iterdir()}
    assert sorted(files) == sorted(row.file_path for row in rows.values())
    assert all(hashlib.sha256(files[row.file_path]).hexdigest() == row.sha256 for row in rows.values())
    with sqlite3.connect(database.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


async def drain_under_fire(database, folder, start, script, *, count, kill_every, seconds):
    """Drain with three daemons while one of them is killed, over and over, and replaced."""
    rng = random.Random(7)
    path = script({"do": "wait", "seconds": seconds})
    async with database.session() as session:
        prompts = [f"prompt {number}" for number in range(count)]
        await enqueue_many(prompts, duration=0.1, model="musicgen-small", max_attempts=25, session=session)
    daemons = [start(script=path) for _ in range(3)]
    kills = 0
    while not all(row.is_finished for row in (await rows_of(database)).values()):
        await asyncio.sleep(kill_every)
        victim = rng.randrange(3)
        daemons[victim].send(signal.SIGKILL)
        daemons[victim].wait()
        daemons[victim] = start(script=path)
        kills += 1
    await until_registered(database, daemons)
    for daemon in daemons:
        daemon.send(signal.SIGTERM)
    assert [daemon.wait() for daemon in daemons] == [0, 0, 0]
    return kills


@pytest.mark.timeout(120)
async def test_killed_workers_lose_nothing_and_finish_nothing_twice(database, folder, start, script):
    kills = await drain_under_fire(database, folder, start, script, count=150, kill_every=1.5, seconds=0.2)
    assert kills >= 2
    await check_everything_is_true(database, folder, 150)


@pytest.mark.soak
async def test_two_thousand_generations_survive_a_kill_every_second(database, folder, start, script):
    kills = await drain_under_fire(database, folder, start, script, count=2_000, kill_every=1.0, seconds=0.05)
    assert kills >= 10
    await check_everything_is_true(database, folder, 2_000)


async def stall_outside_a_transaction(daemon, database):
    """Stop the process where it holds no lock: SQLite's write lock of a stopped process would stop all writers."""
    while True:
        daemon.send(signal.SIGSTOP)
        connection = sqlite3.connect(database.path, timeout=0.1, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            daemon.send(signal.SIGCONT)
            await asyncio.sleep(0.05)
        finally:
            connection.close()


async def test_a_stalled_worker_cannot_change_what_another_finished(database, folder, start, script):
    path = script({"attempts": [1], "do": "wait", "seconds": 1.0})
    generation = await add(database)
    stalled = start(script=path)
    await until(database, generation, is_running)
    await stall_outside_a_transaction(stalled, database)
    other = start(script=path)
    done = await until(database, generation, is_finished)
    stalled.send(signal.SIGCONT)
    await add(database, "next")
    for daemon in (stalled, other):
        daemon.send(signal.SIGTERM)
    assert [stalled.wait(), other.wait()] == [0, 0]
    assert (done.status, done.attempt) == ("completed", 2)
    row = (await rows_of(database))[generation.id]
    assert (row.sha256, row.file_path, row.completed_at) == (done.sha256, done.file_path, done.completed_at)
    assert not (folder / "audio" / f"{generation.id}-1.wav").exists()


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"do": "raise", "message": "bad luck"}, "bad luck"),
        ({"do": "exit", "exit_code": 3}, "code 3"),
        ({"do": "kill"}, "SIGKILL"),
        ({"do": "reject", "message": "never"}, "never"),
        ({"do": "hang"}, "deadline"),
    ],
)
async def test_whatever_befalls_the_engine_the_worker_lives_and_the_next_succeeds(
    database, start, script, rule, reason
):
    path = script(rule | {"prompt": "victim", "seconds": 0.1})
    victim = await add(database, "victim", max_attempts=1)
    daemon = start(script=path, slots=1, deadline_floor_seconds=1.0, deadline_factor=0.0)
    failed = await until(database, victim, is_finished)
    after = await until(database, await add(database, "next"), is_finished)
    assert (failed.status, after.status) == ("failed", "completed")
    assert reason in failed.error_message
    assert "\n" not in failed.error_message
    assert daemon.process.poll() is None


async def test_a_child_killed_from_outside_is_replaced_and_its_generation_retried(database, start, script):
    path = script({"attempts": [1], "do": "wait", "seconds": 30})
    generation = await add(database)
    daemon = start(script=path)
    await until(database, generation, is_running)
    [child] = daemon.children()
    os.kill(child, signal.SIGKILL)
    row = await until(database, generation, is_finished)
    assert (row.status, row.attempt, row.failures) == ("completed", 2, 1)
    assert daemon.children() != [child]


async def test_sigterm_finishes_what_runs_and_ends_with_0(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 1.0}))
    await until(database, generation, is_running)
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0
    assert (await rows_of(database))[generation.id].status == "completed"


async def test_a_second_sigterm_releases_at_once_and_ends_with_0(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 60}))
    await until(database, generation, is_running)
    daemon.send(signal.SIGTERM)
    await daemon.says("1 running")
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0
    row = (await rows_of(database))[generation.id]
    assert (row.status, row.failures, row.attempt) == ("pending", 0, 1)


async def test_a_killed_worker_takes_its_engine_with_it(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 60}))
    await until(database, generation, is_running)
    [child] = daemon.children()
    daemon.send(signal.SIGKILL)
    daemon.wait()
    with anyio.fail_after(5):
        while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
            await asyncio.sleep(0.02)


async def test_a_cancelled_generation_frees_the_engine_for_the_next(database, start, script):
    generation, other = await add(database, "long"), await add(database, "next")
    start(script=script({"prompt": "long", "do": "wait", "seconds": 60}), slots=1)
    await until(database, generation, is_running)
    async with database.session() as session:
        await cancel_generation(generation.id, session=session)
    cancelled = await until(database, generation, is_finished)
    completed = await until(database, other, is_finished)
    assert (cancelled.status, completed.status) == ("cancelled", "completed")


async def test_a_drain_ends_by_itself_with_nothing_left(database, start):
    for number in range(20):
        await add(database, f"prompt {number}")
    assert start("--drain").wait() == 0
    async with database.session() as session:
        assert not await queue.has_work(session, "musicgen-small")
