"""The guarded transitions, on every database: what each may move, the fence, and what the attempts tell."""

import asyncio
import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import chain, product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, literal, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from dgx_music.errors import GenerationNotFoundError, IllegalTransitionError
from dgx_music.statuses import GenerationStatus
from dgx_music.storage import claims, due, queue, retention, update_generation_status
from dgx_music.storage.models import Attempt, Generation, Prompt, WorkerInfo
from dgx_music.storage.queue import Lease, backoff_seconds
from dgx_music.storage.repository import get_attempts
from dgx_music.storage.schema import UtcDateTime, now, now_plus, with_json_key
from tests.factories import (
    MODEL,
    Program,
    add_generation,
    back_date,
    claim_one,
    claim_up_to,
    completion_of,
    read,
    read_all,
    rescue_lapsed,
    start_one,
)

STATUSES = ["pending", "processing", "completed", "failed", "cancelled"]
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def stopped_clock(monkeypatch):
    """Stop the database's clock at noon, as far as the transitions see it."""

    def at(seconds=0.0):
        return literal(NOON + timedelta(seconds=float(seconds)), UtcDateTime())

    for module in ("by_hand", "claims", "due", "lease_end", "rescue"):
        monkeypatch.setattr(f"dgx_music.storage.{module}.now", at)
    for module in ("claims", "lease_end", "leases", "retention"):
        monkeypatch.setattr(f"dgx_music.storage.{module}.now_plus", at)
    claims._claim_statement.cache_clear()
    yield
    claims._claim_statement.cache_clear()


async def attempts_of(database, generation_id):
    async with database.session(read_only=True) as session:
        return await get_attempts(session, generation_id)


async def expire(session, lease):
    await back_date(session, lease.generation_id, lease_expires_at=1)


# every transition, from every status


async def claim(session, lease):
    await claim_up_to(session, 1)


async def renew(session, lease):
    await queue.renew(session, {lease: 0.5}, lease_seconds=30)


async def complete(session, lease):
    await queue.complete(session, [completion_of(lease)])


async def fail(session, lease):
    await queue.fail(session, lease, "no GPU", retry_in_seconds=0)


async def fail_for_good(session, lease):
    await queue.fail(session, lease, "no GPU", retry_in_seconds=None)


async def release(session, lease):
    await queue.release(session, [lease])


async def rescue(session, lease):
    await rescue_lapsed(session)


async def cancel(session, lease):
    await queue.cancel(session, lease.generation_id)


async def retry(session, lease):
    await queue.retry(session, lease.generation_id)


async def prune(session, lease):
    await retention.prune(session, [lease])


MOVES = {
    claim: {"pending": "processing"},
    renew: {},
    complete: {"processing": "completed"},
    fail: {"processing": "pending"},
    fail_for_good: {"processing": "failed"},
    release: {"processing": "pending"},
    rescue: {"processing": "pending"},
    cancel: {"pending": "cancelled"},
    retry: {"failed": "pending", "cancelled": "pending"},
    prune: {"completed": None, "failed": None, "cancelled": None},
}
REFUSED = {cancel: {"completed", "failed"}, retry: {"pending", "processing", "completed"}}


async def add_in(session, status):
    """Add a row in this status, on its first attempt; a processing one is held by a worker, its lease expired."""
    if status != "processing":
        return await add_generation(session, status=status, attempt=1)
    row = await add_generation(session, worker_id="worker-1")
    await back_date(session, row.id, lease_expires_at=1)
    return row


@pytest.mark.parametrize(("move", "status"), [*product(MOVES, STATUSES)])
async def test_each_transition_moves_only_the_rows_it_may(database, move, status):
    async with database.session() as session:
        row = await add_in(session, status)
        try:
            await move(session, Lease(row.id, 1))
        except IllegalTransitionError:
            assert status in REFUSED[move]
        await session.commit()
        found = await session.scalar(select(Generation.status).where(Generation.id == row.id))

    assert found == MOVES[move].get(status, status)


@pytest.mark.parametrize(
    ("move", "status"), [(move, status) for move in REFUSED for status in sorted(REFUSED[move])]
)
async def test_a_refusal_names_both_states(database, move, status):
    async with database.session() as session:
        row = await add_in(session, status)
        with pytest.raises(IllegalTransitionError) as caught:
            await move(session, Lease(row.id, 1))

    assert caught.value.current is GenerationStatus(status)
    assert (
        caught.value.wanted
        is {cancel: GenerationStatus.CANCELLED, retry: GenerationStatus.PENDING}[move]
    )


@pytest.mark.parametrize("move", [cancel, retry])
async def test_a_change_of_an_unknown_generation_says_so(database, move):
    async with database.session() as session:
        with pytest.raises(GenerationNotFoundError, match="There is no generation 'unknown'"):
            await move(session, Lease("unknown", 1))


@pytest.mark.parametrize("move", [renew, complete, fail, fail_for_good, release, rescue])
async def test_a_row_worked_on_by_hand_is_no_workers_to_move(database, move):
    async with database.session() as session:
        row = await add_generation(session, status="processing", attempt=1)
        await back_date(session, row.id, started_at=86_400)
        before = await session.get(Generation, row.id, populate_existing=True)
        before = before.to_dict()
        if move is not complete:
            await move(session, Lease(row.id, 1))

    assert (await read(database, row.id)).to_dict() == before


# claim


async def test_a_claim_takes_the_row_for_this_worker(database):
    async with database.session() as session:
        row = await add_generation(session, sampling={"seed": 7}, progress=0.4, failures=1)
        (claimed,) = await claim_up_to(session, 1, "worker-7", lease_seconds=60)

    taken = await read(database, row.id)
    assert (claimed.lease, claimed.prompt, claimed.sampling, claimed.failures) == (
        Lease(row.id, 1),
        "lofi rain",
        {"seed": 7},
        1,
    )
    assert (taken.status, taken.attempt, taken.worker_id, taken.progress) == (
        "processing",
        1,
        "worker-7",
        0.0,
    )
    assert timedelta(seconds=59) < taken.lease_expires_at - taken.started_at < timedelta(seconds=61)


async def test_a_claim_tells_all_that_an_engine_needs(database):
    async with database.session() as session:
        await add_generation(session, duration_seconds=16, sample_rate=44_100, channels=2)
        (claimed,) = await claim_up_to(session, 1)

    assert (claimed.model_name, claimed.duration_seconds) == (MODEL, 16.0)
    assert (claimed.sample_rate, claimed.channels, claimed.sampling) == (44_100, 2, {})
    assert type(claimed.duration_seconds) is float


async def add_due(session, minutes, **overrides):
    """Add a row that became due so many minutes after noon, and return its id."""
    return (await add_generation(session, run_at=NOON + timedelta(minutes=minutes), **overrides)).id


async def test_of_rows_due_at_the_same_time_the_more_urgent_and_then_the_older_goes_first(database):
    async with database.session() as session:
        low, *plain, urgent = [
            await add_due(session, 0, priority=priority) for priority in (-1, 0, 0, 1)
        ]
        claims = await claim_up_to(session, 10)

    assert [claimed.lease.generation_id for claimed in claims] == [urgent, *plain, low]


@pytest.mark.parametrize("tenant_limit", [None, 9])
async def test_of_rows_alike_the_older_is_claimed_first(database, tenant_limit):
    async with database.session() as session:
        ids = [await add_due(session, 0) for _ in range(4)]
        claims = [await claim_up_to(session, 1, tenant_limit=tenant_limit) for _ in ids]

    assert [claimed.lease.generation_id for (claimed,) in claims] == ids


@pytest.mark.parametrize(("minutes", "goes_first"), [(2.99, "urgent"), (3.01, "waiting")])
async def test_a_point_of_priority_is_worth_a_minute_of_waiting(database, minutes, goes_first):
    async with database.session() as session:
        ids = {
            await add_due(session, 0): "waiting",
            await add_due(session, minutes, priority=3): "urgent",
        }
        (claimed,) = await claim_up_to(session, 1)

    assert ids[claimed.lease.generation_id] == goes_first


@pytest.mark.parametrize("limit", [1, 3, 5, 9])
async def test_a_claim_takes_no_more_than_its_limit(database, limit):
    async with database.session() as session:
        ids = [(await add_generation(session)).id for _ in range(5)]
        claims = await claim_up_to(session, limit)

    assert [claimed.lease.generation_id for claimed in claims] == ids[:limit]


async def test_a_claim_takes_only_the_model_that_is_served(database):
    async with database.session() as session:
        await add_generation(session, model_name="musicgen-large")
        assert await claim_up_to(session, 10) == []
        assert len(await claim_up_to(session, 10, model_name="musicgen-large")) == 1


@pytest.mark.parametrize(("milliseconds", "count"), [(-1, 1), (0, 1), (1, 0)])
async def test_a_row_is_due_at_its_run_at_and_not_before(
    database, stopped_clock, milliseconds, count
):
    async with database.session() as session:
        await add_generation(session, run_at=NOON + timedelta(milliseconds=milliseconds))

        assert len(await claim_up_to(session, 10)) == count


async def test_an_empty_queue_gives_no_claims(database):
    async with database.session() as session:
        assert await claim_up_to(session, 10) == []


async def test_each_claim_starts_an_attempt(database):
    lease = await start_one(database)

    (attempt,) = await attempts_of(database, lease.generation_id)
    assert (attempt.attempt, attempt.worker_id, attempt.outcome, attempt.finished_at) == (
        1,
        "worker-1",
        None,
        None,
    )
    assert abs(attempt.started_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_processes_that_race_claim_every_row_exactly_once(database_url, database):
    async with database.session() as session:
        ids = [(await add_generation(session, prompt=f"rain {number}")).id for number in range(500)]
    programs = [
        await Program.start("claim", database_url, f"worker-{number}") for number in range(4)
    ]
    for program in programs:
        program.begin()
    claimed = await asyncio.gather(*[program.rest() for program in programs])

    assert sorted(chain.from_iterable(claimed)) == sorted(ids)
    assert Counter(await read_all(database, select(Attempt.attempt))) == {1: 500}


# renew


async def test_a_renewal_extends_the_lease_and_stores_progress(database, stopped_clock):
    lease = await start_one(database, run_at=NOON)

    async with database.session() as session:
        assert await queue.renew(session, {lease: 0.5}, lease_seconds=60) == {lease: False}

    row = await read(database, lease.generation_id)
    assert (row.progress, row.lease_expires_at) == (0.5, NOON + timedelta(seconds=60))


async def test_many_leases_are_renewed_each_with_its_own_progress(database):
    async with database.session() as session:
        for _ in range(3):
            await add_generation(session)
        leases = [claimed.lease for claimed in await claim_up_to(session, 3)]
        await queue.renew(
            session, {lease: n / 4 for n, lease in enumerate(leases)}, lease_seconds=60
        )

    assert [(await read(database, lease.generation_id)).progress for lease in leases] == [
        0.0,
        0.25,
        0.5,
    ]


async def test_a_renewal_brings_the_request_to_cancel(database):
    lease = await start_one(database)

    async with database.session() as session:
        assert await queue.cancel(session, lease.generation_id) == "processing"
        assert await queue.renew(session, {lease: 0.5}, lease_seconds=60) == {lease: True}
        assert await queue.find_cancel_requests(session, "worker-1") == [lease]
        assert await queue.find_cancel_requests(session, "worker-2") == []


async def test_an_expired_lease_that_nobody_rescued_is_revived(database):
    lease = await start_one(database)

    async with database.session() as session:
        await expire(session, lease)
        assert await queue.renew(session, {lease: 0.5}, lease_seconds=60) == {lease: False}
        assert await rescue_lapsed(session) == []


async def test_renewing_nothing_says_nothing(database):
    async with database.session() as session:
        assert await queue.renew(session, {}, lease_seconds=60) == {}


# complete


async def test_completion_keeps_tempo_and_key_in_columns_too(database):
    lease = await start_one(database)
    audio = {"bpm": 138.2, "bpm_confidence": 0.8, "key": "F#m", "key_confidence": None}

    async with database.session() as session:
        await queue.complete(session, [completion_of(lease, audio=audio)])

    row = await read(database, lease.generation_id)
    assert (row.bpm, row.musical_key) == (138.2, "F#m")
    assert row.get_metadata()["audio"] == audio


async def test_a_completion_writes_down_what_was_made(database):
    lease = await start_one(
        database, metadata={"mine": 1}, file_path="wish.wav", error_message="first time"
    )

    async with database.session() as session:
        assert await queue.complete(session, [completion_of(lease, audio={"peak": 0.9})]) == {lease}

    row = (await read(database, lease.generation_id)).to_dict()
    made = {
        "file_size_bytes": 1024,
        "sha256": "ab" * 32,
        "model_version": "v1",
        "generation_time_seconds": 1.5,
    }
    assert (
        row
        | made
        | {"file_path": f"{lease.generation_id}-1.wav", "progress": 1.0, "error_message": None}
        == row
    )
    assert row | {"status": "completed", "worker_id": None, "lease_expires_at": None} == row
    assert row["metadata"] == {"mine": 1, "audio": {"peak": 0.9}}


async def test_completions_that_are_ready_together_share_a_statement(database):
    async with database.session() as session:
        for _ in range(3):
            await add_generation(session)
        leases = [claimed.lease for claimed in await claim_up_to(session, 3)]
        stale = Lease(leases[0].generation_id, 9)
        done = await queue.complete(session, [completion_of(lease) for lease in [*leases, stale]])

    assert done == set(leases)
    assert (
        await read(database, leases[2].generation_id)
    ).file_path == f"{leases[2].generation_id}-1.wav"


async def test_a_completion_said_again_after_a_lost_reply_gives_the_same_answer(database):
    lease = await start_one(database)
    answers = []
    for path in ("first.wav", "again.wav"):
        async with database.session() as session:
            answers.append(await queue.complete(session, [completion_of(lease, file_path=path)]))

    assert answers == [{lease}, {lease}]
    assert (await read(database, lease.generation_id)).file_path == "first.wav"


async def test_completing_nothing_completes_nothing(database):
    async with database.session() as session:
        assert await queue.complete(session, []) == set()


async def test_a_completion_after_a_request_to_cancel_is_refused(database):
    lease = await start_one(database)

    async with database.session() as session:
        await queue.cancel(session, lease.generation_id)
        assert await queue.complete(session, [completion_of(lease)]) == set()

    assert (await read(database, lease.generation_id)).file_path is None


# fail


@pytest.mark.parametrize(
    ("failures", "max_attempts", "retry_in", "status"),
    [
        (0, 3, 5.0, "pending"),
        (1, 3, 5.0, "pending"),
        (2, 3, 5.0, "failed"),
        (0, 1, 5.0, "failed"),
        (0, 3, None, "failed"),
    ],
)
async def test_a_failure_costs_one_of_the_budget(
    database, failures, max_attempts, retry_in, status
):
    lease = await start_one(database, failures=failures, max_attempts=max_attempts)

    async with database.session() as session:
        assert await queue.fail(session, lease, "no GPU", retry_in_seconds=retry_in) == status

    row = await read(database, lease.generation_id)
    assert (row.status, row.failures, row.error_message) == (status, failures + 1, "no GPU")
    assert (row.worker_id, row.lease_expires_at, row.is_finished) == (
        None,
        None,
        row.completed_at is not None,
    )


async def test_a_failed_row_waits_for_its_backoff(database, stopped_clock):
    lease = await start_one(database, run_at=NOON)

    async with database.session() as session:
        await queue.fail(session, lease, "no GPU", retry_in_seconds=5.0)
        assert await claim_up_to(session, 1) == []

    assert (await read(database, lease.generation_id)).run_at == NOON + timedelta(seconds=5)


async def test_a_crashing_prompt_runs_out_of_budget(database):
    lease = await start_one(database, max_attempts=3)
    statuses = []
    async with database.session() as session:
        for number in (1, 2, 3):
            statuses.append(
                await queue.fail(
                    session, Lease(lease.generation_id, number), "crash", retry_in_seconds=0
                )
            )
            await claim_up_to(session, 1)

    assert statuses == ["pending", "pending", "failed"]
    assert (await read(database, lease.generation_id)).attempt == 3


@given(
    st.integers(1, 200), st.just(0.0) | st.floats(0.001, 3600), st.randoms(use_true_random=False)
)
def test_backoff_doubles_up_to_an_hour_and_never_waits_less_than_half(failures, base, rng):
    limit = min(3600.0, base * 2.0 ** (failures - 1))

    assert limit / 2 <= backoff_seconds(failures, base, rng) <= limit


def test_backoff_spreads_the_retries():
    waits = [backoff_seconds(3, 5.0, random.Random(seed)) for seed in range(200)]

    assert min(waits) < 10.5
    assert max(waits) > 19.5


# release


async def test_a_release_costs_nothing_and_the_row_is_due_at_once(database):
    lease = await start_one(database, failures=1)

    async with database.session() as session:
        assert await queue.release(session, [lease]) == {lease: "pending"}
        again = await claim_one(session, "worker-2")

    row = await read(database, lease.generation_id)
    assert (row.failures, again) == (1, Lease(lease.generation_id, 2))


async def test_releasing_nothing_releases_nothing(database):
    async with database.session() as session:
        assert await queue.release(session, []) == {}


# cancel


async def test_a_pending_row_is_cancelled_at_once(database):
    async with database.session() as session:
        row = await add_generation(session)
        assert await queue.cancel(session, row.id) == "cancelled"
        assert await queue.cancel(session, row.id) == "cancelled"
        assert await claim_up_to(session, 1) == []

    assert (await read(database, row.id)).completed_at is not None


async def test_cancelling_a_cancelled_row_again_keeps_its_time(database):
    async with database.session() as session:
        row = await add_generation(session, status="cancelled", completed_at=NOON)
        await queue.cancel(session, row.id)

    assert (await read(database, row.id)).completed_at == NOON


@pytest.mark.parametrize("move", [fail, fail_for_good, release, rescue])
async def test_a_request_to_cancel_survives_whatever_ends_the_attempt(database, move):
    lease = await start_one(database)

    async with database.session() as session:
        await queue.cancel(session, lease.generation_id)
        await expire(session, lease)
        await move(session, lease)

    row = await read(database, lease.generation_id)
    assert (row.status, row.cancel_requested) == ("cancelled", True)
    assert row.completed_at is not None


# rescue


@pytest.mark.parametrize(("failures", "status"), [(0, "pending"), (1, "pending"), (2, "failed")])
async def test_a_rescue_costs_one_of_the_budget(database, failures, status):
    lease = await start_one(database, failures=failures, max_attempts=3)

    async with database.session() as session:
        await expire(session, lease)
        assert await rescue_lapsed(session) == [queue.Rescued(lease, status)]

    row = await read(database, lease.generation_id)
    assert (row.failures, row.status, row.error_message) == (
        failures + 1,
        status,
        queue.WORKER_LOST,
    )


async def test_a_rescued_row_is_due_at_once_for_another_attempt(database):
    lease = await start_one(database)

    async with database.session() as session:
        await expire(session, lease)
        await rescue_lapsed(session)
        assert await claim_one(session, "worker-2") == Lease(lease.generation_id, 2)


async def test_one_of_two_rescuers_takes_the_row(database):
    lease = await start_one(database)
    async with database.session() as session:
        await expire(session, lease)

    async def sweep():
        async with database.session() as session:
            return await rescue_lapsed(session)

    assert sorted(map(len, await asyncio.gather(sweep(), sweep()))) == [0, 1]
    assert (await read(database, lease.generation_id)).failures == 1


# the fence


async def successor(session, lease, how):
    """Let the row go on to its second attempt in one of the ways it can."""
    if how == "rescue":
        await expire(session, lease)
        await rescue_lapsed(session)
    elif how == "release":
        await queue.release(session, [lease])
    elif how == "fail":
        await queue.fail(session, lease, "no GPU", retry_in_seconds=0)
    else:
        await queue.fail(session, lease, "no GPU", retry_in_seconds=None)
        await queue.retry(session, lease.generation_id)
    return await claim_one(session, "worker-2")


@pytest.mark.parametrize("move", [renew, complete, fail, fail_for_good, release])
@pytest.mark.parametrize("how", ["rescue", "release", "fail", "retry"])
async def test_a_stale_attempt_can_do_nothing_to_its_successor(database, how, move):
    stale = await start_one(database)
    async with database.session() as session:
        await successor(session, stale, how)
    before = (await read(database, stale.generation_id)).to_dict()

    async with database.session() as session:
        await move(session, stale)

    assert (await read(database, stale.generation_id)).to_dict() == before


async def test_a_stale_attempt_is_told_that_its_lease_is_lost(database):
    stale = await start_one(database)
    async with database.session() as session:
        await successor(session, stale, "rescue")

        assert await queue.renew(session, {stale: 0.9}, lease_seconds=30) == {}
        assert await queue.complete(session, [completion_of(stale)]) == set()
        assert await queue.fail(session, stale, "late", retry_in_seconds=0) is None
        assert await queue.release(session, [stale]) == {}


@pytest.mark.parametrize("move", [renew, complete, fail, fail_for_good, release])
async def test_a_stale_attempt_can_do_nothing_to_a_row_that_waits_again(database, move):
    stale = await start_one(database)
    async with database.session() as session:
        await expire(session, stale)
        await rescue_lapsed(session)
    before = (await read(database, stale.generation_id)).to_dict()

    async with database.session() as session:
        await move(session, stale)

    assert (await read(database, stale.generation_id)).to_dict() == before


async def test_a_stale_worker_cannot_complete_what_its_successor_completed(database):
    stale = await start_one(database)
    async with database.session() as session:
        fresh = await successor(session, stale, "rescue")
        await queue.complete(session, [completion_of(fresh)])

        assert await queue.complete(session, [completion_of(stale)]) == set()

    assert (await read(database, stale.generation_id)).file_path == f"{stale.generation_id}-2.wav"


@pytest.mark.parametrize("how", ["rescue", "release", "fail", "retry"])
async def test_the_attempt_only_ever_goes_up(database, how):
    lease = await start_one(database)

    async with database.session() as session:
        assert await successor(session, lease, how) == Lease(lease.generation_id, 2)


async def mark_by_hand(database, generation):
    async with database.session() as session:
        session.add(generation)
        generation.mark_processing()


@pytest.mark.parametrize("ended", [False, True])
async def test_a_write_by_hand_that_raced_with_a_claim_is_an_error(database, ended):
    async with database.session() as session:
        mine = await add_generation(session)
    async with database.session() as session:
        lease = await claim_one(session)
        if ended:
            await queue.release(session, [lease])

    with pytest.raises(StaleDataError):
        await mark_by_hand(database, mine)


async def test_only_one_of_two_takes_a_row_by_hand(database):
    async with database.session() as session:
        row = await add_generation(session)
        first = await update_generation_status(session, row.id, "processing")
        with pytest.raises(IllegalTransitionError):
            await update_generation_status(session, row.id, "processing")

    assert first.attempt == 1


# the attempts tell the truth


@pytest.mark.parametrize(
    ("move", "outcome", "error", "device_seconds"),
    [
        (complete, "completed", None, 1.5),
        (fail, "failed", "no GPU", None),
        (fail_for_good, "failed", "no GPU", None),
        (release, "released", None, None),
        (rescue, "lost", queue.WORKER_LOST, None),
    ],
)
async def test_an_attempt_tells_how_it_ended(database, move, outcome, error, device_seconds):
    lease = await start_one(database)
    async with database.session() as session:
        await expire(session, lease)
        await move(session, lease)

    (attempt,) = await attempts_of(database, lease.generation_id)
    assert (attempt.outcome, attempt.error_message, attempt.device_seconds) == (
        outcome,
        error,
        device_seconds,
    )
    assert attempt.finished_at >= attempt.started_at


@pytest.mark.parametrize(
    ("move", "outcome"), [(fail, "cancelled"), (release, "cancelled"), (rescue, "lost")]
)
async def test_the_attempt_of_a_cancelled_row_tells_how_it_ended(database, move, outcome):
    lease = await start_one(database)
    async with database.session() as session:
        await queue.cancel(session, lease.generation_id)
        await expire(session, lease)
        await move(session, lease)

    assert [attempt.outcome for attempt in await attempts_of(database, lease.generation_id)] == [
        outcome
    ]


async def test_a_failed_attempt_keeps_its_device_seconds(database):
    lease = await start_one(database)
    async with database.session() as session:
        await queue.fail(session, lease, "no GPU", retry_in_seconds=0, device_seconds=2.5)

    assert [
        attempt.device_seconds for attempt in await attempts_of(database, lease.generation_id)
    ] == [2.5]


async def test_the_attempts_of_a_row_are_kept_one_by_one(database):
    lease = await start_one(database)
    async with database.session() as session:
        second = await successor(session, lease, "release")
        third = await successor(session, second, "rescue")
        await queue.complete(session, [completion_of(third)])

    attempts = await attempts_of(database, lease.generation_id)
    assert [(item.attempt, item.worker_id, item.outcome) for item in attempts] == [
        (1, "worker-1", "released"),
        (2, "worker-2", "lost"),
        (3, "worker-2", "completed"),
    ]


async def test_a_late_answer_does_not_rewrite_an_attempt(database):
    lease = await start_one(database)
    async with database.session() as session:
        await expire(session, lease)
        await rescue_lapsed(session)
        await queue.complete(session, [completion_of(lease)])

    assert [attempt.outcome for attempt in await attempts_of(database, lease.generation_id)] == [
        "lost"
    ]


# retry, prune


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_retry_gives_a_fresh_budget_and_keeps_counting_attempts(database, status):
    async with database.session() as session:
        row = await add_generation(
            session,
            status=status,
            attempt=3,
            failures=3,
            cancel_requested=True,
            progress=0.7,
            run_at=NOON,
        )
        await queue.retry(session, row.id)

    row = await read(database, row.id)
    assert (row.status, row.failures, row.attempt, row.progress) == ("pending", 0, 3, 0.0)
    assert (row.cancel_requested, row.completed_at) == (False, None)
    assert row.run_at > datetime.now(UTC) - timedelta(minutes=1)


@pytest.mark.parametrize(("seconds", "found"), [(99.999, False), (100, True), (101, True)])
async def test_a_row_may_be_pruned_once_it_is_old_enough(database, stopped_clock, seconds, found):
    async with database.session() as session:
        completed_at = NOON - timedelta(seconds=seconds)
        row = await add_generation(
            session, status="completed", attempt=2, completed_at=completed_at
        )
        leases = await retention.find_prunable(
            session, status="completed", older_than_seconds=100, limit=10
        )

    assert leases == ([Lease(row.id, 2)] if found else [])


@pytest.mark.parametrize("status", STATUSES)
async def test_only_finished_rows_of_the_status_are_prunable(database, status):
    async with database.session() as session:
        ids = {each: (await add_in(session, each)).id for each in STATUSES}
        leases = await retention.find_prunable(
            session, status=status, older_than_seconds=-60, limit=10
        )

    is_finished = status in ("completed", "failed", "cancelled")
    assert [lease.generation_id for lease in leases] == ([ids[status]] if is_finished else [])


async def test_the_oldest_are_pruned_first_and_no_more_than_the_limit(database):
    async with database.session() as session:
        ids = [
            (
                await add_generation(
                    session, status="failed", completed_at=NOON - timedelta(days=days)
                )
            ).id
            for days in (1, 3, 2)
        ]
        leases = await retention.find_prunable(
            session, status="failed", older_than_seconds=0, limit=2
        )

    assert [lease.generation_id for lease in leases] == [ids[1], ids[2]]


async def test_a_row_that_was_retried_meanwhile_is_not_pruned(database):
    async with database.session() as session:
        kept, gone = [
            (await add_generation(session, status="failed", attempt=1)).id for _ in range(2)
        ]
        leases = await retention.find_prunable(
            session, status="failed", older_than_seconds=0, limit=10
        )
        await queue.retry(session, kept)
        assert await retention.prune(session, leases) == 1

    assert await read_all(database, select(Generation.id)) == [kept]
    assert gone != kept


async def test_a_row_that_finished_again_under_another_attempt_is_not_pruned(database):
    async with database.session() as session:
        row = await add_generation(session, status="completed", attempt=2)

        assert await retention.prune(session, [Lease(row.id, 1)]) == 0
        assert await retention.prune(session, []) == 0
        assert await retention.prune(session, [Lease(row.id, 2)]) == 1


async def test_pruning_takes_the_attempts_along_and_leaves_the_prompt(database):
    lease = await start_one(database)
    async with database.session() as session:
        session.add(Prompt(text="lofi rain"))
        await queue.complete(session, [completion_of(lease)])
        await retention.prune(session, [lease])

    assert await attempts_of(database, lease.generation_id) == []
    assert await read_all(database, select(Prompt.text)) == ["lofi rain"]


# questions


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        ({}, True),
        ({"run_at": NOON + timedelta(days=36_500)}, False),
        ({"run_at": NOON + timedelta(days=36_500), "failures": 1}, True),
        ({"model_name": "musicgen-large"}, False),
        ({"worker_id": "worker-1"}, True),
        ({"worker_id": "worker-1", "model_name": "musicgen-large"}, False),
        ({"status": "processing"}, False),
        ({"status": "completed"}, False),
        ({"status": "failed", "failures": 3}, False),
    ],
)
async def test_there_is_work_while_a_row_is_due_waits_for_a_retry_or_is_held(
    database, overrides, answer
):
    async with database.session() as session:
        await add_generation(session, **overrides)

        assert await due.has_work(session, [MODEL]) is answer


async def test_the_position_counts_those_that_go_first(database):
    async with database.session() as session:
        ids = [await add_due(session, minutes) for minutes in (2, 0, 1)]
        urgent = await add_due(session, 2, priority=3)
        await add_due(session, 0, model_name="musicgen-large")
        await add_generation(session, worker_id="worker-1")
        positions = [
            await due.queue_position(session, generation_id) for generation_id in [urgent, *ids]
        ]

    assert positions == [1, 4, 2, 3]


async def test_what_is_scheduled_for_later_is_in_nobodys_way(database):
    async with database.session() as session:
        later = await add_generation(session, run_at=now_plus(3600), priority=1000)
        row = await add_generation(session)
        positions = [await due.queue_position(session, each.id) for each in (row, later)]

    assert positions == [1, 1]


async def test_the_position_is_the_order_of_the_claims(database):
    rng = random.Random(7)
    async with database.session() as session:
        ids = [
            await add_due(session, -rng.randrange(4), priority=rng.randrange(3)) for _ in range(20)
        ]
        positions = {
            generation_id: await due.queue_position(session, generation_id) for generation_id in ids
        }
        claims = await claim_up_to(session, 20)

    assert [positions[claimed.lease.generation_id] for claimed in claims] == [*range(1, 21)]


@pytest.mark.parametrize("overrides", [{"worker_id": "worker-1"}, {"status": "completed"}])
async def test_what_does_not_wait_has_no_position(database, overrides):
    async with database.session() as session:
        row = await add_generation(session, **overrides)

        assert await due.queue_position(session, row.id) is None
        assert await due.queue_position(session, "unknown") is None


async def test_the_database_answers(database):
    async with database.session(read_only=True) as session:
        assert abs(await queue.read_clock(session) - datetime.now(UTC)) < timedelta(minutes=1)


# what the tables themselves refuse, and the two SQL functions


@pytest.mark.parametrize(
    "impossible",
    [
        {"status": "done"},
        {"status": "completed", "completed_at": None},
        {"status": "pending", "completed_at": NOON},
        {"status": "processing", "worker_id": "worker-1", "lease_expires_at": None},
        {"status": "processing", "lease_expires_at": NOON},
        {"status": "pending", "worker_id": "worker-1", "lease_expires_at": NOON},
        {"duration_seconds": 0.0},
        {"sample_rate": 0},
        {"channels": -1},
        {"attempt": -1},
        {"failures": -1},
        {"max_attempts": 0},
        {"progress": 1.5},
        {"progress": -0.1},
        {"model_name": None},
        {"prompt_id": 999},
    ],
)
async def test_a_generation_that_cannot_be_is_refused(database, impossible):
    values = {
        "prompt": "x",
        "model_name": MODEL,
        "duration_seconds": 1.0,
        "sample_rate": 1,
        "channels": 1,
    }
    async with database.session() as session:
        session.add(Generation(**values | impossible))
        with pytest.raises(IntegrityError):
            await session.flush()
        await session.rollback()


@pytest.mark.parametrize(
    "impossible",
    [
        {"outcome": "exploded", "finished_at": NOON},
        {"outcome": "failed"},
        {"finished_at": NOON},
        {"generation_id": "unknown"},
        {"attempt": 1},
    ],
)
async def test_an_attempt_that_cannot_be_is_refused(database, impossible):
    lease = await start_one(database)
    values = {"generation_id": lease.generation_id, "attempt": 2, "worker_id": "worker-1"}
    async with database.session() as session:
        session.add(Attempt(**values | impossible))
        with pytest.raises(IntegrityError):
            await session.flush()
        await session.rollback()


async def test_a_prompt_that_was_never_used_or_is_there_already_is_refused(database):
    for prompts in ([Prompt(text="a", used_count=0)], [Prompt(text="b"), Prompt(text="b")]):
        async with database.session() as session:
            session.add_all(prompts)
            with pytest.raises(IntegrityError):
                await session.flush()
            await session.rollback()


async def test_an_idempotency_key_belongs_to_one_row(database):
    async with database.session() as session:
        await add_generation(session, idempotency_key="order-7")
        with pytest.raises(IntegrityError):
            await add_generation(session, idempotency_key="order-7")
        await session.rollback()


@pytest.mark.parametrize("before", [None, {}, {"other": [1, None]}, {"audio": 1, "x": "ü"}])
async def test_a_json_key_is_added_beside_the_others(database, before):
    async with database.session() as session:
        row = await add_generation(session, metadata_=before)
        value = literal(json.dumps({"peak": 0.5, "list": [1, 2]}))
        changed = with_json_key(Generation.metadata_, literal("audio"), value)
        await session.execute(update(Generation).values(metadata_=changed))

    assert (await read(database, row.id)).metadata_ == {
        **(before or {}),
        "audio": {"peak": 0.5, "list": [1, 2]},
    }


@pytest.mark.parametrize("seconds", [-86_400.0, -0.5, 0, 1e-6, 0.25, 30, 3600.0])
async def test_the_databases_clock_is_utc_and_adds_seconds(database, seconds):
    async with database.session() as session:
        moment, plain = (await session.execute(select(now_plus(seconds), now()))).one()

    assert abs(moment - plain - timedelta(seconds=seconds)) < timedelta(seconds=0.1)
    assert abs(plain - datetime.now(UTC)) < timedelta(seconds=60)
    assert moment.tzinfo is UTC


async def test_times_come_back_in_utc_and_sort_whatever_zone_they_came_in(database):
    async with database.session() as session:
        row = await add_generation(
            session, run_at=datetime.fromisoformat("2026-01-31T13:00:00.000001+01:00")
        )
        later = select(func.count()).select_from(Generation).where(Generation.run_at > NOON)
        assert await session.scalar(later) == 1

    assert (await read(database, row.id)).run_at == NOON + timedelta(microseconds=1)


async def test_a_time_without_a_zone_is_refused(database):
    async with database.session() as session:
        with pytest.raises(Exception, match="a time without a zone is ambiguous"):
            await add_generation(session, run_at=datetime(2026, 1, 31))  # noqa: DTZ001
        await session.rollback()


def test_worker_rows_are_plain_json():
    assert WorkerInfo(id="worker-1", started_at=NOON).to_dict()["started_at"] == NOON.isoformat()
