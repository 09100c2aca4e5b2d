"""What has changed of a list that somebody looks at."""

import pytest

from dgx_music.storage.watching import find_news
from tests.factories import SQLITE, add_generation, on
from tests.storage.plans import plan_of

pytestmark = pytest.mark.any_driver


async def add(database, *statuses):
    async with database.session() as session:
        rows = [await add_generation(session, status=status) for status in statuses]
    return [row.id for row in rows]


async def test_news_are_the_rows_that_fit_and_how_many_are_newer(database):
    ids = await add(database, "pending", "failed", "pending", "pending", "failed")
    async with database.session(read_only=True) as session:
        rows, newer = await find_news(session, ids[:3], ids[2], {"status": "pending"})
        none, all_of_them = await find_news(session, [], "", {})

    assert sorted(row.id for row in rows) == [ids[0], ids[2]]
    assert (newer, none, all_of_them) == (1, [], 5)


@on(SQLITE)
@pytest.mark.parametrize("filters", [{}, {"status": "pending"}, {"starred": True, "tag": "a"}])
async def test_news_are_found_by_their_ids(database, filters):
    def read(session):
        return find_news(session, ["a", "b"], "b", filters)

    plan = await plan_of(database, read)
    assert "sqlite_autoindex_generations_1 (id=?)" in plan, plan
