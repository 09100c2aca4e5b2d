"""What must hold when things die: real daemons, real signals, the torch-free engine."""

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import anyio
import pytest

from dgx_music import cancel_generation
from dgx_music.storage import due
from tests.daemons import (
    Daemon,
    add,
    add_many,
    attempts_of,
    check_everything_is_true,
    is_finished,
    is_running,
    rows_of,
    until,
    until_registered,
)
from tests.factories import MODEL
from tests.patience import PATIENCE


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ON_POSTGRES = pytest.mark.parametrize("database_url", ["asyncpg"], indirect=True)
ON_ASYNCPG = pytest.mark.parametrize("database_url", ["sqlite", "asyncpg"], indirect=True)
ON_PSYCOPG = pytest.mark.parametrize("database_url", ["sqlite", "psycopg"], indirect=True)


async def check_everything_is_true_and_sound(database, folder, count):
    await check_everything_is_true(database, folder, count)
    if database.is_embedded:
        with contextlib.closing(sqlite3.connect(database.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def drain_under_fire(database, start, script, *, count, kill_every, seconds):
    """Drain with three daemons while one of them is killed, over and over, and replaced."""
    rng = random.Random(7)
    path = script({"do": "wait", "seconds": seconds})
    await add_many(database, count, max_attempts=25)
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


@ON_ASYNCPG
async def test_killed_workers_lose_nothing_and_finish_nothing_twice(
    database, tmp_path, start, script
):
    count = 80
    kills = await drain_under_fire(
        database, start, script, count=count, kill_every=1.5, seconds=0.2
    )
    assert kills >= 2
    await check_everything_is_true_and_sound(database, tmp_path, count)


@ON_ASYNCPG
@pytest.mark.soak
async def test_two_thousand_generations_survive_a_kill_every_second(
    database, tmp_path, start, script
):
    kills = await drain_under_fire(
        database, start, script, count=2_000, kill_every=1.0, seconds=0.05
    )
    assert kills >= 10
    await check_everything_is_true_and_sound(database, tmp_path, 2_000)


async def stall_outside_a_transaction(daemon, database):
    """Stop the process where it holds no lock: SQLite's write lock of a stopped process would stop all writers."""
    while True:
        daemon.send(signal.SIGSTOP)
        if not database.is_embedded:
            return
        connection = sqlite3.connect(database.path, timeout=0.1, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            daemon.send(signal.SIGCONT)
            await asyncio.sleep(0.05)
        finally:
            connection.close()


@ON_PSYCOPG
async def test_a_stalled_worker_cannot_change_what_another_finished(
    database, tmp_path, start, script
):
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
    assert (row.sha256, row.file_path, row.completed_at) == (
        done.sha256,
        done.file_path,
        done.completed_at,
    )
    assert not (tmp_path / "audio" / f"{generation.id}-1.wav").exists()


@ON_SQLITE
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


@ON_PSYCOPG
async def test_a_child_killed_from_outside_is_replaced_and_its_generation_retried(
    database, start, script
):
    path = script({"attempts": [1], "do": "wait", "seconds": 30})
    generation = await add(database)
    daemon = start(script=path, heartbeat_seconds=0.1)
    await until(database, generation, lambda row: row.progress > 0)  # the engine is at work on it
    [child] = daemon.children()
    os.kill(child, signal.SIGKILL)
    row = await until(database, generation, is_finished)
    # an attempt given back at no cost may lie between
    assert (row.status, row.failures) == ("completed", 1)
    assert row.attempt >= 2
    assert daemon.children() != [child]


@ON_ASYNCPG
async def test_sigterm_finishes_what_runs_and_ends_with_0(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 1.0}))
    await until(database, generation, is_running)
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0
    assert (await rows_of(database))[generation.id].status == "completed"


@ON_PSYCOPG
async def test_a_second_sigterm_releases_at_once_and_ends_with_0(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 600}))
    await until(database, generation, is_running)
    daemon.send(signal.SIGTERM)
    await daemon.says("1 running")
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0
    row = (await rows_of(database))[generation.id]
    assert (row.status, row.failures, row.attempt) == ("pending", 0, 1)


@ON_SQLITE
async def test_a_killed_worker_takes_its_engine_with_it(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 600}))
    await until(database, generation, is_running)
    [child] = daemon.children()
    daemon.send(signal.SIGKILL)
    daemon.wait()
    with anyio.fail_after(PATIENCE):
        while (
            Path(f"/proc/{child}").exists()
            and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]
        ):
            await asyncio.sleep(0.02)


@ON_PSYCOPG
async def test_a_cancelled_generation_frees_the_engine_for_the_next(database, start, script):
    generation, other = await add(database, "long"), await add(database, "next")
    start(script=script({"prompt": "long", "do": "wait", "seconds": 600}), slots=1)
    await until(database, generation, is_running)
    async with database.session() as session:
        await cancel_generation(generation.id, session=session)
    cancelled = await until(database, generation, is_finished)
    completed = await until(database, other, is_finished)
    assert (cancelled.status, completed.status) == ("cancelled", "completed")


@ON_ASYNCPG
async def test_a_drain_ends_by_itself_with_nothing_left(database, start):
    for number in range(20):
        await add(database, f"prompt {number}")
    assert start("--drain").wait() == 0
    async with database.session() as session:
        assert not await due.has_work(session, ["musicgen-small"])


async def until_nothing_is_left(database):
    with database.changes.subscribe() as changes:
        while await database.transact(
            lambda session: due.has_work(session, [MODEL]), read_only=True
        ):
            await changes.wait(0.2)
            await anyio.sleep(0.1)


async def drain_with_four(database, start, folder, *, count, seconds, script):
    """Let four daemons that have nothing to do share so many generations; return how many attempts each has made."""
    path = script({"do": "wait", "seconds": seconds})
    # so that no slow machine costs one
    daemons = [start(script=path, lease_seconds=30.0) for _ in range(4)]
    await until_registered(database, daemons)
    await add_many(database, count)
    await until_nothing_is_left(database)
    await check_everything_is_true_and_sound(database, folder, count)
    return Counter(attempt.worker_id for attempt in await attempts_of(database))


@ON_POSTGRES
async def test_four_workers_share_a_queue_and_each_claims_what_no_other_has(
    database, tmp_path, start, script
):
    made = await drain_with_four(database, start, tmp_path, count=300, seconds=0.02, script=script)
    assert sum(made.values()) == 300
    assert len(made) == 4  # how evenly depends on whom the machine runs


@ON_POSTGRES
@pytest.mark.soak
async def test_four_workers_share_five_thousand_generations(database, tmp_path, start, script):
    began = time.monotonic()
    made = await drain_with_four(
        database, start, tmp_path, count=5_000, seconds=0.02, script=script
    )
    print(f"5,000 generations: {time.monotonic() - began:.0f} s, {sorted(made.values())}")
    assert sum(made.values()) == 5_000
    assert min(made.values()) > 5_000 / 4 / 2


@ON_PSYCOPG
async def test_two_daemons_that_start_at_once_share_the_work(database, tmp_path, start, script):
    await add_many(database, 20)
    daemons = [
        start("--drain", slots=1, script=script({"do": "wait", "seconds": 0.3})) for _ in range(2)
    ]
    assert [daemon.wait() for daemon in daemons] == [0, 0]
    await check_everything_is_true_and_sound(database, tmp_path, 20)
    assert len({attempt.worker_id for attempt in await attempts_of(database)}) == 2


async def test_two_daemons_that_start_at_once_on_a_new_file_both_serve(tmp_path):
    daemons = [Daemon(tmp_path, "--drain") for _ in range(2)]
    assert [daemon.wait() for daemon in daemons] == [0, 0]
    for daemon in daemons:
        daemon.close()
