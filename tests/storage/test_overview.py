"""What an operator sees at one moment: workers, queues by model, what runs, waits and has finished."""

import json
import re

import pytest
from sqlalchemy import insert

from dgx_music import pause, queue_overview, resume
from dgx_music.catalog import UNTRAINED_NOTICE
from dgx_music.errors import InvalidRequestError
from dgx_music.storage import overview
from dgx_music.storage.models import Generation
from dgx_music.storage.overview import read_overview
from dgx_music.storage.pauses import pause_model
from dgx_music.storage.schema import new_id, now_plus
from tests.factories import MODEL, add_generation, back_date
from tests.storage.plans import analyze, plan_of
from tests.storage.test_estimates import add_fleet, add_worker, seconds

pytestmark = pytest.mark.any_driver

LARGE, UNTRAINED = "musicgen-large", "musicgen-tiny-untrained"
PLAIN = {
    "prompt": "lofi rain",
    "model_name": MODEL,
    "duration_seconds": 8.0,
    "sample_rate": 32_000,
    "channels": 1,
}


@pytest.fixture
async def session(database):
    async with database.session() as session:
        yield session


async def look(session, waiting_limit=20, finished_limit=10):
    return await read_overview(session, waiting_limit=waiting_limit, finished_limit=finished_limit)


async def add_finished(session, seconds_ago=0.0, status="completed", **values):
    row = await add_generation(session, status=status, **values)
    await back_date(session, row.id, completed_at=seconds_ago)
    return row


async def test_an_empty_database_has_nothing_to_show(session):
    found = await look(session)

    assert (found.workers, found.models, found.running, found.waiting, found.finished) == (
        *([],) * 5,
    )
    assert (found.is_paused, found.rates.completed_per_minute) == (False, 0)


async def test_the_living_workers_come_first_and_the_ended_ones_not_at_all(session):
    await add_worker(session, "silent", silent_seconds=60)
    await add_worker(session, "ended", state="ended", ended_at=now_plus(0), end_reason="done")
    await add_worker(session, "alive", slots=4, models=[MODEL, LARGE])
    await add_generation(session, worker_id="alive")

    alive, silent = (await look(session)).workers

    assert (alive.id, alive.is_alive, silent.id, silent.is_alive) == (
        *("alive", True),
        *("silent", False),
    )
    assert (alive.running_count, alive.slots, alive.models) == (1, 4, [LARGE, MODEL])


async def test_untrained_weights_are_said_of_the_worker_and_of_the_queue(session):
    await add_worker(session, model_name=UNTRAINED, models=[UNTRAINED])

    found = await look(session)

    assert [found.workers[0].notice, found.models[0].notice] == [UNTRAINED_NOTICE] * 2


async def test_a_model_counts_what_is_due_what_is_scheduled_and_what_runs(session):
    for _ in range(3):
        await add_generation(session)
    await add_generation(session, run_at=now_plus(3_600))
    await add_generation(session, worker_id="worker-1")

    (model,) = (await look(session)).models

    assert (model.waiting_count, model.scheduled_count, model.running_count) == (4, 1, 1)


async def test_the_models_are_those_asked_for_served_or_paused(session):
    await add_generation(session, model_name=LARGE)
    await add_worker(session, model_name=UNTRAINED, models=[UNTRAINED])
    await pause_model(session, MODEL)

    models = (await look(session)).models

    assert [(each.model_name, each.is_paused) for each in models] == [
        (LARGE, False),
        (MODEL, True),
        (UNTRAINED, False),
    ]


async def test_the_last_one_is_done_when_all_that_is_due_is(session):
    await add_fleet(session)
    for _ in range(10):
        await add_generation(session, duration_seconds=100.0)
    await add_generation(session, run_at=now_plus(1e6))

    (model,) = (await look(session)).models

    assert (model.done_in.low, model.done_in.high) == seconds(1_000, 2_000)


async def test_if_nothing_is_due_the_longest_one_that_runs_is_the_last(session):
    await add_fleet(session, slots=2)
    await add_generation(session, worker_id="worker-1", duration_seconds=300.0)
    await add_generation(session, worker_id="worker-1", duration_seconds=300.0, progress=0.9)
    await add_generation(
        session, worker_id="worker-1", duration_seconds=900.0, cancel_requested=True
    )

    (model,) = (await look(session)).models

    assert (model.done_in.low, model.done_in.high) == seconds(300, 600)


async def test_an_unknown_end_has_its_reason(session):
    await add_generation(session)

    (model,) = (await look(session)).models

    assert (model.done_in, model.unknown_because) == (None, f"no worker serves {MODEL}")


async def test_what_waits_is_in_the_order_of_claims_over_all_models(session):
    first = await add_generation(session, model_name=LARGE, priority=1)
    second, third = [await add_generation(session) for _ in range(2)]

    assert [entry.id for entry in (await look(session, waiting_limit=2)).waiting] == [
        first.id,
        second.id,
    ]
    assert (await look(session)).waiting[-1].id == third.id


async def test_the_last_finished_ones_are_the_newest_first(session):
    ids = [(await add_finished(session, seconds_ago=n)).id for n in range(3)]
    await add_finished(session, seconds_ago=9, status="cancelled")

    assert [entry.id for entry in (await look(session, finished_limit=3)).finished] == ids


async def test_rates_count_what_was_completed_within_five_minutes(session):
    for _ in range(5):
        await add_finished(session, seconds_ago=10, duration_seconds=30.0)
    await add_finished(session, seconds_ago=10, status="failed")
    await add_finished(session, seconds_ago=10, status="cancelled")
    await add_finished(session, seconds_ago=400)

    rates = (await look(session)).rates

    assert (rates.completed_count, rates.failed_count) == (5, 1)
    assert (rates.completed_per_minute, rates.audio_seconds_per_second) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("read", "indexes"),
    [
        (lambda session, _: overview._finished(session, 10), "completed_at"),
        (overview._rates, "completed_at|finished"),
        (overview._count_waiting, "due|status_created_at"),
    ],
)
async def test_no_part_of_it_scans_the_table(database, read, indexes):
    async with database.session() as session:
        ended = insert(Generation).values(status="completed", completed_at=now_plus(-86_400.0))
        await session.execute(ended, [{"id": new_id(), **PLAIN} for _ in range(3_000)])
        await add_generation(session)
    await analyze(database)
    async with database.session(read_only=True) as session:
        at = await overview.read_clock(session)

    plan = await plan_of(database, lambda session: read(session, at))

    assert re.search(
        rf"Index.* ix_generations_({indexes}) |INDEX ix_generations_({indexes}) ", plan
    )
    assert "Seq Scan" not in plan


async def test_the_public_coroutine_gives_plain_json(default_database):
    async with default_database.session() as session:
        await add_fleet(session)
        await add_generation(session)
    await pause()

    told = json.loads(json.dumps((await queue_overview()).to_dict()))

    assert told["is_paused"] is True
    assert told["models"][0]["done_in_seconds"] is None
    assert told["waiting"][0]["status"] == "pending"
    await resume()
    told = (await queue_overview()).to_dict()
    assert told["models"][0]["done_in_seconds"].keys() == {"low", "high"}


@pytest.mark.parametrize("limits", [{"waiting_limit": -1}, {"finished_limit": 10_001}])
async def test_a_limit_out_of_range_is_refused(limits):
    with pytest.raises(InvalidRequestError, match=next(iter(limits))):
        await queue_overview(**limits)
