"""Batches and the takes of a request, on every database."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select

from dgx_music import (
    BatchNotFoundError,
    cancel_generation,
    enqueue,
    enqueue_many,
    enqueue_sync,
    get_batch,
    list_batches,
    watch_batch,
)
from dgx_music.client import batches as watching
from dgx_music.client import variations
from dgx_music.client.prune import prune_batches
from dgx_music.errors import IdempotencyConflictError, InvalidRequestError
from dgx_music.forecast import LEAST_MEASURED
from dgx_music.storage import batch_progress, delete_generation, insertion_postgres
from dgx_music.storage.batches import count_empty_batches
from dgx_music.storage.estimates import record_speed
from dgx_music.storage.models import Batch, Clip, Generation, WorkerInfo
from dgx_music.storage.schema import new_id
from dgx_music.validation import MAX_SEED
from tests.factories import MODEL, SQLITE, add_generation, audio_file, on, read, read_all
from tests.storage.plans import analyze, plan_of

pytestmark = [pytest.mark.usefixtures("default_database"), pytest.mark.any_driver]


@pytest.fixture
def database(default_database):
    return default_database


async def batches_of(database):
    """Return the names of all batches by their ids."""
    return {row.id: row.name for row in await read_all(database, select(Batch))}


async def count_rows(database):
    return len(await read_all(database, select(Generation.id)))


def seeds_of(rows):
    return [row.sampling["seed"] for row in rows]


# batches


async def test_what_is_enqueued_together_is_a_batch_with_a_name(database):
    rows = await enqueue_many(["a", "b"], batch="monday")

    assert await batches_of(database) == {rows[0].batch_id: "monday"}
    assert {row.batch_id for row in rows} == {rows[0].batch_id}
    assert (await read(database, rows[1].id)).to_dict() == rows[1].to_dict()


@pytest.mark.parametrize(
    "own",
    [
        lambda _: {},
        lambda prompt: {"priority": ord(prompt)},
        lambda prompt: {"idempotency_key": prompt},
    ],
    ids=["alike", "each with its own options", "with keys"],
)
async def test_rows_of_several_statements_are_one_batch(database, monkeypatch, own):
    monkeypatch.setattr(insertion_postgres, "CHUNK", 2)

    requests = [{"prompt": prompt, **own(prompt)} for prompt in "edcba"]
    rows = await enqueue_many(requests, batch="monday")

    assert [row.prompt for row in rows] == [*"edcba"]
    assert await batches_of(database) == {rows[0].batch_id: "monday"}
    assert [(await read(database, row.id)).to_dict() for row in rows] == [
        row.to_dict() for row in rows
    ]


async def test_one_request_in_a_list_is_a_batch_too_and_no_request_is_none(database):
    (row,) = await enqueue_many(["a"])
    assert await enqueue_many([]) == []

    assert await batches_of(database) == {row.batch_id: None}


async def test_a_generation_alone_is_in_no_batch(database):
    row = await enqueue("a")

    assert (row.batch_id, row.take, await batches_of(database)) == (None, None, {})


@pytest.mark.parametrize("name", ["", " ", "x" * 201, "a\nb", 7])
async def test_a_name_that_is_none_is_refused_and_nothing_stored(database, name):
    with pytest.raises(InvalidRequestError, match=r"^batch "):
        await enqueue_many(["a"], batch=name)

    assert (await count_rows(database), await batches_of(database)) == (0, {})


async def test_a_repeated_batch_leaves_no_empty_batch_behind(database):
    requests = [{"prompt": "a", "idempotency_key": "k"}, {"prompt": "b", "idempotency_key": "l"}]
    first = await enqueue_many(requests, batch="monday")

    again = await enqueue_many(requests, batch="tuesday")

    assert [row.id for row in again] == [row.id for row in first]
    assert await batches_of(database) == {first[0].batch_id: "monday"}


async def test_a_row_that_exists_stays_in_its_batch(database):
    old = await enqueue("a", idempotency_key="k")

    rows = await enqueue_many([{"prompt": "a", "idempotency_key": "k"}, "b"], batch="tuesday")

    assert (rows[0].id, rows[0].batch_id) == (old.id, None)
    assert await batches_of(database) == {rows[1].batch_id: "tuesday"}


async def test_of_two_batches_at_once_under_one_key_only_one_stays(database):
    calls = [enqueue_many([{"prompt": "a", "idempotency_key": "k"}]) for _ in range(4)]

    rows = [row for (row,) in await asyncio.gather(*calls)]

    assert len({row.id for row in rows}) == 1
    assert await batches_of(database) == {rows[0].batch_id: None}


async def test_a_batch_is_gone_when_its_caller_rolls_back(database):
    async with database.session() as session:
        await enqueue_many(["a", "b"], batch="monday", session=session)
        await session.rollback()

    assert (await count_rows(database), await batches_of(database)) == (0, {})


async def test_a_refused_batch_leaves_nothing(database):
    await enqueue("a", idempotency_key="k")

    with pytest.raises(IdempotencyConflictError):
        await enqueue_many(["x", {"prompt": "b", "idempotency_key": "k"}])

    assert (await count_rows(database), await batches_of(database)) == (1, {})


async def test_a_batch_without_generations_is_pruned_and_others_stay(database):
    gone, kept = await enqueue_many(["a"]), await enqueue_many(["b"])
    async with database.session() as session:
        await delete_generation(session, gone[0].id)

    assert await prune_batches(database, dry_run=True) == 1
    assert await prune_batches(database) == 1
    assert await batches_of(database) == {kept[0].batch_id: None}


# takes


async def test_takes_of_one_request_are_a_batch_with_seeds_that_follow_each_other(database):
    first = await enqueue("lofi rain", variations=4, seed=7)

    takes = await read_all(database, select(Generation).order_by(Generation.take))
    assert (takes[0].id, {row.batch_id for row in takes}) == (first.id, {first.batch_id})
    assert [(row.take, row.sampling["seed"]) for row in takes] == [(1, 7), (2, 8), (3, 9), (4, 10)]
    assert await batches_of(database) == {first.batch_id: None}


async def test_seeds_that_are_chosen_are_stored_and_kept_by_a_browser():
    rows = await enqueue_many(["lofi rain", "trap"], variations=16)

    seeds = seeds_of(rows)
    assert len({*seeds}) == 32
    assert all(0 <= seed < 2**53 for seed in seeds)


@on(SQLITE)
async def test_the_last_of_the_chosen_seeds_is_below_the_limit_too(monkeypatch):
    chosen = (2**53 - 16).to_bytes(8, "big")
    monkeypatch.setattr("dgx_music.client.variations.os.urandom", lambda _count: chosen)

    assert variations.new_seed(16) + 15 == 2**53 - 1


async def test_each_request_of_many_has_takes_of_its_own():
    rows = await enqueue_many(["a", {"prompt": "b", "variations": 1}], variations=2)

    assert [(row.prompt, row.take) for row in rows] == [("a", 1), ("a", 2), ("b", None)]
    assert len({row.batch_id for row in rows}) == 1


async def test_takes_under_one_key_are_the_same_rows_again(database):
    call = {"variations": 3, "idempotency_key": "k"}
    first = await enqueue_many(["lofi rain"], **call)

    assert [row.id for row in await enqueue_many(["lofi rain"], **call)] == [
        row.id for row in first
    ]
    assert (await enqueue("lofi rain", **call)).id == first[0].id
    assert [row.idempotency_key for row in first] == ["k", "k#2", "k#3"]
    assert await batches_of(database) == {first[0].batch_id: None}


@pytest.mark.parametrize("seed", [None, 7])
async def test_a_take_that_was_deleted_is_made_again_in_a_batch_of_its_own(database, seed):
    call = {"variations": 3, "idempotency_key": "k", "seed": seed}
    first = await enqueue_many(["lofi rain"], **call)
    async with database.session() as session:
        await delete_generation(session, first[1].id)

    again = await enqueue_many(["lofi rain"], **call)

    assert [again[0].id, again[2].id] == [first[0].id, first[2].id]
    assert (again[1].take, again[1].idempotency_key) == (2, "k#2")
    assert again[1].batch_id not in (None, first[0].batch_id)
    assert (again[1].sampling["seed"] == first[1].sampling["seed"]) is (seed is not None)


@pytest.mark.parametrize("other", [{}, {"variations": 2}, {"variations": 3, "seed": 1}])
async def test_another_number_of_takes_is_another_request(other):
    await enqueue("lofi rain", variations=3, idempotency_key="k")

    with pytest.raises(IdempotencyConflictError):
        await enqueue("lofi rain", idempotency_key="k", **other)


@on(SQLITE)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variations": 0}, "variations is 0; use a whole number from 1 to 16."),
        ({"variations": 17}, "variations is 17; use a whole number from 1 to 16."),
        ({"variations": True}, "variations is True; use a whole number from 1 to 16."),
        ({"variations": 2.0}, "variations is 2.0; use a whole number from 1 to 16."),
        ({"variations": None}, "variations is missing; use a whole number from 1 to 16."),
        (
            {"variations": 2, "temperature": 0},
            "variations would all be the same with a temperature of 0; raise it, or leave "
            "variations out.",
        ),
        ({"variations": 2, "seed": MAX_SEED}, "the last variation's seed is "),
        ({"variations": 10, "idempotency_key": "k" * 198}, "idempotency_key has 201 characters"),
    ],
)
async def test_takes_that_cannot_be_made_are_refused_and_nothing_stored(database, options, message):
    with pytest.raises(InvalidRequestError) as caught:
        await enqueue("lofi rain", **options)

    assert str(caught.value).startswith(message)
    assert await count_rows(database) == 0


@on(SQLITE)
async def test_takes_count_towards_what_may_be_sent_at_a_time(monkeypatch):
    monkeypatch.setattr("dgx_music.client.requests.MAX_BATCH", 3)

    with pytest.raises(InvalidRequestError, match=r"^requests are 4; send at most 3 at a time"):
        await enqueue_many(["a", "b"], variations=2)


async def test_takes_share_their_clip(database):
    rows = await enqueue_many(["x"], variations=2, continuation=audio_file())

    assert await read_all(database, select(Clip.sha256)) == [rows[0].continuation_sha256]
    assert rows[0].continuation_sha256 == rows[1].continuation_sha256


def test_a_script_gets_the_first_take(default_database, database_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)

    first = enqueue_sync("lofi rain", variations=2)

    assert (first.take, first.batch_id is None) == (1, False)


# how far a batch is


async def add_worker(session, **overrides):
    values = {"host": "dgx", "pid": 1, "model_name": MODEL, "models": [MODEL], "device": "cuda"}
    values |= {"slots": 1, "lease_seconds": 30.0}
    session.add(WorkerInfo(id="worker-1", **values | overrides))
    await record_speed(session, MODEL, "cuda", 1.0, 1.5, 2.0, LEAST_MEASURED)


async def add_batch(database, *statuses, name=None, **values):
    """Add a batch with a generation of 10 s for each status; return its id."""
    async with database.session() as session:
        session.add(batch := Batch(name=name, id=new_id()))
        await session.flush()
        for status in statuses:
            held = {"worker_id": "worker-1"} if status == "processing" else {"status": status}
            own = {"duration_seconds": 10.0, "batch_id": batch.id}
            await add_generation(session, **own | held | values)
    return batch.id


async def test_a_batch_is_counted_by_status_and_others_are_not(database):
    wanted = await add_batch(database, "completed", "completed", "failed", "pending", name="monday")
    await add_batch(database, "completed")

    batch = await get_batch(wanted)

    assert (batch.id, batch.name, batch.finished, batch.total) == (wanted, "monday", 3, 4)
    counts = {"pending": 1, "processing": 0, "completed": 2, "failed": 1, "cancelled": 0}
    assert (batch.counts, batch.is_finished) == (counts, False)
    assert abs(batch.created_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_a_batch_is_done_with_its_last_generation(database):
    async with database.session() as session:
        await add_worker(session)
    wanted = await add_batch(database, "processing", "pending", "pending")

    done_in = (await get_batch(wanted)).done_in

    assert (done_in.low, done_in.high) == pytest.approx((30, 60), abs=5)


async def test_of_a_batch_that_only_runs_what_is_left_is_known(database):
    async with database.session() as session:
        await add_worker(session)
    wanted = await add_batch(database, "completed", "processing", progress=0.5)

    done_in = (await get_batch(wanted)).done_in

    assert (done_in.low, done_in.high) == pytest.approx((5, 10), abs=2)


async def test_one_that_is_being_cancelled_leaves_the_end_of_the_others_known(database):
    async with database.session() as session:
        await add_worker(session, slots=2)
    wanted = await add_batch(database, "processing", progress=0.5)
    async with database.session() as session:
        cancelled = {"worker_id": "worker-1", "cancel_requested": True, "duration_seconds": 90.0}
        await add_generation(session, batch_id=wanted, **cancelled)

    done_in = (await get_batch(wanted)).done_in

    assert (done_in.low, done_in.high) == pytest.approx((5, 10), abs=2)


async def test_why_the_end_of_a_batch_is_unknown_is_said(database):
    batch = await get_batch(await add_batch(database, "pending"))

    assert (batch.done_in, batch.unknown_because) == (None, "no worker serves musicgen-small")


async def test_the_end_of_a_batch_of_two_models_is_that_of_the_later_one(database):
    async with database.session() as session:
        await add_worker(session)
    wanted = await add_batch(database, "pending")
    async with database.session() as session:
        await add_generation(session, batch_id=wanted, model_name="musicgen-large")

    assert (await get_batch(wanted)).unknown_because == "no worker serves musicgen-large"


async def test_a_finished_batch_has_nothing_left_to_wait_for(database):
    batch = await get_batch(await add_batch(database, "completed", "cancelled"))

    assert (batch.is_finished, batch.done_in, batch.unknown_because) == (True, None, None)


async def test_a_batch_as_json_says_all_that_the_object_says(database):
    batch = await get_batch(await add_batch(database, "pending", name="monday"))

    assert batch.to_dict() == {
        "id": batch.id,
        "name": "monday",
        "created_at": batch.created_at.isoformat(),
        "total": 1,
        "finished": 0,
        "counts": batch.counts,
        "done_in_seconds": None,
        "unknown_because": "no worker serves musicgen-small",
    }


async def test_batches_are_listed_newest_first_page_by_page(database):
    ids = [await add_batch(database, "pending") for _ in range(5)]

    pages, after = [], None
    while not pages or after is not None:
        page = await list_batches(limit=2, after=after)
        pages.append([batch.id for batch in page.batches])
        after = page.next
    assert pages == [ids[:2:-1], ids[2:0:-1], ids[:1]]
    assert [batch.total for batch in (await list_batches()).batches] == [1] * 5


@pytest.mark.parametrize(
    "read",
    [
        batch_progress._find_last,
        lambda session, batch_id: batch_progress._count(session, [batch_id, "another"]),
    ],
)
async def test_a_batch_is_read_by_its_index_however_many_others_there_are(database, read):
    rows = [(await enqueue_many(["a"] * 150))[0] for _ in range(20)]
    await analyze(database)

    plan = await plan_of(database, lambda session: read(session, rows[7].batch_id))
    assert "ix_generations_batch" in plan


async def test_empty_batches_are_found_by_that_index_too(database):
    for _ in range(20):
        await enqueue_many(["a"] * 150)
    await analyze(database)

    assert "ix_generations_batch" in await plan_of(database, count_empty_batches)


@on(SQLITE)
@pytest.mark.parametrize("call", [get_batch, lambda name: anext(watch_batch(name))])
async def test_a_batch_that_is_not_there_is_refused(call):
    with pytest.raises(BatchNotFoundError, match="There is no batch 'unknown'"):
        await call("unknown")


async def test_a_batch_is_watched_to_its_end(database, monkeypatch):
    monkeypatch.setattr(watching, "_POLL_SECONDS", 0.01)
    first, second = await enqueue_many(["a", "b"])
    seen = []
    async for batch in watch_batch(first.batch_id):
        seen.append(batch.counts["cancelled"])
        await cancel_generation(first.id if batch.finished == 0 else second.id)

    assert seen == [0, 1, 2]
