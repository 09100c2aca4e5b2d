"""The order of claims on every database: ageing, tenants, pauses, and a worker's share."""

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import chain

import pytest
from sqlalchemy import func, literal, select

from dgx_music import pause, resume
from dgx_music.storage import due, queue
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.database import Database
from dgx_music.storage.models import ALL_MODELS, Generation
from dgx_music.storage.pauses import get_pauses, pause_model, resume_model
from dgx_music.storage.schema import AGEING_SECONDS, UtcDateTime, now_plus
from tests.factories import MODEL, POSTGRES, add_generation, back_date, claim_up_to, on, read_all

pytestmark = pytest.mark.any_driver

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


async def add(session, **overrides):
    return (await add_generation(session, **overrides)).id


async def add_for(session, *tenants):
    """Add a row for each of these, the first one the longest due, and return their ids."""
    ids = []
    for number, tenant in enumerate(tenants):
        ids.append(await add(session, tenant=tenant, run_at=NOON + timedelta(seconds=number)))
    return ids


def ids_of(claims):
    return [claimed.lease.generation_id for claimed in claims]


# ageing


@pytest.mark.parametrize("days", [0, 1, 400])
async def test_claims_go_in_the_order_of_priority_and_age_however_late_they_are_made(
    database, monkeypatch, days
):
    rng, places = random.Random(days), {}
    async with database.session() as session:
        for _ in range(40):
            priority, seconds = rng.randrange(-1000, 1001), rng.randrange(0, 50_000)
            generation_id = await add(
                session, priority=priority, run_at=NOON + timedelta(seconds=seconds)
            )
            places[generation_id] = (seconds - priority * AGEING_SECONDS, generation_id)
        monkeypatch.setattr(
            due, "now", lambda: literal(NOON + timedelta(days=1 + days), UtcDateTime())
        )
        claimed = [await claim_up_to(session, 7) for _ in range(6)]

    assert ids_of(chain(*claimed)) == sorted(
        places, key=lambda generation_id: places[generation_id]
    )


@pytest.mark.parametrize(("seconds", "first"), [(-1, "late"), (1, "early")])
async def test_a_low_priority_goes_first_once_the_higher_one_came_later_than_their_difference(
    database, seconds, first
):
    difference = timedelta(seconds=3 * AGEING_SECONDS + seconds)
    async with database.session() as session:
        names = {
            await add(session, priority=-2, run_at=NOON): "early",
            await add(session, priority=1, run_at=NOON + difference): "late",
        }
        claims = await claim_up_to(session, 1)

    assert names[ids_of(claims)[0]] == first


# tenants


async def test_no_tenant_gets_more_than_its_limit_in_one_claim(database):
    async with database.session() as session:
        ids = await add_for(session, *"aaaabb")
        claims = await claim_up_to(session, 6, tenant_limit=2)

    assert ids_of(claims) == [ids[0], ids[1], ids[4], ids[5]]


async def test_what_any_worker_has_in_hand_counts(database):
    async with database.session() as session:
        ids = await add_for(session, *"aaab")
        await claim_up_to(session, 1, "worker-1", tenant_limit=2)
        claims = await claim_up_to(session, 9, "worker-2", tenant_limit=2)

        assert ids_of(claims) == [ids[1], ids[3]]
        assert await claim_up_to(session, 9, "worker-3", tenant_limit=2) == []


async def test_what_has_ended_or_was_given_back_no_longer_counts(database):
    async with database.session() as session:
        ids = await add_for(session, *"aaa")
        leases = [claimed.lease for claimed in await claim_up_to(session, 9, tenant_limit=2)]
        await queue.fail(session, leases[0], "no GPU", retry_in_seconds=None)

        assert ids_of(await claim_up_to(session, 9, tenant_limit=2)) == [ids[2]]


async def test_what_has_no_tenant_is_never_held_back(database):
    async with database.session() as session:
        ids = [await add(session) for _ in range(5)]

        assert ids_of(await claim_up_to(session, 9, tenant_limit=1)) == ids


async def test_without_a_limit_tenants_are_nobodys_business(database):
    async with database.session() as session:
        ids = await add_for(session, *"aaaab")

        assert ids_of(await claim_up_to(session, 4)) == ids[:4]


async def test_another_models_generations_of_the_tenant_count_too(database):
    async with database.session() as session:
        await add_generation(session, tenant="a", model_name="musicgen-large", worker_id="worker-9")
        await add_for(session, "a")

        assert await claim_up_to(session, 9, tenant_limit=1) == []
        assert len(await claim_up_to(session, 9, tenant_limit=2)) == 1


async def test_under_a_limit_a_tenants_generations_of_another_model_are_left_alone(database):
    async with database.session() as session:
        await add(session, tenant="a", model_name="musicgen-large", run_at=NOON - timedelta(days=1))
        ids = await add_for(session, "a")

        assert ids_of(await claim_up_to(session, 9, tenant_limit=2)) == ids


async def test_what_is_worked_on_by_hand_is_in_nobodys_hand(database):
    async with database.session() as session:
        await add(session, tenant="a", status="processing")
        ids = await add_for(session, "a")

        assert ids_of(await claim_up_to(session, 9, tenant_limit=1)) == ids


async def test_under_a_limit_the_order_among_tenants_is_still_that_of_age_and_priority(database):
    async with database.session() as session:
        ids = [
            await add(session, tenant=tenant, priority=priority, run_at=NOON)
            for tenant, priority in (("a", 0), ("b", 2), ("", 1), ("c", 3), ("c", 4))
        ]
        claims = await claim_up_to(session, 3, tenant_limit=1)

    assert ids_of(claims) == [ids[4], ids[1], ids[2]]


@pytest.mark.parametrize(
    "overrides", [{"run_at": now_plus(3600)}, {"model_name": "musicgen-large"}]
)
async def test_under_a_limit_only_what_is_due_of_the_model_is_claimed(database, overrides):
    async with database.session() as session:
        await add_generation(session, tenant="a", **overrides)

        assert await claim_up_to(session, 9, tenant_limit=1) == []


async def test_claimers_at_once_never_give_a_tenant_more_than_its_limit(database_url, database):
    async with database.session() as session:
        await add_for(session, *"abc" * 20)
    others = [Database(database_url, limits=Limits(pool_size=4)) for _ in range(3)]

    async def claim(number):
        work = lambda session: claim_up_to(session, 4, f"worker-{number}", tenant_limit=3)  # noqa: E731
        return await others[number % 3].transact(work)

    claims = await asyncio.gather(*[claim(number) for number in range(12)])
    for other in others:
        await other.dispose()

    query = select(Generation.tenant).where(Generation.status == "processing")
    assert Counter(await read_all(database, query)) == {"a": 3, "b": 3, "c": 3}
    assert sum(map(len, claims)) == 9


# pauses


@pytest.mark.parametrize("tenant_limit", [None, 2])
@pytest.mark.parametrize("paused", [MODEL, ALL_MODELS])
async def test_nothing_of_a_paused_model_is_claimed_until_it_is_resumed(
    database, paused, tenant_limit
):
    async with database.session() as session:
        await add_for(session, "a", "")
        await pause_model(session, paused)
        assert await claim_up_to(session, 9, tenant_limit=tenant_limit) == []
        await resume_model(session, paused)

        assert len(await claim_up_to(session, 9, tenant_limit=tenant_limit)) == 2


async def test_another_models_pause_is_not_ours(database):
    async with database.session() as session:
        await add_generation(session)
        await pause_model(session, "musicgen-large")

        assert len(await claim_up_to(session, 9)) == 1


async def test_what_is_paused_is_no_work_and_waits_for_nobody(database):
    async with database.session() as session:
        await add_generation(session, failures=1)
        assert await due.has_work(session, [MODEL])
        assert list(await due.find_waits(session, [MODEL])) == [MODEL]
        await pause_model(session, ALL_MODELS)

        assert not await due.has_work(session, [MODEL])
        assert await due.find_waits(session, [MODEL]) == {}


async def test_what_runs_goes_on_through_a_pause(database):
    async with database.session() as session:
        await add_generation(session)
        (claimed,) = await claim_up_to(session, 1)
        await pause_model(session, ALL_MODELS)

        assert await queue.renew(session, {claimed.lease: 0.5}, lease_seconds=30) == {
            claimed.lease: False
        }
        assert await due.has_work(session, [MODEL])


async def test_pausing_again_changes_nothing_and_resuming_says_whether_it_was_paused(database):
    async with database.session() as session:
        await pause_model(session, MODEL)
        (first,) = await get_pauses(session)
        await pause_model(session, MODEL)

        assert [pause.paused_at for pause in await get_pauses(session)] == [first.paused_at]
        assert [await resume_model(session, MODEL) for _ in range(2)] == [True, False]


@pytest.mark.usefixtures("default_database")
async def test_a_pause_of_everything_outlasts_the_resumption_of_one_model():
    await pause("musicgen-large")
    assert [each.model_name for each in await pause()] == ["musicgen-large", ALL_MODELS]
    assert [each.model_name for each in await resume("musicgen-large")] == [ALL_MODELS]
    await pause("musicgen-large")

    assert await resume() == []


# shares and waits


@pytest.mark.parametrize(
    ("waiting", "limit", "workers", "share"),
    [
        (0, 4, 3, 1),
        (1, 4, 3, 1),
        (4, 4, 3, 2),
        (5, 4, 1, 4),
        (12, 4, 3, 4),
        (100, 4, 3, 4),
        (3, 1, 3, 1),
        (7, 4, 2, 4),
    ],
)
async def test_the_last_few_are_spread_over_the_workers(database, waiting, limit, workers, share):
    async with database.session() as session:
        for _ in range(waiting):
            await add_generation(session)
        await add_generation(session, run_at=now_plus(3600))

        assert await due.fair_share(session, MODEL, limit, workers) == share


async def test_a_models_wait_is_that_of_the_one_that_is_longest_due(database):
    async with database.session() as session:
        for model, seconds in ((MODEL, 5), (MODEL, 60), ("musicgen-large", -3600)):
            await back_date(session, await add(session, model_name=model), run_at=seconds)
        await add_generation(session, worker_id="worker-1", model_name="musicgen-medium")
        waits = await due.find_waits(session, [MODEL, "musicgen-large", "musicgen-medium"])

    assert list(waits) == [MODEL]
    assert 59 < waits[MODEL] < 90


async def test_what_is_due_is_not_taken_for_overtaken(database):
    async with database.session() as session:
        await add(session)

        assert await due.find_overtaken(session, [MODEL]) == []


@on(*POSTGRES)
async def test_a_claim_under_a_limit_waits_for_its_turn_and_one_without_does_not(database):
    async with database.session() as session:
        await add_for(session, *"ab")
    async with database.session() as first:
        await claim_up_to(first, 1, tenant_limit=1)
        second = asyncio.create_task(
            database.transact(lambda session: claim_up_to(session, 1, tenant_limit=1))
        )
        async with database.session() as third:
            assert len(await claim_up_to(third, 1)) == 1
            await third.rollback()
        assert not second.done()

    assert len(await second) == 1
    assert (
        await read_all(database, select(func.count()).where(Generation.status == "processing"))
    ) == [2]
