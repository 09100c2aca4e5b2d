"""When a generation will be made, as far as its queue, the workers and their measured speeds tell."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import insert, select, update

from dgx_music.client.generations import estimate_generation
from dgx_music.errors import GenerationNotFoundError
from dgx_music.forecast import Measured, Range
from dgx_music.statuses import FINISHED
from dgx_music.storage.due import queue_position
from dgx_music.storage.estimates import estimate, record_speed
from dgx_music.storage.models import Generation, Speed, WorkerInfo
from dgx_music.storage.pauses import pause_model
from dgx_music.storage.schema import now_plus
from tests.factories import MODEL, add_generation, back_date, claim_one
from tests.storage.plans import analyze, plan_of

pytestmark = pytest.mark.any_driver

SPEED = Measured(low=1.0, typical=1.5, high=2.0, measured_count=50)
LARGE = "musicgen-large"
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


async def add_worker(session, worker_id="worker-1", *, silent_seconds=0.0, **overrides):
    values = {
        "host": "dgx",
        "pid": 1,
        "model_name": MODEL,
        "device": "cuda",
        "slots": 1,
        "lease_seconds": 30.0,
    }
    session.add(WorkerInfo(id=worker_id, **{"models": [MODEL]} | values | overrides))
    await session.flush()
    mine = update(WorkerInfo).where(WorkerInfo.id == worker_id)
    await session.execute(mine.values(heartbeat_at=now_plus(-float(silent_seconds))))


async def add_fleet(session, *, speed=SPEED, **overrides):
    """A worker that is alive, and what it has measured."""
    await add_worker(session, **overrides)
    await record_speed(session, MODEL, "cuda", *speed)


async def look(session, **overrides):
    """Add one more generation and return what is said of it."""
    return await estimate(session, (await add_generation(session, **overrides)).id)


def seconds(low, high):
    """A range of many minutes that is right to some seconds: the clock goes on."""
    return pytest.approx((low, high), abs=30)


def ends(moments):
    return (moments.low, moments.high)


# nothing to go by


async def test_without_a_worker_nobody_knows(database):
    async with database.session() as session:
        await record_speed(session, MODEL, "cuda", *SPEED)
        await add_worker(session, "dead", silent_seconds=31)
        await add_worker(session, "other", model_name=LARGE, models=[LARGE])
        told = await look(session)

    assert (told.position, told.starts_in, told.done_in) == (1, None, None)
    assert told.unknown_because == "no worker serves musicgen-small"


async def test_what_was_measured_elsewhere_is_no_evidence(database):
    async with database.session() as session:
        await add_worker(session)
        await record_speed(session, MODEL, "cpu", *SPEED)
        await record_speed(session, LARGE, "cuda", *SPEED)
        told = await look(session)

    assert (told.starts_in, told.unknown_because) == (
        None,
        "nothing was measured yet for musicgen-small on cuda",
    )


@pytest.mark.parametrize("count", [1, 4])
async def test_of_few_measurements_only_their_number_is_told(database, count):
    async with database.session() as session:
        await add_fleet(session, speed=(1.0, 1.5, 2.0, count))
        told = await look(session)

    why = f"{count} of the 5 measurements needed were made for musicgen-small on cuda"
    assert (told.starts_in, told.unknown_because) == (None, why)


async def test_a_few_measurements_take_the_place_of_few_only(database):
    async with database.session() as session:
        await add_worker(session)
        kept = []
        for count in (4, 1, 5, 4, 6):
            await record_speed(session, MODEL, "cuda", 1.0, 1.5, 2.0, count)
            kept.append(await session.scalar(select(Speed.measured_count)))

    assert kept == [4, 1, 5, 5, 6]


async def test_one_worker_of_unknown_speed_leaves_it_unknown(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_worker(session, "worker-2", device="cpu")
        told = await look(session)

    assert told.unknown_because == "nothing was measured yet for musicgen-small on cpu"


@pytest.mark.parametrize("paused", [MODEL, "*"])
async def test_a_paused_model_has_a_place_but_no_time(database, paused):
    async with database.session() as session:
        await add_fleet(session)
        await pause_model(session, paused)
        told = await look(session)

    assert (told.position, told.starts_in, told.unknown_because) == (
        1,
        None,
        "musicgen-small is paused",
    )


async def test_another_models_pause_changes_nothing(database):
    async with database.session() as session:
        await add_fleet(session)
        await pause_model(session, LARGE)

        assert (await look(session)).unknown_because is None


@pytest.mark.parametrize("status", FINISHED)
async def test_what_is_finished_has_neither_times_nor_a_reason(database, status):
    async with database.session() as session:
        told = await look(session, status=status)

    assert (told.status, told.starts_in, told.done_in, told.unknown_because) == (
        status,
        None,
        None,
        None,
    )


async def test_an_unknown_id_is_refused(database):
    async with database.session() as session:
        with pytest.raises(GenerationNotFoundError):
            await estimate(session, "unknown")


# waiting


async def test_a_free_slot_starts_it_now(database):
    async with database.session() as session:
        await add_fleet(session)
        told = await look(session, duration_seconds=10.0)

    assert (told.position, told.starts_in, told.done_in) == (1, Range(0.0, 0.0), Range(10.0, 20.0))


async def test_what_waits_before_it_is_made_first(database):
    async with database.session() as session:
        await add_fleet(session)
        for _ in range(3):
            await add_generation(session, duration_seconds=10.0)
        told = await look(session, duration_seconds=5.0)

    assert (told.position, told.starts_in, told.done_in) == (
        4,
        Range(30.0, 60.0),
        Range(35.0, 70.0),
    )


async def test_only_what_is_claimed_sooner_counts(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_generation(session, duration_seconds=10.0, model_name=LARGE)
        await add_generation(session, duration_seconds=10.0, status="completed")
        await add_generation(session, duration_seconds=10.0, priority=1)
        await add_generation(session, duration_seconds=10.0, priority=-1)
        told = await look(session)

    assert (told.position, told.starts_in) == (2, Range(10.0, 20.0))


async def test_waiting_counts_as_much_as_priority(database):
    async with database.session() as session:
        await add_fleet(session)
        patient, urgent = [
            await add_generation(session, duration_seconds=10.0, priority=each) for each in (0, 1)
        ]
        await back_date(session, patient.id, run_at=61)

        assert (await estimate(session, patient.id)).starts_in == Range(0.0, 0.0)
        assert (await estimate(session, urgent.id)).starts_in == Range(10.0, 20.0)


async def test_those_of_one_moment_go_by_their_ids(database):
    async with database.session() as session:
        await add_fleet(session)
        ids = [
            (await add_generation(session, id=name, run_at=NOON, duration_seconds=10.0)).id
            for name in "cab"
        ]
        told = {name: (await estimate(session, name)).starts_in for name in ids}

    assert told == {"a": Range(0.0, 0.0), "b": Range(10.0, 20.0), "c": Range(20.0, 40.0)}


async def test_slots_and_workers_share_the_queue(database):
    async with database.session() as session:
        await add_fleet(session, slots=3)
        await add_worker(session, "worker-2")
        for _ in range(8):
            await add_generation(session, duration_seconds=10.0)
        told = await look(session)

    assert told.starts_in == Range((80 - 3 * 10) / 4, 2 * 80 / 4)


async def test_devices_count_with_their_own_speeds(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_worker(session, "worker-2", device="cpu")
        await record_speed(session, MODEL, "cpu", 10.0, 15.0, 20.0, 50)
        told = await look(session, duration_seconds=10.0)

    assert (told.starts_in, told.done_in) == (Range(0.0, 0.0), Range(10.0, 200.0))


async def test_what_runs_is_finished_first_and_its_progress_is_as_old_as_the_heartbeat(database):
    async with database.session() as session:
        await add_fleet(session, silent_seconds=200, lease_seconds=600.0)
        await add_generation(session, duration_seconds=1000.0, worker_id="worker-1", progress=0.4)
        told = await look(session)

    assert ends(told.starts_in) == seconds(1 * 600 - 200, 2 * 600)


async def test_what_a_dead_worker_holds_is_in_nobodys_way(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_generation(session, worker_id="dead")
        await add_generation(session, status="processing")

        assert (await look(session)).starts_in == Range(0.0, 0.0)


async def test_what_only_waits_to_be_stored_holds_no_slot(database):
    async with database.session() as session:
        await add_fleet(session)
        for progress in (1.0, 0.5):
            await add_generation(
                session, duration_seconds=1000.0, worker_id="worker-1", progress=progress
            )
        told = await look(session)

    assert ends(told.starts_in) == seconds(500, 1000)


async def test_a_running_one_that_is_being_cancelled_may_end_at_once(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_generation(
            session, duration_seconds=10.0, worker_id="worker-1", cancel_requested=True
        )

        assert (await look(session)).starts_in == Range(0.0, 20.0)


async def test_the_place_is_the_one_that_the_queue_tells(database):
    async with database.session() as session:
        rows = [await add_generation(session, priority=number % 3) for number in range(6)]
        for row in rows[::2]:
            await back_date(session, row.id, run_at=-3600)
        places = [(await estimate(session, row.id)).position for row in rows]

        assert places == [await queue_position(session, row.id) for row in rows]


# several models


async def test_a_model_that_has_to_be_loaded_first_starts_nobody_knows_when(database):
    async with database.session() as session:
        await add_fleet(session, model_name=LARGE, models=[LARGE, MODEL])
        told = await look(session)

    assert (told.starts_in, told.unknown_because) == (
        None,
        "no worker has musicgen-small loaded now",
    )


async def test_a_worker_that_would_have_to_load_it_may_help_but_is_not_counted_on(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_worker(session, "worker-2", model_name=LARGE, models=[LARGE, MODEL])
        await add_generation(session, duration_seconds=10.0)

        assert (await look(session)).starts_in == Range(0.0, 20.0)


@pytest.mark.parametrize(("is_due", "latest"), [(True, 40.0), (False, 20.0)])
async def test_models_that_have_something_due_take_turns(database, is_due, latest):
    async with database.session() as session:
        await add_fleet(session, models=[MODEL, LARGE])
        rival = await add_generation(session, model_name=LARGE)
        await back_date(session, rival.id, run_at=1 if is_due else -3600)
        await add_generation(session, duration_seconds=10.0)

        assert (await look(session)).starts_in == Range(10.0, latest)


# scheduled for later


async def test_what_is_scheduled_starts_no_sooner(database):
    async with database.session() as session:
        await add_fleet(session)
        own = await add_generation(session, duration_seconds=1000.0)
        await back_date(session, own.id, run_at=-6000)
        told = await estimate(session, own.id)

    assert (ends(told.starts_in), ends(told.done_in)) == (seconds(6000, 6000), seconds(7000, 8000))


async def test_what_is_due_by_then_may_have_the_slots_when_its_time_comes(database):
    async with database.session() as session:
        await add_fleet(session)
        before, own = [
            await add_generation(session, duration_seconds=1000.0, priority=9 * each)
            for each in (0, 1)
        ]
        await back_date(session, before.id, run_at=-5999)
        await back_date(session, own.id, run_at=-6000)

        assert ends((await estimate(session, own.id)).starts_in) == seconds(6000, 8000)


async def test_what_goes_first_when_its_time_comes_is_made_first(database):
    async with database.session() as session:
        await add_fleet(session)
        before, own = [await add_generation(session, duration_seconds=9000.0) for _ in range(2)]
        await back_date(session, before.id, run_at=-5000)
        await back_date(session, own.id, run_at=-6000)

        assert ends((await estimate(session, own.id)).starts_in) == seconds(9000, 6000 + 18000)


async def test_what_becomes_due_and_goes_first_while_it_waits_counts_as_late_as_can_be(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_generation(session, duration_seconds=1000.0)
        own = await add_generation(session)
        # at worst it waits 2000 s, then 4000 s, then 6000 s
        for seconds_until in (1500, 3500, 8000):
            urgent = await add_generation(session, duration_seconds=1000.0, priority=1000)
            await back_date(session, urgent.id, run_at=-seconds_until)

        assert (await estimate(session, own.id)).starts_in == Range(1000.0, 6000.0)


async def test_a_long_row_of_those_that_go_first_ends_in_counting_all(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_generation(session, duration_seconds=1000.0)
        own = await add_generation(session)
        for number in range(1, 9):
            urgent = await add_generation(session, duration_seconds=1000.0, priority=1000)
            await back_date(session, urgent.id, run_at=-(2000 * number - 500))

        assert (await estimate(session, own.id)).starts_in == Range(1000.0, 18_000.0)


# running


async def test_what_runs_ends_as_its_progress_says(database):
    async with database.session() as session:
        await add_fleet(session)
        told = await look(session, duration_seconds=1000.0, worker_id="worker-1", progress=0.4)

    assert (told.position, told.starts_in, ends(told.done_in)) == (None, None, seconds(600, 1200))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"status": "processing"}, "it was taken by hand"),
        ({"worker_id": "dead"}, "its worker has fallen silent"),
        ({"worker_id": "worker-1", "cancel_requested": True}, "it is being cancelled"),
        (
            {"worker_id": "worker-1", "model_name": LARGE},
            "nothing was measured yet for musicgen-large on cuda",
        ),
    ],
)
async def test_what_runs_without_evidence_ends_nobody_knows_when(database, values, reason):
    async with database.session() as session:
        await add_fleet(session)
        told = await look(session, **values)

    assert (told.done_in, told.unknown_because) == (None, reason)


async def test_a_claimed_generation_has_an_end_instead_of_a_place(default_database):
    async with default_database.session() as session:
        await add_fleet(session)
        own = await add_generation(session, duration_seconds=1000.0)
        before = await estimate_generation(own.id, session=session)
        await claim_one(session)
    after = await estimate_generation(own.id)

    assert (before.position, before.starts_in, after.position, after.starts_in) == (
        1,
        Range(0.0, 0.0),
        None,
        None,
    )
    assert ends(after.done_in) == seconds(1000, 2000)


async def test_an_estimate_is_plain_json(database):
    async with database.session() as session:
        await add_fleet(session)
        told = await look(session, duration_seconds=10.0)

    assert told.to_dict() == {
        "status": "pending",
        "position": 1,
        "starts_in_seconds": {"low": 0.0, "high": 0.0},
        "done_in_seconds": {"low": 10.0, "high": 20.0},
        "unknown_because": None,
    }


# speeds


async def test_a_speed_replaces_the_former_of_its_model_and_device(database):
    async with database.session() as session:
        for model, device in [(MODEL, "cuda"), (MODEL, "cpu"), (LARGE, "cuda"), (MODEL, "cuda")]:
            await record_speed(session, model, device, *SPEED)
        await session.execute(update(Speed).values(measured_at=now_plus(-3600.0)))
        await record_speed(session, MODEL, "cuda", 3.0, 4.0, 5.0, 7)
    async with database.session(read_only=True) as session:
        speeds = {
            (each.model_name, each.device): each for each in await session.scalars(select(Speed))
        }

    newest = speeds.pop((MODEL, "cuda"))
    assert (newest.low, newest.typical, newest.high, newest.measured_count) == (3.0, 4.0, 5.0, 7)
    assert {each.low for each in speeds.values()} == {1.0}
    assert all(
        newest.measured_at - each.measured_at > timedelta(minutes=59) for each in speeds.values()
    )


async def test_a_queue_is_summed_up_along_an_index_however_much_is_finished(database):
    kept = {
        "prompt": "x",
        "model_name": MODEL,
        "duration_seconds": 8.0,
        "sample_rate": 32_000,
        "channels": 1,
    }
    async with database.session() as session:
        await add_fleet(session)
        await session.execute(
            insert(Generation), [kept | {"status": "failed", "completed_at": NOON}] * 5000
        )
        ids = [(await add_generation(session)).id for _ in range(20)]
    await analyze(database)

    assert "_claim" in await plan_of(database, lambda session: estimate(session, ids[-1]))


# workers that come and go


async def test_a_worker_that_loads_is_coming_and_nobody_knows_when(database):
    async with database.session() as session:
        await add_fleet(session, state="loading", device="")
        told = await look(session)

    assert (told.starts_in, told.unknown_because) == (
        None,
        "a worker is still loading musicgen-small",
    )


async def test_a_worker_that_has_ended_serves_nobody(database):
    async with database.session() as session:
        await add_fleet(session, state="ended", ended_at=NOON)
        told = await look(session)

    assert told.unknown_because == "no worker serves musicgen-small"


async def test_a_worker_that_loads_may_start_sooner_and_takes_nothing_from_the_others(database):
    async with database.session() as session:
        await add_fleet(session)
        await add_generation(session, duration_seconds=600.0, worker_id="worker-1")
        waiting = await add_generation(session)
        alone = await estimate(session, waiting.id)
        await add_worker(session, "worker-2", state="loading", device="")
        together = await estimate(session, waiting.id)

    assert ends(alone.starts_in) == seconds(600.0, 1200.0)
    assert together.starts_in.low == pytest.approx(0.0, abs=30)
    assert together.starts_in.high >= alone.starts_in.high - 30
