"""Lists of generations: keyset pages, filters, and an index for each of them."""

import base64
import random
import re
from datetime import UTC, datetime, timedelta
from itertools import chain, combinations

import pytest
from sqlalchemy import insert

from dgx_music.errors import InvalidRequestError
from dgx_music.storage import Database, Generation, list_generations, search_generations
from tests.factories import MODEL, add_generation
from tests.storage.plans import analyze, plan_of

pytestmark = pytest.mark.any_driver

START = datetime(2026, 1, 1, tzinfo=UTC)
SHAPE = {"prompt": "lofi rain", "duration_seconds": 8.0, "sample_rate": 32_000, "channels": 1}
FILTERS = {
    "status": "failed",
    "model": "musicgen-large",
    "tenant": "tenant-3",
    "created_from": START,
    "created_before": START + timedelta(hours=400),
}
EVERY_COMBINATION = [
    dict(chosen)
    for size in range(len(FILTERS) + 1)
    for chosen in combinations(FILTERS.items(), size)
]


def at(minutes):
    return START + timedelta(minutes=minutes)


def rows(count):
    """Return rows as a busy year leaves them: nearly all completed, one model liked best, few tenants with much."""
    rng = random.Random(3)
    for number in range(count):
        (status,) = rng.choices(["completed", "failed", "cancelled", "pending"], [92, 4, 2, 2])
        (model,) = rng.choices([MODEL, "musicgen-medium", "musicgen-large"], [70, 25, 5])
        (tenant,) = rng.choices(
            ["", *(f"tenant-{one}" for one in range(1, 9))], [50, 20, 10, 5, 5, 4, 3, 2, 1]
        )
        finished = None if status == "pending" else at(number + 5)
        facts = {"status": status, "model_name": model, "tenant": tenant, "completed_at": finished}
        yield SHAPE | facts | {"id": f"g-{number:06}", "created_at": at(number // 2)}


async def fill(database, count):
    async with database.session() as session:
        await session.execute(insert(Generation), list(rows(count)))
    await analyze(database)


async def page(database, **options):
    async with database.session(read_only=True) as session:
        return await list_generations(session, **options)


async def ids_of_pages(database, **options):
    """Return the ids of each page, first to last."""
    pages, after = [], None
    while not pages or after:
        found = await page(database, after=after, **options)
        pages.append([row.id for row in found.generations])
        after = found.next
    return pages


def fits(row, filters):
    return all(
        [
            row["status"] == filters.get("status", row["status"]),
            row["model_name"] == filters.get("model", row["model_name"]),
            row["tenant"] == filters.get("tenant", row["tenant"]),
            row["created_at"] >= filters.get("created_from", row["created_at"]),
            row["created_at"] < filters.get("created_before", at(10**6)),
        ]
    )


async def test_pages_one_after_another_hold_every_row_once_newest_first(database):
    await fill(database, 95)

    pages = await ids_of_pages(database, limit=10)

    assert [len(ids) for ids in pages] == [10] * 9 + [5]
    assert [*chain(*pages)] == [f"g-{number:06}" for number in reversed(range(95))]


async def test_every_combination_of_filters_lists_what_fits(database):
    await fill(database, 2_000)

    for filters in [
        *EVERY_COMBINATION,
        {"tenant": ""},
        {"status": "completed", "tenant": "", "model": MODEL},
    ]:
        expected = [row["id"] for row in rows(2_000) if fits(row, filters)]
        pages = await ids_of_pages(database, limit=300, **filters)
        assert [*chain(*pages)] == expected[::-1], filters


async def test_every_combination_of_filters_is_read_from_an_index_in_order(database):
    await fill(database, 20_000)
    after = (await page(database, limit=1)).next

    for filters in [*EVERY_COMBINATION, {"status": "completed", "model": MODEL}]:
        for start in (None, after):
            options = {"limit": 50, "after": start, **filters}
            plan = await plan_of(
                database, lambda session, given=options: list_generations(session, **given)
            )
            assert "ix_generations_" in plan, (filters, plan)
            assert not sorts_the_table(plan), (filters, plan)


async def test_each_filter_alone_is_served_by_an_index_of_its_own(database):
    await fill(database, 20_000)

    for column, filters in {
        "status": {"status": "failed"},
        "model_name": {"model": "musicgen-large"},
        "tenant": {"tenant": "tenant-3"},
    }.items():
        plan = await plan_of(
            database, lambda session, given=filters: list_generations(session, **given)
        )
        assert f"ix_generations_{column}_created_at" in plan


@pytest.mark.parametrize(
    ("filters", "leader"),
    [
        ({"status": "failed", "model": MODEL, "tenant": "tenant-3"}, "tenant"),
        ({"status": "completed", "tenant": "tenant-3"}, "tenant"),
        ({"status": "failed", "model": MODEL}, "status"),
        ({"status": "completed", "model": MODEL}, "model_name"),
        ({"status": "completed", "tenant": ""}, "status"),
    ],
)
async def test_of_several_filters_sqlite_is_led_by_the_one_likely_to_be_rarest(
    sqlite_url, filters, leader
):
    database = Database(sqlite_url)

    plan = await plan_of(database, lambda session: list_generations(session, **filters))

    assert f"ix_generations_{leader}_created_at ({leader}=?)" in plan
    await database.dispose()


def sorts_the_table(plan):
    """Tell whether more is read than what fits; PostgreSQL may sort the few rows of a page that is the only one."""
    sorted_counts = [int(count) for count in re.findall(r"Sort  \(cost=\S+ rows=(\d+)", plan)]
    return (
        "TEMP B-TREE" in plan or "Seq Scan" in plan or any(count > 100 for count in sorted_counts)
    )


async def test_a_page_far_back_starts_in_the_index_where_the_last_one_ended(database):
    await fill(database, 20_000)
    after = (await page(database, limit=15_000)).next

    options = {"after": after, "created_before": at(10**6), "limit": 50}
    plan = await plan_of(database, lambda session: list_generations(session, **options))

    assert (
        "(created_at,id)<(?,?)"
        if database.is_embedded
        else "Index Cond: (ROW(created_at, (id)::text) < ROW("
    ) in plan


async def test_rows_that_come_meanwhile_shift_no_page(database):
    await fill(database, 4)
    first = await page(database, limit=2)
    async with database.session() as session:
        await add_generation(session)

    second = await page(database, limit=2, after=first.next)

    assert [row.id for row in second.generations] == ["g-000001", "g-000000"]
    assert second.next is None


@pytest.mark.parametrize("limit", [0, 2, 3])
async def test_a_page_that_ends_the_list_has_no_next(database, limit):
    await fill(database, 2)

    found = await page(database, limit=limit)

    assert (len(found.generations), found.next) == (min(limit, 2), None)


@pytest.mark.parametrize("name", ["created_from", "created_before"])
async def test_a_moment_itself_is_in_from_and_not_in_before(database, name):
    await fill(database, 4)

    found = await page(database, **{name: at(1)})

    assert {row.created_at for row in found.generations} == (
        {at(1)} if name == "created_from" else {at(0)}
    )


async def test_a_cursor_later_than_the_time_asked_for_skips_nothing_and_adds_nothing(database):
    await fill(database, 8)
    after = (await page(database, limit=1)).next

    found = await page(database, after=after, created_before=at(1))

    assert [row.id for row in found.generations] == ["g-000001", "g-000000"]


def cursor(text):
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "g-000001",
        "a",
        "ü",
        "\udc80",
        "\0",
        "x" * 10_000,
        7,
        cursor("2026-01-01T00:00:00+00:00"),
        cursor("2026-01-01T00:00:00+00:00 id") + "!!!!",
        cursor("2026-01-01T00:00:00 id"),
        cursor("2026-13-01T00:00:00+00:00 id"),
        cursor("0001-01-01T00:00:00+14:00 id"),
        cursor("2026-01-01T00:00:00+00:00 a\0b"),
        cursor("2026-01-01T00:00:00+00:00 " + "x" * 250),
        base64.urlsafe_b64encode(b"2026-01-01T00:00:00+00:00 \xff").decode(),
    ],
)
async def test_a_wrong_cursor_is_refused_in_a_sentence(database, wrong):
    with pytest.raises(
        InvalidRequestError, match=r"^after is not a page's cursor; give the next page's as .*\.$"
    ):
        await page(database, after=wrong)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"limit": -1}, "limit"),
        ({"status": "done"}, "status"),
        ({"model": ""}, "model"),
        ({"tenant": "a\0b"}, "tenant"),
        ({"created_from": "yesterday"}, "created_from"),
        ({"created_before": datetime(2026, 1, 1)}, "created_before"),  # noqa: DTZ001
    ],
)
async def test_a_wrong_filter_names_its_field(database, options, field):
    with pytest.raises(InvalidRequestError) as refused:
        await page(database, **options)
    assert refused.value.field == field


async def test_a_filter_that_there_is_not_is_no_filter(database):
    async with database.session(read_only=True) as session:
        with pytest.raises(TypeError, match="there is no filter 'bogus'; use status, model, "):
            await list_generations(session, bogus=1)
        with pytest.raises(TypeError, match="there is no filter 'bogus'"):
            await search_generations(session, "rain", bogus=1)
