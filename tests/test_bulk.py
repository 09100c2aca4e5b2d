"""Many generations changed in one call: what is meant, what is refused and why, and what a break leaves."""

import asyncio

import anyio
import pytest
from sqlalchemy import Engine, event, select, text

from dgx_music import (
    cancel_generations,
    close_db,
    get_session,
    init_db,
    retry_generations,
    star_generations,
    tag_generations,
)
from dgx_music.client import bulk as client
from dgx_music.client.bulk import choose
from dgx_music.errors import (
    BatchNotFoundError,
    CountDiffersError,
    DatabaseUnavailableError,
    InvalidRequestError,
    PartlyDoneError,
)
from dgx_music.storage import bulk, get_database_stats, queue
from dgx_music.storage.bulk import BulkResult, Refusal
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.models import Batch
from tests.daemons import rows_of
from tests.factories import POSTGRES, add_generation, on, read, start_one
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver

STATUSES = ["pending", "processing", "completed", "failed", "cancelled"]


@pytest.fixture
def database(default_database):
    return default_database


async def add(database, count=1, **values):
    """Add rows and return their ids."""
    async with database.session() as session:
        return [(await add_generation(session, **values)).id for _ in range(count)]


async def add_each_status(database, **values):
    """Add a row of each status and return their ids by it."""
    workers = {"processing": {"worker_id": "worker-1"}}
    return {
        status: (await add(database, **workers.get(status, {"status": status}), **values))[0]
        for status in STATUSES
    }


async def until_blocked(database):
    """Return once a statement waits for a lock."""
    query = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with anyio.fail_after(PATIENCE):
        while not await database.transact(lambda session: session.scalar(text(query))):
            await anyio.sleep(0.01)


async def statuses_of(database, ids):
    rows = await rows_of(database)
    return [rows[each].status for each in ids]


# What a transition does with each status


async def test_cancelling_many_does_with_each_what_cancelling_one_does(database):
    ids = await add_each_status(database)

    done = await cancel_generations(ids=ids.values())

    assert (done.changed, done.unchanged, done.running, done.refused_count) == (2, 1, 1, 2)
    assert {refusal.generation_id: refusal.reason for refusal in done.refused} == {
        ids["completed"]: "it is completed and cannot become cancelled",
        ids["failed"]: "it is failed and cannot become cancelled",
    }
    assert await statuses_of(database, ids.values()) == [
        *("cancelled", "processing", "completed", "failed", "cancelled")
    ]
    assert (await read(database, ids["processing"])).cancel_requested


async def test_retrying_many_does_with_each_what_retrying_one_does(database):
    ids = await add_each_status(database, failures=3)

    done = await retry_generations(ids=ids.values())

    assert (done.changed, done.unchanged, done.refused_count) == (2, 0, 3)
    revived = [await read(database, ids[status]) for status in ("failed", "cancelled")]
    assert [(row.status, row.failures) for row in revived] == [("pending", 0)] * 2
    assert {refusal.status for refusal in done.refused} == {"pending", "processing", "completed"}


async def test_a_second_cancel_changes_nothing(database):
    ids = await add_each_status(database)
    await cancel_generations(ids=ids.values())

    done = await cancel_generations(ids=ids.values())

    assert (done.changed, done.unchanged, done.running, done.refused_count) == (0, 3, 0, 2)


async def test_any_status_can_have_a_star_and_lose_it(database):
    ids = await add_each_status(database)

    assert (await star_generations(ids=ids.values())).changed == 5
    assert (await star_generations(ids=ids.values())) == BulkResult(unchanged=5)
    assert (await star_generations(ids=[ids["failed"]], off=True)).changed == 1
    assert [row.is_starred for row in (await rows_of(database)).values()].count(True) == 4


async def test_tags_are_added_and_removed_in_order(database):
    (mine,) = await add(database, tags=["draft", "rain"])
    (plain,) = await add(database)

    done = await tag_generations(ids=[mine, plain], add=["keep", "rain"], remove=["draft"])

    assert done == BulkResult(changed=2)
    assert (await read(database, mine)).tags == ["keep", "rain"]
    assert (await read(database, plain)).tags == ["keep", "rain"]
    assert await tag_generations(ids=[mine], add=["keep"]) == BulkResult(unchanged=1)
    assert (await tag_generations(ids=[mine], remove=["keep", "rain"])).changed == 1
    assert (await read(database, mine)).tags is None


async def test_tags_that_change_keep_title_and_notes_among_the_searched_words(database):
    (mine,) = await add(database, title="Night Train", notes="for Ana")
    await tag_generations(ids=[mine], add=["Café"])
    async with database.session(read_only=True) as session:
        words = await session.scalar(select(bulk.g.search_text).where(bulk.g.id == mine))
    assert words == "night train for ana cafe"


# Which are meant


async def test_filters_mean_all_that_fit_them_and_nothing_else(database):
    mine = await add(database, 3, tenant="label-7")
    other = await add(database, 2)

    assert (await cancel_generations(tenant="label-7")).changed == 3
    assert await statuses_of(database, mine + other) == ["cancelled"] * 3 + ["pending"] * 2


async def test_every_kind_of_filter_chooses_and_is_checked_again_under_the_lock(database):
    async with database.session() as session:
        session.add(Batch(id="b"))
    labels = {"tags": ["rain"], "is_starred": True, "metadata": {"order": "4711"}}
    measured = {"bpm": 120.0, "musical_key": "C"}
    await add(database, status="failed", batch_id="b", parent_id="p", **labels, **measured)
    plain = await add(database, 2, status="failed")
    chosen = {"batch": "b", "parent": "p", "tag": "rain", "starred": True, "key": "C"}
    more = {"bpm_from": 100, "bpm_to": 130, "metadata": {"order": 4711}, "status": ["failed"]}

    for name, value in (chosen | more).items():
        done = await tag_generations(add=[f"by-{name}"], **{name: value})
        assert (done.changed, done.refused_count) == (3 if name == "status" else 1, 0), name
        if name != "status":
            assert (await star_generations(ids=plain, **{name: value})).refused_count == 2, name
    assert (await retry_generations(**chosen, **more)).changed == 1


async def test_filters_and_ids_together_refuse_ids_that_do_not_fit(database):
    (failed,) = await add(database, status="failed")
    (waiting,) = await add(database)

    done = await retry_generations(ids=[failed, waiting, failed], status="failed")

    assert done == BulkResult(
        changed=1,
        refused_count=1,
        refused=(Refusal(waiting, "pending", "it does not fit the filters"),),
    )


async def test_an_id_that_is_not_there_is_refused(database):
    assert await cancel_generations(ids=["nothing"]) == BulkResult(
        refused_count=1, refused=(Refusal("nothing", None, "there is no such generation"),)
    )


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({}, "ids are missing, and so are filters"),
        ({"tenant": None}, "ids are missing, and so are filters"),
        ({"ids": "abc"}, "ids is one text"),
        ({"ids": [7]}, "ids"),
        ({"status": "lost"}, "status 'lost' is not one"),
        ({"status": STATUSES}, "ids are missing, and so are filters that leave any out"),
        ({"tag": []}, "tag is empty"),
        ({"metadata": {}}, "metadata is empty"),
        ({"ids": ["a"], "tag": ()}, "tag is empty"),
        ({"ids": ["a"], "expected": -1}, "expected"),
    ],
)
async def test_what_means_nothing_is_refused_before_anything_is_changed(database, wrong, why):
    (row,) = await add(database)
    with pytest.raises(InvalidRequestError, match=why):
        await cancel_generations(**wrong)
    assert (await read(database, row)).status == "pending"


async def test_a_batch_that_is_not_there_is_an_error_and_so_is_its_name(database):
    async with database.session() as session:
        session.add(Batch(id="0191-night", name="monday"))
    (mine,) = await add(database, batch_id="0191-night")

    for options in ({}, {"expected": 0}, {"ids": [mine]}):
        with pytest.raises(BatchNotFoundError, match="There is no batch 'monday'"):
            await cancel_generations(batch="monday", **options)

    assert (await cancel_generations(batch="0191-night", ids=[mine])).changed == 1


async def test_off_is_true_or_false(database):
    (mine,) = await add(database)
    with pytest.raises(InvalidRequestError, match="off is 'no'"):
        await star_generations(ids=[mine], off="no")


async def test_no_ids_are_none_and_not_all(database):
    await add(database)
    assert await cancel_generations(ids=[]) == BulkResult()


async def test_tagging_without_a_tag_is_refused(database):
    with pytest.raises(InvalidRequestError, match="add has no tag"):
        await tag_generations(ids=["a"])
    with pytest.raises(InvalidRequestError, match="add and remove both have keep"):
        await tag_generations(ids=["a"], add=["Keep"], remove=["keep"])


async def test_one_that_would_have_too_many_tags_is_refused_and_keeps_its_own(database):
    tags = [f"tag-{number:02}" for number in range(20)]
    (full,) = await add(database, tags=tags)
    (empty,) = await add(database)

    done = await tag_generations(ids=[full, empty], add=["one-more"])

    assert (done.changed, [each.generation_id for each in done.refused]) == (1, [full])
    assert "more than 20 tags" in done.refused[0].reason
    assert (await read(database, full)).tags == tags


# The number expected


async def test_another_number_than_expected_changes_nothing(database):
    await add(database, 3, tenant="label-7")

    with pytest.raises(CountDiffersError, match="2 generations were expected and 3 are meant"):
        await cancel_generations(tenant="label-7", expected=2)

    assert {row.status for row in (await rows_of(database)).values()} == {"pending"}
    assert (await cancel_generations(tenant="label-7", expected=3)).changed == 3


async def test_expected_counts_all_that_fit_also_those_that_are_refused_later(database):
    await add_each_status(database, tenant="label-7")
    assert (await cancel_generations(tenant="label-7", expected=5)).refused_count == 2


async def test_expected_counts_of_the_ids_those_that_are_there(database):
    ids = await add(database, 2)
    with pytest.raises(CountDiffersError):
        await cancel_generations(ids=[*ids, "nothing"], expected=3)


async def test_a_row_that_no_longer_fits_when_it_is_reached_is_refused(database):
    (mine,) = await add(database, status="failed")
    chosen = await choose(None, None, None, {"status": "failed"})
    await retry_generations(ids=chosen)

    done = await star_generations(ids=chosen, status="failed")

    assert [refusal.reason for refusal in done.refused] == ["it does not fit the filters"]
    assert not (await read(database, mine)).is_starred


# Chunks


async def test_more_than_a_chunk_is_changed_and_each_refusal_counted(database, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", 2)
    monkeypatch.setattr(bulk, "MAX_REFUSALS", 3)
    await add(database, 5, tenant="label-7")
    await add(database, 6, tenant="label-7", status="completed")

    done = await cancel_generations(tenant="label-7")

    assert (done.changed, done.refused_count, len(done.refused)) == (5, 6, 3)


async def test_a_chunk_is_one_update(database, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", 2)
    await add(database, 5, tenant="label-7")
    sent = []
    event.listen(Engine, "before_cursor_execute", note := lambda *facts: sent.append(facts[2]))
    try:
        await cancel_generations(tenant="label-7")
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert sum("UPDATE generations" in statement for statement in sent) == 3


async def test_a_break_says_how_many_were_changed_before_it(database, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", 2)
    await add(database, 6, tenant="label-7")
    break_at(monkeypatch, 2)

    with pytest.raises(PartlyDoneError, match=r"^2 of 6 generations were changed, and then: The"):
        await cancel_generations(tenant="label-7")

    assert (await get_stats(database))["cancelled_generations"] == 2


async def test_a_break_at_the_start_is_raised_as_it_is(database, monkeypatch):
    await add(database, 2, tenant="label-7")
    break_at(monkeypatch, 1)
    with pytest.raises(DatabaseUnavailableError):
        await cancel_generations(tenant="label-7")


def break_at(monkeypatch, number):
    """Let the database be away when this change is to be made, counted from 1."""
    make, calls = bulk.make_change, []

    async def fail(*arguments, **options):
        calls.append(None)
        if len(calls) == number:
            raise DatabaseUnavailableError("here", "it is away")
        return await make(*arguments, **options)

    monkeypatch.setattr(client.bulk, "make_change", fail)


async def get_stats(database):
    async with database.session(read_only=True) as session:
        return await get_database_stats(session)


async def test_a_break_in_the_callers_session_is_raised_as_it_is(database, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", 2)
    await add(database, 6, tenant="label-7")
    break_at(monkeypatch, 2)
    with pytest.raises(DatabaseUnavailableError):
        async with get_session() as session:
            await cancel_generations(tenant="label-7", session=session)
    assert (await get_stats(database))["cancelled_generations"] == 0


async def test_in_the_callers_session_nothing_is_kept_if_it_rolls_back(database, monkeypatch):
    monkeypatch.setattr(bulk, "CHUNK", 2)
    await add(database, 5, tenant="label-7")
    async with get_session() as session:
        assert (await cancel_generations(tenant="label-7", session=session)).changed == 5
        await session.rollback()
    assert (await get_stats(database))["cancelled_generations"] == 0


async def test_in_the_callers_session_its_objects_have_what_was_changed(database):
    changed, other = await add(database, 2)
    async with get_session() as session:
        row, apart = [await session.get(bulk.Generation, each) for each in (changed, other)]
        apart.notes = "not yet written"
        session.expire(row)
        await cancel_generations(ids=[changed], session=session)
        await tag_generations(ids=[changed], add=["rain"], session=session)
        await star_generations(ids=[changed], session=session)
        assert (row.status, row.tags, row.is_starred) == ("cancelled", ["rain"], True)
        assert apart.notes == "not yet written"


# Beside others


async def test_each_that_is_cancelled_wakes_who_waits_for_it(database):
    ids = await add(database, 3)
    with database.changes.subscribe(Topic.DONE, [ids[2]]) as changes:
        await cancel_generations(ids=ids)
        with anyio.fail_after(PATIENCE):
            await changes.wait(PATIENCE)
    assert (await get_stats(database))["cancelled_generations"] == 3


@on(*POSTGRES)
async def test_a_row_that_somebody_has_locked_is_waited_for_and_not_passed_over(database):
    first, second = sorted(await add(database, 2))
    async with database.session() as other:
        await queue.cancel(other, first)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(cancel_generations(ids=[second, first]))
            await until_blocked(database)
            assert not task.done()
            await other.rollback()
    assert task.result().changed == 2


@on(*POSTGRES)
async def test_two_that_tag_one_row_at_a_time_both_take_effect(database):
    (mine,) = await add(database)
    async with asyncio.TaskGroup() as tasks, get_session() as session:
        await tag_generations(ids=[mine], add=["rain"], session=session)
        tasks.create_task(tag_generations(ids=[mine], add=["night"]))
        await until_blocked(database)
    assert (await read(database, mine)).tags == ["night", "rain"]


async def test_a_claim_and_a_cancel_of_all_meet_and_every_row_ends_in_one_of_them(database):
    ids = await add(database, 40)

    async def claim_some():
        return await database.transact(
            lambda session: queue.claim(
                session, worker_id="w", limit=3, model_name="musicgen-small", lease_seconds=30.0
            )
        )

    done, *claims = await asyncio.gather(
        cancel_generations(ids=ids), *(claim_some() for _ in range(5))
    )

    rows = await rows_of(database)
    assert done.changed == 40
    running = {row.id for row in rows.values() if row.status == "processing"}
    assert running <= {claim.lease.generation_id for some in claims for claim in some}
    assert all(row.cancel_requested for row in rows.values())


async def test_a_running_one_is_asked_to_stop_and_never_completes(database):
    lease = await start_one(database)
    done = await cancel_generations(ids=[lease.generation_id])
    async with database.session() as session:
        assert (await queue.release(session, [lease])) == {lease: "cancelled"}
    assert (done.changed, done.running) == (1, 1)


async def test_the_result_is_plain_json(database):
    done = await cancel_generations(ids=["nothing"])
    assert done.to_dict() == {
        "changed": 0,
        "unchanged": 0,
        "running": 0,
        "refused_count": 1,
        "refused": [
            {
                "generation_id": "nothing",
                "status": None,
                "reason": "there is no such generation",
            }
        ],
    }


async def test_the_default_database_is_opened_for_it(database):
    await close_db()
    await init_db(database.url.render_as_string(hide_password=False))
    assert (await cancel_generations(status="pending")).changed == 0


async def test_a_misspelt_name_is_what_is_refused_also_without_tags():
    with pytest.raises(TypeError, match="there is no filter 'add_tags'"):
        await tag_generations(add_tags=["keep"], starred=True)
