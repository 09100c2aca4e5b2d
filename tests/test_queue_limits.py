"""How many generations may wait: what is refused, what is not, and what that costs."""

import asyncio

import pytest
from sqlalchemy import event

from dgx_music import (
    QueueFullError,
    again_generation,
    cancel_generation,
    enqueue,
    enqueue_many,
    enqueue_sync,
    retry_generation,
)
from dgx_music.client.requests import plan, read_clips
from dgx_music.errors import ConfigurationError, IdempotencyConflictError
from dgx_music.storage import count_generations
from dgx_music.storage.room import _OF_TENANT, _WAITING, QueueLimits
from tests.factories import MODEL, POSTGRES, SQLITE, add_generation, claim_one, on
from tests.storage.plans import analyze, plan_of

pytestmark = pytest.mark.any_driver


@pytest.fixture
def limit(monkeypatch, default_database):
    """Sets how many may wait, in all and of each tenant."""

    def set_limit(most="", per_tenant=""):
        monkeypatch.setenv("DGX_MUSIC_MAX_PENDING", str(most))
        monkeypatch.setenv("DGX_MUSIC_MAX_PENDING_PER_TENANT", str(per_tenant))

    return set_limit


async def count_waiting(database):
    async with database.session(read_only=True) as session:
        return await count_generations(session, "pending")


async def test_the_last_place_is_given_and_then_no_more(limit):
    limit(2)
    await enqueue("a")
    await enqueue("b")

    with pytest.raises(QueueFullError) as caught:
        await enqueue("c")

    assert (caught.value.limit, caught.value.count, caught.value.tenant) == (2, 1, None)
    assert str(caught.value) == (
        "The queue has no room for one more generation: DGX_MUSIC_MAX_PENDING lets 2 wait; "
        "wait until some have begun."
    )


async def test_what_runs_or_has_finished_takes_no_room(limit, default_database):
    limit(1)
    first = await enqueue("a", model=MODEL)
    async with default_database.session() as session:
        await claim_one(session)
    second = await enqueue("b")
    await cancel_generation(second.id)

    assert (await enqueue("c")).id != first.id


@pytest.mark.parametrize(("count", "remedy"), [(2, "wait until"), (3, "send fewer at a time")])
async def test_many_are_stored_all_or_none(limit, default_database, count, remedy):
    limit(2)
    await enqueue("a")

    with pytest.raises(QueueFullError, match=f"{count} more generations: .*; {remedy}"):
        await enqueue_many(["b"] * count)
    with pytest.raises(QueueFullError):
        await enqueue("b", variations=count)

    assert await count_waiting(default_database) == 1


async def test_each_tenant_has_room_of_its_own_and_nobody_in_particular_has_no_limit(limit):
    limit(per_tenant=1)
    for model in ("musicgen-small", "musicgen-medium"):
        await enqueue("for nobody", model=model)
    await enqueue("a", tenant="a", model="musicgen-small")
    await enqueue("b", tenant="b")

    for model in ("musicgen-small", "musicgen-medium"):
        with pytest.raises(QueueFullError, match="The queue of tenant 'a' has no room") as caught:
            await enqueue("a", tenant="a", model=model)
        assert "DGX_MUSIC_MAX_PENDING_PER_TENANT lets 1 wait" in str(caught.value)
        assert caught.value.tenant == "a"


async def test_a_tenants_generations_of_all_models_count(limit):
    limit(per_tenant=2)
    await enqueue("a", tenant="a", model="musicgen-small")
    await enqueue("a", tenant="a", model="musicgen-medium")

    with pytest.raises(QueueFullError):
        await enqueue("a", tenant="a", model="musicgen-large")


async def test_a_repeat_of_a_stored_request_is_never_refused(limit):
    limit(1, 1)
    first = await enqueue("a", tenant="t", idempotency_key="k")

    again = await enqueue("a", tenant="t", idempotency_key="k")
    with pytest.raises(IdempotencyConflictError):
        await enqueue("b", tenant="t", idempotency_key="k")
    with pytest.raises(QueueFullError):
        await enqueue("a", tenant="t", idempotency_key="another")

    assert again.id == first.id


async def test_only_what_is_new_in_a_batch_needs_room(limit):
    limit(3)
    twice = [{"prompt": "a", "idempotency_key": "k"}, {"prompt": "b", "idempotency_key": "l"}]
    await enqueue_many(twice)

    rows = await enqueue_many([*twice, "c"])
    with pytest.raises(QueueFullError):
        await enqueue_many([*twice, "d"])

    assert [row.prompt for row in rows] == ["a", "b", "c"]


async def test_each_way_into_the_queue_is_limited_but_not_the_way_back(limit, default_database):
    row = await enqueue("a")
    await cancel_generation(row.id)
    await enqueue("b")
    limit(1)

    with pytest.raises(QueueFullError):
        await again_generation(row.id)
    with pytest.raises(QueueFullError):
        await asyncio.to_thread(enqueue_alone, default_database)
    await retry_generation(row.id)

    assert await count_waiting(default_database) == 2


def enqueue_alone(database):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGX_MUSIC_DATABASE_URL", database.url.render_as_string(hide_password=False))
        enqueue_sync("c")


async def test_in_the_callers_session_its_own_rows_count_and_a_refusal_undoes_nothing(
    limit, default_database
):
    limit(1)
    async with default_database.session() as session:
        await enqueue("a", session=session)
        with pytest.raises(QueueFullError):
            await enqueue("b", session=session)

    assert await count_waiting(default_database) == 1


async def test_of_calls_at_the_same_moment_those_that_fit_are_stored(limit, default_database):
    limit(5)

    done = await asyncio.gather(*[enqueue("a") for _ in range(16)], return_exceptions=True)

    assert [type(each) for each in done].count(QueueFullError) == 11
    assert await count_waiting(default_database) == 5


async def test_each_of_several_calls_at_the_same_moment_has_its_own_limits(default_database):
    limits = [QueueLimits(9), QueueLimits(1)]

    done = await asyncio.gather(
        *[default_database.insert(rows_of("a"), {}, each) for each in limits],
        return_exceptions=True,
    )

    assert [isinstance(each, QueueFullError) for each in done] == [False, True]


def rows_of(prompt):
    return read_clips([plan(prompt, {})]).rows


@on(POSTGRES[0])
async def test_transactions_that_do_not_see_each_other_pass_the_limit_by_all_rows_but_one(
    limit, default_database
):
    limit(1)
    async with default_database.session() as first, default_database.session() as second:
        await enqueue("a", session=first)
        await enqueue("b", session=second)

    assert await count_waiting(default_database) == 2


@on(SQLITE)
async def test_on_sqlite_a_second_transaction_waits_and_is_refused(limit, default_database):
    limit(1)
    async with default_database.session() as first:
        await enqueue("a", session=first)
        second = asyncio.create_task(enqueue("b"))
        await asyncio.sleep(0)

    with pytest.raises(QueueFullError):
        await second


@pytest.mark.parametrize("most", ["", "0"])
async def test_without_a_limit_nothing_is_counted(limit, default_database, most):
    limit(most, most)
    statements = []
    event.listen(
        default_database.engine.sync_engine,
        "before_cursor_execute",
        lambda *arguments: statements.append(arguments[2]),
    )
    async with default_database.session() as session:
        await enqueue("a", session=session)

    assert statements
    assert [each for each in statements if "count(" in each] == []


@pytest.mark.parametrize("value", ["-1", "1.5", "many"])
async def test_a_limit_that_is_no_number_is_refused(limit, value):
    limit(value)

    with pytest.raises(ConfigurationError, match=r"DGX_MUSIC_MAX_PENDING is .* use a whole number"):
        await enqueue("a")


@pytest.mark.parametrize(
    ("query", "values"), [(_WAITING, {}), (_OF_TENANT, {"tenant": "t3"})], ids=["all", "tenant"]
)
async def test_the_count_reads_an_index_of_what_waits(default_database, query, values):
    async with default_database.session() as session:
        for number in range(200):
            status = "completed" if number % 10 else "pending"
            await add_generation(session, status=status, tenant=f"t{number % 20}")
    await analyze(default_database)

    plan = await plan_of(
        default_database, lambda session: query.rows(session, {"most": 50, **values})
    )

    assert "ix_generations_" in plan
    assert "ix_generations_tenant_created_at" not in plan
