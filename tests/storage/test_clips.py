"""The clips in the database: stored once, marked as used, pruned when they are not needed."""

import asyncio
from contextlib import AsyncExitStack

import anyio
import pytest
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError

from dgx_music.client.prune import prune_clips as prune_all_clips
from dgx_music.storage import delete_generation
from dgx_music.storage.clips import (
    UNUSED_SECONDS,
    keep_clips,
    prune_clips,
    read_clip_seconds,
    read_clips,
)
from dgx_music.storage.models import Clip
from dgx_music.storage.schema import now_plus
from tests.factories import POSTGRES, add_generation, on, read_all
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver

A, B, C = (letter * 64 for letter in "abc")


async def keep(database, *sha256s):
    async with database.session() as session:
        await keep_clips(session, {sha256: (sha256.encode(), 1.5) for sha256 in sha256s})


async def age(database, seconds, *sha256s):
    async with database.session() as session:
        old = (
            update(Clip)
            .where(Clip.sha256.in_(sha256s))
            .values(last_used_at=now_plus(-float(seconds)))
        )
        await session.execute(old)


async def there(database):
    return sorted(await read_all(database, select(Clip.sha256)))


async def last_used(database, sha256):
    return (await read_all(database, select(Clip.last_used_at).where(Clip.sha256 == sha256)))[0]


async def prune(database, **options):
    async with database.session() as session:
        return await prune_clips(session, **{"limit": 10} | options)


async def test_clips_are_read_as_they_were_kept(database):
    await keep(database, A, B)
    async with database.session(read_only=True) as session:
        assert await read_clips(session, [A, C]) == {A: A.encode()}
        assert await read_clip_seconds(session, {B: 1}.keys()) == {B: 1.5}


async def test_equal_clips_are_kept_once(database):
    await keep(database, A, B)
    await keep(database, B, C)

    assert await there(database) == [A, B, C]


@pytest.mark.parametrize(("seconds", "is_noted"), [(3_700, True), (3_500, False)])
async def test_a_use_is_noted_once_an_hour(database, seconds, is_noted):
    await keep(database, A)
    await age(database, seconds, A)
    before = await last_used(database, A)

    await keep(database, A)

    assert (await last_used(database, A) > before) is is_noted


async def test_a_clip_that_nobody_refers_to_goes_after_a_day(database):
    await keep(database, A, B)
    await age(database, UNUSED_SECONDS + 60, A)
    await age(database, UNUSED_SECONDS - 60, B)

    assert await prune_all_clips(database, dry_run=True) == 1
    assert await prune_all_clips(database) == 1
    assert await there(database) == [B]


@pytest.mark.parametrize("name", ["continuation_sha256", "melody_sha256"])
async def test_a_clip_that_a_generation_refers_to_stays_however_old(database, name):
    await keep(database, A)
    async with database.session() as session:
        generation = await add_generation(session, status="completed", **{name: A})
    await age(database, 1e6, A)

    assert await prune(database) == 0
    async with database.session() as session:
        await delete_generation(session, generation.id)
    assert await prune(database) == 1


async def test_more_than_a_chunk_is_pruned(database, monkeypatch):
    monkeypatch.setattr("dgx_music.client.prune.CHUNK", 2)
    await keep(database, *(f"{number:064}" for number in range(5)))
    async with database.session() as session:
        await session.execute(update(Clip).values(last_used_at=now_plus(-1e6)))

    assert await prune_all_clips(database) == 5


@pytest.mark.parametrize("name", ["continuation_sha256", "melody_sha256"])
async def test_no_generation_refers_to_a_clip_that_is_not_there(database, name):
    async with database.session() as session:
        with pytest.raises(IntegrityError):
            await add_generation(session, **{name: A})
        await session.rollback()


@on(*POSTGRES)
async def test_a_clip_that_is_in_use_again_is_not_pruned_and_nobody_waits(database):
    await keep(database, A)
    await age(database, 1e6, A)
    async with database.session() as producer:
        await keep_clips(producer, {A: (A.encode(), 1.5)})
        with anyio.fail_after(PATIENCE):
            assert await prune(database) == 0
        await add_generation(producer, continuation_sha256=A)

    assert await prune(database) == 0
    assert await there(database) == [A]


@on(*POSTGRES)
async def test_open_transactions_with_the_same_clips_neither_wait_nor_deadlock(database):
    await keep(database, A, B)
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(database.session()) for _ in range(2)]
        with anyio.fail_after(PATIENCE):
            for session, order in zip(sessions, ([A, B], [B, A]), strict=True):
                for sha256 in order:
                    await keep_clips(session, {sha256: (b"", 1.5)})
                    await add_generation(session, melody_sha256=sha256)


async def test_producers_that_bring_the_same_clips_at_once_all_succeed(database):
    await asyncio.gather(
        *[
            database.transact(lambda s: keep_clips(s, dict.fromkeys((B, A), (b"", 1.0))))
            for _ in range(8)
        ]
    )

    assert await there(database) == [A, B]


@on("sqlite")
async def test_who_refers_to_a_clip_is_looked_up_in_an_index(database):
    async with database.session(read_only=True) as session:
        plan = await session.execute(
            text("EXPLAIN QUERY PLAN SELECT 1 FROM generations WHERE melody_sha256 = 'a'")
        )

    assert "ix_generations_melody_sha256" in plan.one().detail
