"""Counts without counting, on every database: the tallies that triggers write always sum up to the truth."""

import asyncio
import random
from contextlib import suppress

import anyio
import pytest
from sqlalchemy import func, insert, select, text, update

from dgx_music import cancel_generation, enqueue, enqueue_many, retry_generation
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.config import load_settings
from dgx_music.errors import GenerationNotFoundError, IllegalTransitionError
from dgx_music.statuses import FINISHED, GenerationStatus
from dgx_music.storage import (
    complete_generation,
    count_generations,
    create_generation,
    delete_generation,
    get_database_stats,
    queue,
    retention,
    statistics,
    update_generation_status,
)
from dgx_music.storage.models import Generation, Prompt, Tally
from dgx_music.storage.schema import now_plus
from dgx_music.worker.worker import Worker
from tests.factories import (
    MODEL,
    POSTGRES,
    add_generation,
    claim_up_to,
    completion_of,
    on,
    read_all,
    rescue_lapsed,
)
from tests.fakes import FakeEngine
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver


async def assert_counts_are_true(database):
    async with database.session(read_only=True) as session:
        told = await get_database_stats(session)
        rows = await session.execute(
            select(Generation.status, func.count()).group_by(Generation.status)
        )
        counts = {str(status): 0 for status in GenerationStatus} | dict(rows.all())
        prompts = await session.scalar(select(func.count()).select_from(Prompt))
        assert {status: await count_generations(session, status) for status in counts} == counts
    true = {f"{status}_generations": count for status, count in counts.items()}
    assert told == {"total_generations": sum(counts.values()), **true, "total_prompts": prompts}


class Walker:
    """Does what may be done to generations, in any order, by chance."""

    def __init__(self, rng):
        self.rng = rng

    async def some(self, session, status):
        ids = list(
            await session.scalars(
                select(Generation.id).where(Generation.status == status).limit(20)
            )
        )
        return self.rng.choice(ids) if ids else None

    async def enqueue(self, session):
        await enqueue_many(
            [f"rain {self.rng.randrange(9)}" for _ in range(self.rng.randrange(1, 4))],
            session=session,
        )

    async def enqueue_twice_under_one_key(self, session):
        for _ in range(2):
            await enqueue("sun", session=session, idempotency_key=f"key {self.rng.randrange(20)}")

    async def add_finished(self, session):
        await add_generation(session, status=self.rng.choice(FINISHED))

    async def claim(self, session):
        await claim_up_to(session, self.rng.randrange(1, 4))

    async def end(self, session):
        query = (
            select(Generation.id, Generation.attempt)
            .where(Generation.worker_id.is_not(None))
            .limit(2)
        )
        for row in (await session.execute(query)).all():
            lease = queue.Lease(row.id, row.attempt)
            match self.rng.randrange(5):
                case 0:
                    await queue.complete(session, [completion_of(lease)])
                case 1:
                    await queue.fail(
                        session, lease, "no", retry_in_seconds=self.rng.choice([None, 0.0])
                    )
                case 2:
                    await queue.release(session, [lease])
                case 3:
                    is_ours = Generation.id == lease.generation_id
                    is_held = is_ours & Generation.worker_id.is_not(None)
                    await session.execute(
                        update(Generation).where(is_held).values(lease_expires_at=now_plus(-1.0))
                    )
                    await rescue_lapsed(session)
                case 4:
                    # another walker was quicker, and may have pruned it
                    with suppress(IllegalTransitionError, GenerationNotFoundError):
                        await queue.cancel(session, lease.generation_id)

    async def cancel(self, session):
        if generation_id := await self.some(session, "pending"):
            await cancel_generation(generation_id, session=session)

    async def retry(self, session):
        if generation_id := await self.some(session, self.rng.choice(["failed", "cancelled"])):
            await retry_generation(generation_id, session=session)

    async def by_hand(self, session):
        if generation_id := await self.some(session, "pending"):
            await update_generation_status(session, generation_id, "processing")
            await complete_generation(session, generation_id, 1.0, 1)

    async def by_object(self, session):
        if generation_id := await self.some(session, "pending"):
            row = await session.get(Generation, generation_id)
            row.mark_processing()
            await session.flush()
            row.mark_failed("no")

    async def delete(self, session):
        if generation_id := await self.some(session, self.rng.choice([*GenerationStatus])):
            await delete_generation(session, generation_id)

    async def prune(self, session):
        leases = await retention.find_prunable(
            session,
            status=self.rng.choice(FINISHED),
            older_than_seconds=0,
            limit=self.rng.randrange(5),
        )
        await retention.prune(session, leases)

    async def delete_prompt(self, session):
        if (prompt := await session.scalar(select(Prompt).limit(1))) is not None:
            await session.delete(prompt)

    async def compact(self, session):
        await statistics.compact_tallies(session)


STEPS = [name for name in vars(Walker) if not name.startswith("_") and name != "some"]


async def walk(database, rng, steps):
    """Take so many steps, each in a transaction of its own; one in five is rolled back."""
    walker = Walker(rng)
    taken = []
    for _ in range(steps):
        name = rng.choice(STEPS)
        async with database.session() as session:
            await getattr(walker, name)(session)
            if rng.random() < 0.2:
                await session.rollback()
        taken.append(name)
    return taken


@pytest.fixture
def few(monkeypatch):
    """Sum up as soon as there are a few rows."""
    monkeypatch.setattr(statistics, "_TALLY_ROWS", 5)
    monkeypatch.setattr(statistics, "TALLY_CHUNK", 7)


@pytest.mark.parametrize("seed", range(3))
async def test_the_counts_are_true_after_any_walk(database, few, seed):
    taken = await walk(database, random.Random(seed), 80)

    assert set(taken) == set(STEPS)
    await assert_counts_are_true(database)


async def test_the_counts_are_true_after_walkers_at_once_beside_one_who_sums_up(database, few):
    walks = [walk_alone(database, seed) for seed in range(3)]
    running = [asyncio.create_task(each) for each in walks]
    summed = 0
    while not all(task.done() for task in running):
        summed += await database.transact(statistics.compact_tallies)
    await asyncio.gather(*running)

    assert summed > 0
    await assert_counts_are_true(database)


async def walk_alone(database, seed):
    """Walk alone: to add, claim and end would make other walkers wait."""
    walker = Walker(random.Random(seed))
    for _ in range(12):
        for step in (walker.enqueue, walker.claim, walker.end, walker.add_finished, walker.prune):
            await database.transact(step)


async def tally_rows(database):
    return (await read_all(database, select(func.count()).select_from(Tally)))[0]


async def add_tallies(database, count):
    """Write the tallies of this many completed generations, without the generations."""
    async with database.session() as session:
        session.add_all([Tally(name="completed", delta=1) for _ in range(count)])


async def test_tallies_are_summed_up_where_they_are_many(database):
    before = await tally_rows(database)
    await add_tallies(database, 500 - before)

    assert await database.transact(statistics.compact_tallies) == 500
    assert await tally_rows(database) == 1 + (before > 0)
    async with database.session() as session:
        assert await count_generations(session, "completed") == 500 - before


@on(*POSTGRES)
async def test_two_who_sum_up_never_wait_for_each_other(database, few):
    await add_tallies(database, 20)
    with anyio.fail_after(PATIENCE):
        async with database.session() as first, database.session() as second:
            summed = [await statistics.compact_tallies(session) for session in (first, second)]

    assert summed == [7, 7]
    async with database.session() as session:
        assert await count_generations(session, "completed") == 20


async def test_a_worker_sums_up_all_that_has_gathered(database, few):
    await add_tallies(database, 40)
    await Worker(database, FakeEngine(), MemoryArtifacts(), load_settings())._sweeping.tidy()

    assert await tally_rows(database) < 5


async def test_tallies_are_left_alone_where_they_are_few(database):
    before = await tally_rows(database)
    await add_tallies(database, 499 - before)

    assert await database.transact(statistics.compact_tallies) == 0
    assert await tally_rows(database) == 499


async def test_who_counts_sees_one_moment(database):
    async with database.session() as session:
        await add_generation(session, status="completed")
    async with database.session(read_only=True) as reader:
        assert await count_generations(reader, "completed") == 1
        async with database.session() as session:
            await session.execute(text("DELETE FROM generations"))

        assert await count_generations(reader, "completed") == 1
    await assert_counts_are_true(database)


async def test_what_never_finished_leaves_no_tally(database):
    before = await tally_rows(database)
    async with database.session() as session:
        row = await create_generation(session, "lofi rain", MODEL, 8.0, 32_000, 1)
        (claimed,) = await claim_up_to(session, 1)
        await queue.renew(session, {claimed.lease: 0.5}, lease_seconds=30)
        await queue.release(session, [claimed.lease])
        await delete_generation(session, row.id)

    assert await tally_rows(database) == before + 1  # the prompt's


# raw SQL


@on(*POSTGRES)
@pytest.mark.parametrize(
    "statement", ["TRUNCATE generations CASCADE", "TRUNCATE prompts CASCADE", "TRUNCATE attempts"]
)
async def test_counts_stay_true_where_a_table_is_truncated(database, statement):
    async with database.session() as session:
        await create_generation(session, "lofi rain", MODEL, 8.0, 32_000, 1)
        for status in (*FINISHED, "completed"):
            await add_generation(session, status=status)
    async with database.session() as session:
        await session.execute(text(statement))

    await assert_counts_are_true(database)


@pytest.mark.parametrize("status", FINISHED)
async def test_counts_stay_true_where_a_finished_row_is_taken_up_again_by_raw_sql(database, status):
    async with database.session() as session:
        await add_generation(session, status=status)
    async with database.session() as session:
        await session.execute(
            text("UPDATE generations SET status = 'processing', completed_at = NULL")
        )

    await assert_counts_are_true(database)


@on(*POSTGRES)
@pytest.mark.parametrize("path", ["app", "''"])
async def test_raw_sql_is_counted_whatever_its_search_path(database, path):
    async with database.session() as session:
        await create_generation(session, "lofi rain", MODEL, 8.0, 32_000, 1)
        await add_generation(session, status="completed")
    async with database.session() as session:
        await session.execute(text(f"SET LOCAL search_path = {path}"))
        await session.execute(
            text("INSERT INTO public.prompts (text, text_hash) VALUES ('trap beat', 'a hash')")
        )
        await session.execute(
            text("UPDATE public.generations SET status = 'failed' WHERE status = 'completed'")
        )
        await session.execute(text("DELETE FROM public.generations WHERE status = 'pending'"))

    await assert_counts_are_true(database)


@on(*POSTGRES)
async def test_a_compaction_that_finds_all_tallies_in_anothers_hands_changes_nothing(database):
    async with database.session() as session:
        await session.execute(insert(Tally), [{"name": "failed", "delta": 1}] * 600)
    async with database.session() as other, database.session() as session:
        assert await statistics.compact_tallies(other) >= 600
        assert await statistics.compact_tallies(session) == 0
    async with database.session(read_only=True) as session:
        assert (await get_database_stats(session))["failed_generations"] == 600
