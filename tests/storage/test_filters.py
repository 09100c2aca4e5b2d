"""Filters and orders of lists: what fits, whatever the database, and by which index."""

import random
from datetime import UTC, datetime, timedelta
from itertools import chain, product

import pytest
from sqlalchemy import insert

from dgx_music.errors import InvalidRequestError
from dgx_music.storage import Database, Generation, list_generations
from dgx_music.storage.models import Batch
from tests.factories import MODEL
from tests.storage.plans import analyze, plan_of

pytestmark = pytest.mark.any_driver

START = datetime(2026, 1, 1, tzinfo=UTC)
SHAPE = {"prompt": "lofi rain", "model_name": MODEL, "sample_rate": 32_000, "channels": 1}
KEYS = ("C", "F#m", "A#m", "G", None)
SORTS = {
    "created": "created_at",
    "finished": "completed_at",
    "duration": "duration_seconds",
    "bpm": "bpm",
    "run-time": "generation_time_seconds",
}


def at(minutes):
    return START + timedelta(minutes=minutes)


def rows(count):
    """Return rows with labels, batches, tempo and key; many values are equal."""
    rng = random.Random(5)
    for number in range(count):
        (status,) = rng.choices(["completed", "failed", "cancelled", "pending"], [80, 8, 4, 8])
        tags = rng.sample(["ambient", "drums", "keep", "warm"], rng.randrange(4))
        bpm = rng.choice([None, *range(60, 180, 5)])
        yield SHAPE | {
            "id": f"g-{number:06}",
            "created_at": at(number // 2),
            "status": status,
            "completed_at": None if status == "pending" else at(number // 3 + rng.randrange(9)),
            "duration_seconds": rng.choice([4.0, 8.0, 16.5]),
            "generation_time_seconds": rng.choice([None, 1.25, 2.0 / 3.0, 4.0]),
            "bpm": None if bpm is None else bpm + 1 / 3,
            "musical_key": rng.choice(KEYS),
            "is_starred": rng.random() < 0.1,
            "tags": sorted(tags) or None,
            "batch_id": rng.choice([None, "batch-1", "batch-2"]),
            "parent_id": rng.choice([None] * 20 + ["g-000001"]),
            "metadata_": rng.choice([None, {"order": 4711}, {"order": "4711"}, {"order": 7}]),
        }


async def fill(database, count):
    async with database.session() as session:
        await session.execute(insert(Batch), [{"id": "batch-1"}, {"id": "batch-2"}])
        await session.execute(insert(Generation), list(rows(count)))
    await analyze(database)


async def page(database, **options):
    async with database.session(read_only=True) as session:
        return await list_generations(session, **options)


async def all_ids(database, limit=70, **options):
    """Return the ids of all pages, first to last."""
    pages, after = [], None
    while not pages or after:
        found = await page(database, limit=limit, after=after, **options)
        pages.append([row.id for row in found.generations])
        after = found.next
    return [*chain(*pages)]


FITTING = [
    ({"status": ["failed", "pending"]}, lambda row: row["status"] in ("failed", "pending")),
    ({"status": ("completed", "failed")}, lambda row: row["status"] in ("completed", "failed")),
    (
        {"status": ["completed", "failed"], "model": MODEL},
        lambda row: row["status"] in ("completed", "failed"),
    ),
    ({"status": ["pending", "processing", "completed", "failed", "cancelled"]}, lambda _: True),
    ({"batch": "batch-1"}, lambda row: row["batch_id"] == "batch-1"),
    ({"parent": "g-000001"}, lambda row: row["parent_id"] == "g-000001"),
    ({"starred": True}, lambda row: row["is_starred"]),
    ({"starred": False}, lambda row: not row["is_starred"]),
    ({"tag": "Ambient "}, lambda row: "ambient" in (row["tags"] or ())),
    ({"tag": ["keep", "warm"]}, lambda row: {"keep", "warm"} <= {*(row["tags"] or ())}),
    ({"bpm_from": 120}, lambda row: (row["bpm"] or 0) >= 120),
    ({"bpm_from": 100, "bpm_to": 121}, lambda row: 100 <= (row["bpm"] or 0) <= 121),
    ({"key": "Gb minor"}, lambda row: row["musical_key"] == "F#m"),
    ({"metadata": {"order": "4711"}}, lambda row: is_order_4711(row["metadata_"])),
    ({"metadata": {"order": 4711}}, lambda row: is_order_4711(row["metadata_"])),
    (
        {"starred": True, "tag": "keep", "batch": "batch-2", "status": ["failed", "completed"]},
        lambda row: (
            row["is_starred"]
            and "keep" in (row["tags"] or ())
            and row["batch_id"] == "batch-2"
            and row["status"] in ("failed", "completed")
        ),
    ),
    (
        {"key": "C", "bpm_to": 90, "created_from": at(50), "created_before": at(300)},
        lambda row: (
            row["musical_key"] == "C"
            and row["bpm"] is not None
            and row["bpm"] <= 90
            and at(50) <= row["created_at"] < at(300)
        ),
    ),
]


ORDERED = [
    ({}, lambda _: True),
    (
        {"created_from": at(20), "created_before": at(150)},
        lambda row: at(20) <= row["created_at"] < at(150),
    ),
    *FITTING[:3],
    FITTING[6],
    FITTING[11],
]


def is_order_4711(metadata):
    return metadata is not None and str(metadata["order"]) == "4711"


async def test_each_filter_lists_what_fits_newest_first(database):
    await fill(database, 700)

    for filters, fits in FITTING:
        expected = [row["id"] for row in rows(700) if fits(row)]
        assert await all_ids(database, **filters) == expected[::-1], filters


@pytest.mark.parametrize("sort", SORTS)
async def test_each_order_has_every_row_with_a_value_once_and_sorted(database, sort):
    await fill(database, 400)
    column = SORTS[sort]

    for reverse, (filters, fits) in product([False, True], ORDERED):
        with_value = [row for row in rows(400) if row[column] is not None and fits(row)]
        expected = sorted(with_value, key=lambda row: (row[column], row["id"]), reverse=not reverse)
        found = await all_ids(database, sort=sort, reverse=reverse, **filters)
        assert found == [row["id"] for row in expected], (reverse, filters)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("4711", 4711),
        (4711, "4711"),
        (1.5, "1.50"),
        (1.0, 1),
        (1e22, "1e+22"),
        (0.1, 0.1),
        (True, True),
        (False, "false"),
        (None, "null"),
        ("007", "007"),
        ("über 'x' \"y\"", "über 'x' \"y\""),
    ],
)
async def test_a_value_of_the_metadata_is_found_as_it_is_written(database, stored, wanted):
    key = 'ä "b" $.c'
    async with database.session() as session:
        session.add(Generation(**SHAPE, duration_seconds=8.0, metadata={key: stored}))

    assert len(await all_ids(database, metadata={key: wanted})) == 1
    assert await all_ids(database, metadata={"ä": wanted}) == []


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (1, True),
        (True, 1),
        ("true ", True),
        (7, "007"),
        ([1], "[1]"),
        ({"a": 1}, '{"a": 1}'),
        ([], "array"),
        ("a", "A"),
    ],
)
async def test_another_value_of_the_metadata_is_not_found(database, stored, wanted):
    async with database.session() as session:
        session.add(Generation(**SHAPE, duration_seconds=8.0, metadata={"a": stored}))

    assert await all_ids(database, metadata={"a": wanted}) == []


INDEX_OF = [
    ({"batch": "batch-3"}, "ix_generations_batch"),
    ({"parent": "g-000002"}, "ix_generations_parent_id"),
    ({"starred": True}, "ix_generations_starred"),
    ({"key": "B"}, "ix_generations_musical_key"),
    ({"tag": "rare"}, "ix_tags_name"),
    ({"bpm_from": 300, "bpm_to": 301}, "ix_generations_bpm"),
    ({"sort": "bpm"}, "ix_generations_bpm"),
    ({"sort": "bpm", "model": MODEL, "status": "completed"}, "ix_generations_bpm"),
    ({"sort": "finished"}, "ix_generations_completed_at"),
    ({"status": ["failed", "cancelled"]}, "ix_generations_status_created_at"),
]


async def test_each_filter_and_order_is_read_from_an_index(database):
    await fill(database, 5_000)

    for filters, index in INDEX_OF:
        options = {"limit": 20, **filters}
        plan = await plan_of(
            database, lambda session, given=options: list_generations(session, **given)
        )
        assert index in plan, (filters, plan)
        assert "Seq Scan" not in plan


WITH_FREQUENT_TAGS = [
    {"tag": "ambient"},
    {"tag": ["ambient", "keep"]},
    {"tag": ["ambient", "rare"]},
    {"tag": "keep", "status": ["failed", "completed"]},
    {"tag": "keep", "sort": "bpm"},
]


async def test_a_tag_of_very_many_rows_changes_no_list_and_nothing_is_sorted(
    sqlite_url, monkeypatch
):
    database = Database(sqlite_url)
    await fill(database, 300)
    before = [await all_ids(database, **each) for each in WITH_FREQUENT_TAGS]

    monkeypatch.setattr("dgx_music.storage.listing._MANY_TAGGED", 50)

    assert [await all_ids(database, **each) for each in WITH_FREQUENT_TAGS] == before
    plan = await plan_of(database, lambda session: list_generations(session, tag="keep"))
    assert "SCAN generations USING INDEX ix_generations_created_at" in plan
    assert "TEMP B-TREE" not in plan
    await database.dispose()


@pytest.mark.parametrize("statuses", [["failed", "pending"], ["completed", "failed", "cancelled"]])
async def test_a_page_of_several_statuses_reads_each_from_its_index_in_order(sqlite_url, statuses):
    database = Database(sqlite_url)

    plan = await plan_of(database, lambda session: list_generations(session, status=statuses))

    entry = "SEARCH generations USING INDEX ix_generations_status_created_at (status=?)"
    assert plan.count(entry) == len(statuses)
    await database.dispose()


async def test_a_cursor_of_another_order_is_refused(database):
    await fill(database, 9)
    after = (await page(database, limit=2, sort="duration")).next

    for order in ({}, {"sort": "bpm"}, {"sort": "duration", "reverse": True}):
        with pytest.raises(
            InvalidRequestError, match=r"after is not a page's cursor; .* same order"
        ):
            await page(database, after=after, **order)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"status": []}, "status"),
        ({"status": ["failed", "done"]}, "status"),
        ({"status": 7}, "status"),
        ({"batch": ""}, "batch"),
        ({"parent": "a\0b"}, "parent"),
        ({"starred": "yes"}, "starred"),
        ({"tag": " "}, "tag"),
        ({"tag": ["a" * 51]}, "tag"),
        ({"bpm_from": "fast"}, "bpm_from"),
        ({"bpm_to": float("nan")}, "bpm_to"),
        ({"bpm_from": 100, "bpm_to": 90}, "bpm_from"),
        ({"created_from": at(9), "created_before": at(8)}, "created_from"),
        ({"created_from": at(9), "created_before": at(9)}, "created_from"),
        ({"key": "H"}, "key"),
        ({"metadata": "a=b"}, "metadata"),
        ({"metadata": {"a": [1]}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata"),
        ({"sort": "title"}, "sort"),
    ],
)
async def test_a_wrong_filter_or_order_names_its_field(database, options, field):
    with pytest.raises(InvalidRequestError) as refused:
        await page(database, **options)
    assert refused.value.field == field


async def test_a_range_of_one_tempo_is_one(database):
    assert (await page(database, bpm_from=90, bpm_to=90)).generations == []
