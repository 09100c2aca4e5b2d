"""Waking up when another connection commits."""

import asyncio
import sqlite3
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest

from dgx_music.storage.connection import sqlite_changes
from dgx_music.storage.connection.sqlite_changes import FileChanges
from tests.factories import Program
from tests.patience import PATIENCE

LONG = 600.0


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


@pytest.fixture
def path(database):
    return database.path


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "dgx-music-changes"]


def commit(path):
    """Commit on a connection of its own."""
    connection = sqlite3.connect(path, timeout=5)
    connection.execute("INSERT INTO prompts (text, text_hash) VALUES ('lofi', hex(randomblob(9)))")
    connection.commit()
    connection.close()


async def assert_thread_ends(thread):
    await asyncio.to_thread(thread.join, 5)
    assert not thread.is_alive()


@pytest.fixture(autouse=True)
def _no_thread_of_an_earlier_test():
    """The kernel takes its time to close a watch."""
    for thread in threads():
        thread.join(5)


async def quiet(subscription):
    """Take in the wake-up with which the watching begins."""
    with anyio.fail_after(PATIENCE):
        await subscription.wait(LONG)


async def test_a_commit_by_another_connection_wakes_a_subscriber(path):
    with FileChanges(path).subscribe() as subscription:
        await quiet(subscription)
        await asyncio.to_thread(commit, path)

        with anyio.fail_after(PATIENCE):
            await subscription.wait(LONG)


async def test_a_commit_by_another_process_wakes_a_subscriber(database_url, database):
    program = await Program.start("produce", database_url, "order-7", "lofi rain")
    with database.changes.subscribe() as subscription:
        await quiet(subscription)
        program.begin()

        with anyio.fail_after(PATIENCE):
            await subscription.wait(LONG)
    assert len(await program.rest()) == 1


async def test_a_change_before_the_wait_is_not_missed(path):
    with FileChanges(path).subscribe() as subscription:
        await quiet(subscription)
        subscription.wake()
        await asyncio.sleep(0)

        with anyio.fail_after(PATIENCE):
            await subscription.wait(LONG)


async def test_nobody_is_woken_without_a_change(path):
    with FileChanges(path).subscribe() as subscription:
        await quiet(subscription)
        woken = asyncio.create_task(subscription._changed.wait())
        await subscription.wait(0.05)

        assert not woken.done()
        woken.cancel()


async def test_many_subscribers_share_one_thread_that_ends_with_the_last(path):
    changes = FileChanges(path)
    with changes.subscribe() as first:
        with changes.subscribe() as second, changes.subscribe() as third:
            (thread,) = threads()
            await quiet(first)  # the others may have come too late for that
            await asyncio.to_thread(commit, path)
            for subscription in (first, second, third):
                await quiet(subscription)
        assert thread.is_alive()
        assert threads() == [thread]
    await assert_thread_ends(thread)


async def test_a_subscriber_after_the_last_starts_anew(path):
    changes = FileChanges(path)
    with changes.subscribe():
        (thread,) = threads()
    await assert_thread_ends(thread)
    with changes.subscribe() as subscription:
        await quiet(subscription)
        (again,) = threads()
    await assert_thread_ends(again)


async def test_an_error_in_the_block_ends_the_subscription(path):
    changes = FileChanges(path)
    subscribed = changes.subscribe()
    subscribed.__enter__()
    (thread,) = threads()
    assert not subscribed.__exit__(ValueError, ValueError("mine"), None)

    await assert_thread_ends(thread)


async def test_without_a_file_nobody_is_woken_and_no_thread_runs():
    with FileChanges(None).subscribe() as subscription:
        assert threads() == []
        with anyio.fail_after(PATIENCE):
            await subscription.wait(0.01)


async def test_a_file_that_is_not_there_yet_is_watched_once_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_changes, "_LOOK_AGAIN_SECONDS", 0.01)
    changes = FileChanges(tmp_path / "later.db")
    with changes.subscribe() as subscription:
        (thread,) = threads()
        await subscription.wait(0.05)
        sqlite3.connect(tmp_path / "later.db").close()
        await quiet(subscription)
    await assert_thread_ends(thread)


@pytest.mark.parametrize("name", ["50% off.db", "what?.db", "a#b.db", "naïve ♫.db"])
async def test_a_file_of_any_name_is_watched(tmp_path, name):
    connection = sqlite3.connect(tmp_path / name)
    with FileChanges(tmp_path / name).subscribe() as subscription:
        (thread,) = threads()
        await quiet(subscription)
    connection.close()
    await assert_thread_ends(thread)


async def test_a_subscriber_whose_event_loop_has_closed_is_forgotten(path):
    changes = FileChanges(path)
    left = await asyncio.to_thread(leave_open, changes)
    (thread,) = threads()
    with anyio.fail_after(PATIENCE):
        while changes._subscriptions:
            await asyncio.to_thread(commit, path)
    with changes.subscribe() as subscription:
        await quiet(subscription)
        await assert_thread_ends(thread)
        (again,) = threads()
    await assert_thread_ends(again)
    left.close()


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_a_folder_that_cannot_be_watched_leaves_no_descriptor_open(tmp_path):
    before = descriptors()
    with pytest.raises(OSError, match="inotify"):
        sqlite_changes._LogWatch(tmp_path / "missing" / "x.db")

    assert descriptors() == before


def leave_open(changes):
    """Subscribe on an event loop, close the loop, and leave the subscription open."""

    async def subscribe():
        left = generate(changes)
        next(left)
        return left

    with asyncio.Runner() as runner:
        return runner.run(subscribe())


def descriptors():
    return sorted(each.name for each in Path("/proc/self/fd").iterdir())


def generate(changes):
    with changes.subscribe():
        yield


def test_a_commit_that_a_slow_disk_holds_up_is_noticed(path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(sqlite_changes.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(
        sqlite_changes.time, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds)
    )
    # the first commit is visible, then the log has the next one, which is not yet
    written = iter([False, True])
    log = SimpleNamespace(look_seconds=2.0, drain=lambda: next(written, False))
    cursor = SimpleNamespace(
        execute=lambda _: SimpleNamespace(fetchone=lambda: (1 if clock.now < 0.5 else 2,))
    )
    never = SimpleNamespace(is_set=lambda: False)

    assert FileChanges(path)._look(cursor, 0, log, never) == 2
