"""Title, notes, tags and star: set at enqueue and later, on every database."""

import asyncio

import pytest
from sqlalchemy import select

from dgx_music import (
    GenerationNotFoundError,
    InvalidRequestError,
    enqueue,
    enqueue_many,
    get_session,
    label_generation,
)
from dgx_music.storage import Generation, queue
from dgx_music.storage.models import Tag
from tests.factories import add_generation, claim_one, completion_of, read, read_all

pytestmark = [pytest.mark.usefixtures("default_database"), pytest.mark.any_driver]

LABELS = {
    "title": " Night drive ",
    "notes": "for the café\r\nscene",
    "tags": ["Warm", "ambient", "warm "],
}
STORED = ("Night drive", "for the café\nscene", ["ambient", "warm"])


def labels_of(row):
    return row.title, row.notes, row.tags


async def words_of(database, generation_id):
    query = select(Generation.search_text).where(Generation.id == generation_id)
    return (await read_all(database, query))[0]


@pytest.fixture
def database(default_database):
    return default_database


async def test_labels_are_stored_at_enqueue_in_one_form(database):
    made = await enqueue("lofi rain", **LABELS, starred=True)

    row = await read(database, made.id)
    assert labels_of(row) == labels_of(made) == STORED
    assert (row.is_starred, made.is_starred) == (True, True)
    assert await words_of(
        database, row.id
    ) == "night drive for the xc3a90 scene ambient warm".replace("xc3a90", "cafe")


async def test_without_labels_a_row_has_no_words(database):
    one, other = await enqueue_many(["a", {"prompt": "b", "tags": [], "starred": False}])

    for made in (one, other):
        row = await read(database, made.id)
        assert (*labels_of(row), row.is_starred) == (None, None, None, False)
        assert await words_of(database, row.id) is None


async def test_labels_do_not_tell_one_request_from_another(database):
    first = await enqueue("lofi rain", idempotency_key="one", title="A")
    second = await enqueue("lofi rain", idempotency_key="one", title="B", starred=True)

    assert (second.id, second.title) == (first.id, "A")


async def test_a_label_changes_and_the_others_stay(database):
    made = await enqueue("lofi rain", **LABELS)

    row = await label_generation(made.id, title="Day")
    assert labels_of(row) == ("Day", *STORED[1:])
    row = await label_generation(made.id, notes=None, starred=True)
    assert (*labels_of(row), row.is_starred) == ("Day", None, STORED[2], True)
    assert await words_of(database, row.id) == "day ambient warm"
    row = await label_generation(made.id, title=None, tags=None, starred=None)
    assert (*labels_of(row), row.is_starred) == (None, None, None, False)
    assert await words_of(database, row.id) is None


async def test_tags_are_added_and_removed_and_found(database):
    made = await enqueue("lofi rain", tags=["a", "b"])

    row = await label_generation(made.id, add_tags=["C", "a"], remove_tags="b")

    assert row.tags == ["a", "c"]
    assert {*await read_all(database, select(Tag.name))} == {"a", "c"}
    assert (await label_generation(made.id, remove_tags=["a", "c", "x"])).tags is None


async def test_a_call_that_changes_nothing_returns_the_row(database):
    made = await enqueue("lofi rain", title="A")

    assert (await label_generation(made.id)).title == "A"


async def test_calls_at_a_time_lose_no_words(database):
    made, tags = await enqueue("lofi rain"), ["calm", "dark", "lofi", "warm"]

    await asyncio.gather(
        label_generation(made.id, title="night"),
        label_generation(made.id, notes="drive"),
        *(label_generation(made.id, add_tags=tag) for tag in tags),
    )

    row = await read(database, made.id)
    assert labels_of(row) == ("night", "drive", tags)
    assert await words_of(database, made.id) == " ".join(["night", "drive", *tags])


async def test_a_running_attempt_is_not_disturbed(database):
    made = await enqueue("lofi rain")
    async with database.session() as session:
        lease = await claim_one(session)

    row = await label_generation(made.id, title="Night", add_tags="a", starred=True)
    async with database.session() as session:
        assert await queue.complete(session, [completion_of(lease)])

    assert (row.attempt, row.status) == (1, "processing")
    row = await read(database, made.id)
    assert (row.status, row.title, row.tags) == ("completed", "Night", ["a"])


async def test_in_the_callers_session_a_rollback_takes_it_back(database):
    made = await enqueue("lofi rain", title="A")

    async with get_session() as session:
        row = await session.get(Generation, made.id)
        await label_generation(made.id, title="B", session=session)
        assert row.title == "B"
        await session.rollback()
    assert (await read(database, made.id)).title == "A"


async def test_an_object_that_is_changed_keeps_its_words(database):
    made = await enqueue("lofi rain", title="A", notes="old")
    async with database.session() as session:
        row = await session.get(Generation, made.id)
        row.title = "dawn"
    async with database.session() as session:
        (await session.get(Generation, made.id)).tags = ["z"]
        await add_generation(session, id="g-2", title="noon")

    assert await words_of(database, made.id) == "dawn old z"
    assert await words_of(database, "g-2") == "noon"


@pytest.mark.parametrize("changes", [{"title": "A"}, {"starred": True}, {"add_tags": "a"}, {}])
async def test_an_unknown_id_is_not_found(changes):
    with pytest.raises(GenerationNotFoundError):
        await label_generation("nothing", **changes)


@pytest.mark.parametrize(
    ("labels", "field"),
    [
        ({"title": ""}, "title"),
        ({"title": "a\nb"}, "title"),
        ({"title": "x" * 201}, "title"),
        ({"notes": " "}, "notes"),
        ({"notes": "x" * 10_001}, "notes"),
        ({"notes": "a\0"}, "notes"),
        ({"tags": ["x" * 51]}, "tags"),
        ({"tags": ["a", ""]}, "tags"),
        ({"tags": [7]}, "tags"),
        ({"tags": 7}, "tags"),
        ({"tags": [str(number) for number in range(21)]}, "tags"),
        ({"starred": "yes"}, "starred"),
    ],
)
async def test_a_label_that_cannot_be_is_refused_by_its_name(database, labels, field):
    made = await enqueue("lofi rain", title="A")

    for call in (lambda: enqueue("x", **labels), lambda: label_generation(made.id, **labels)):
        with pytest.raises(InvalidRequestError) as refused:
            await call()
        assert refused.value.field == field


async def test_more_tags_than_there_may_be_are_refused_and_nothing_is_changed(database):
    made = await enqueue("lofi rain", tags=[f"{number:02}" for number in range(20)])

    with pytest.raises(InvalidRequestError, match="tags has 21 tags; use at most 20"):
        await label_generation(made.id, add_tags="x", title="A")
    assert (await read(database, made.id)).title is None
