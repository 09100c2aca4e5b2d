"""The counts of prompts, on every database; on PostgreSQL no count waits for another."""

import asyncio
from contextlib import AsyncExitStack

import anyio
import pytest
from sqlalchemy import select, update

from dgx_music import enqueue, enqueue_many
from dgx_music.storage import (
    create_generation,
    get_most_used_prompts,
    get_prompt_by_text,
    prompts,
    search_generations,
    track_prompt_usage,
)
from dgx_music.storage.models import Generation, Prompt
from dgx_music.storage.prompts import count_overlooked_prompts, count_prompt_uses
from tests.factories import MODEL, POSTGRES, on, read, read_all
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver


async def uses(database):
    async with database.session(read_only=True) as session:
        return dict((await session.execute(select(Prompt.text, Prompt.used_count))).all())


async def unlinked(database):
    """Return the prompts of the generations that are not linked to theirs."""
    return sorted(
        await read_all(database, select(Generation.prompt).where(Generation.prompt_id.is_(None)))
    )


async def test_repeated_texts_are_counted_as_often_as_they_come(database):
    async with database.session() as session:
        prompts = await count_prompt_uses(session, ["rain", "sun", "rain"])

    assert (
        {prompt.text: prompt.used_count for prompt in prompts}
        == {"rain": 2, "sun": 1}
        == await uses(database)
    )


async def test_counting_nothing_counts_nothing(database):
    async with database.session() as session:
        assert await count_prompt_uses(session, []) == []


async def test_a_use_is_taken_back_and_with_the_last_one_the_prompt(database):
    async with database.session() as session:
        await count_prompt_uses(session, ["rain", "rain", "sun", "sun", "wind"])
        await prompts.uncount_prompt_uses(session, ["rain", "sun", "sun"])

    assert await uses(database) == {"rain": 1, "wind": 1}


async def test_a_prompt_of_a_generation_stays_whatever_is_taken_back(database):
    async with database.session() as session:
        await create_generation(session, "rain", MODEL, 8.0, 32_000, 1)
        await prompts.uncount_prompt_uses(session, ["rain"])

    assert await uses(database) == {"rain": 1}


async def test_who_tracks_a_prompt_beside_others_misses_no_count(database):
    async def track(session):
        await track_prompt_usage(session, "rain")

    await asyncio.gather(*[database.transact(track) for _ in range(20)])

    assert await uses(database) == {"rain": 20}


async def test_there_is_nothing_overlooked_where_nobody_was_in_the_way(default_database):
    await enqueue_many(["rain", "sun", "rain"])

    assert await default_database.transact(count_overlooked_prompts) == 0
    assert await unlinked(default_database) == []


PROMPTS = [f"prompt {number}" for number in range(40)]


@on(*POSTGRES)
@pytest.mark.parametrize("order", [1, -1])
async def test_open_transactions_with_the_same_prompts_neither_wait_nor_deadlock(database, order):
    async with AsyncExitStack() as stack:
        with anyio.fail_after(PATIENCE):
            sessions = [await stack.enter_async_context(database.session()) for _ in range(3)]
            for start in (0, 20):
                for number, session in enumerate(sessions):
                    part = PROMPTS[start : start + 20][:: order if number % 2 else 1]
                    await enqueue_many(part, session=session, model=MODEL)

    assert len(await read_all(database, select(Generation.id))) == 120
    assert set(await uses(database)) == set(PROMPTS)


@on(*POSTGRES)
async def test_what_was_overlooked_is_counted_later_and_exactly_once(database):
    async with database.session() as first, database.session() as second:
        await enqueue_many(["rain", "sun"], session=first)
        await enqueue_many(["rain", "rain", "wind"], session=second)
    assert await uses(database) == {"rain": 1, "sun": 1, "wind": 1}
    assert await unlinked(database) == ["rain", "rain"]

    assert [await database.transact(count_overlooked_prompts) for _ in range(2)] == [2, 0]
    assert await uses(database) == {"rain": 3, "sun": 1, "wind": 1}
    assert await unlinked(database) == []


@on(*POSTGRES)
async def test_of_two_who_count_what_was_overlooked_one_counts_it(database, monkeypatch):
    async with database.session() as session:
        await enqueue_many(PROMPTS, session=session)
        await session.execute(update(Generation).values(prompt_id=None))
    has_looked, may_count = asyncio.Event(), asyncio.Event()

    async def count_late(session, texts):
        monkeypatch.undo()
        has_looked.set()
        await may_count.wait()
        return await count_prompt_uses(session, texts)

    monkeypatch.setattr(prompts, "count_prompt_uses", count_late)
    late = asyncio.create_task(database.transact(count_overlooked_prompts))
    await has_looked.wait()
    quick = await database.transact(count_overlooked_prompts)
    may_count.set()

    assert sorted([quick, await late]) == [0, 40]
    assert set((await uses(database)).values()) == {2}


@on(*POSTGRES)
async def test_what_cannot_be_counted_yet_is_left_for_the_next_time(database):
    async with database.session() as session:
        await enqueue("rain", session=session)
        await session.execute(update(Generation).values(prompt_id=None))
    async with database.session() as counting:
        await count_prompt_uses(counting, ["rain"])
        with anyio.fail_after(PATIENCE):
            assert await database.transact(count_overlooked_prompts) == 0

    assert await database.transact(count_overlooked_prompts) == 1
    assert await uses(database) == {"rain": 3}


@on(*POSTGRES)
async def test_a_row_whose_prompt_was_overlooked_is_otherwise_like_any_other(database):
    async with database.session() as first, database.session() as second:
        await enqueue("rain", session=first)
        overlooked = await enqueue("rain", session=second, idempotency_key="order-7")
    async with database.session() as session:
        again = await enqueue("rain", session=session, idempotency_key="order-7")

    assert again.id == overlooked.id
    assert (await read(database, overlooked.id)).prompt == "rain"
    assert await uses(database) == {"rain": 1}


# unconditional music


async def test_the_empty_prompt_is_counted_as_any_other(default_database):
    await enqueue_many(["", "rain", ""])
    async with default_database.session() as session:
        await create_generation(session, "", MODEL, 8.0, 32_000, 1)

    async with default_database.session(read_only=True) as session:
        assert [prompt.text for prompt in await get_most_used_prompts(session)] == ["", "rain"]
        assert (await get_prompt_by_text(session, "")).used_count == 3
        assert await get_prompt_by_text(session, " ") is None
        assert [hit.generation.prompt for hit in await search_generations(session, "rain")] == [
            "rain"
        ]
