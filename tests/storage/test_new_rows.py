"""The rows to insert that have all in common but their ids and prompts."""

import pytest

from dgx_music.client.enqueue import check_many
from dgx_music.storage.new_rows import AlikeRows, have_clips, keys_of

ROWS = AlikeRows({"tenant": "ada", "id": "x", "prompt": "x"}, ["1", "2", "3"], ["a", "b", "c"])
FULL = [
    {"tenant": "ada", "id": "1", "prompt": "a"},
    {"tenant": "ada", "id": "2", "prompt": "b"},
    {"tenant": "ada", "id": "3", "prompt": "c"},
]


def test_they_read_as_a_list_of_rows():
    assert [*ROWS] == FULL
    assert len(ROWS) == 3
    assert [ROWS[0], ROWS[-1]] == [FULL[0], FULL[-1]]
    with pytest.raises(IndexError):
        ROWS[3]


def test_a_part_of_them_is_alike_too():
    assert isinstance(ROWS[1:], AlikeRows)
    assert [*ROWS[1:]] == FULL[1:]


def test_all_get_a_value_and_the_others_stay_as_they_are():
    assert [*ROWS.with_all({"tenant": "bob"})] == [{**row, "tenant": "bob"} for row in FULL]
    assert [*ROWS] == FULL


@pytest.mark.parametrize(
    ("options", "is_alike"),
    [
        ({}, True),
        ({"tenant": "ada", "title": "x", "audio_format": "flac", "seed": 7}, True),
        ({"metadata": {"a": 1}}, False),
        ({"tags": ["x"]}, False),
        ({"variations": 2}, False),
    ],
)
async def test_requests_that_share_all_options_are_rows_alike(options, is_alike):
    rows = (await check_many(["a", {"prompt": "b"}], options)).rows

    assert isinstance(rows, AlikeRows) == is_alike
    assert keys_of(rows) == set()
    assert not have_clips(rows)


async def test_requests_with_options_of_their_own_are_not():
    rows = (await check_many(["a", {"prompt": "b", "idempotency_key": "k"}], {})).rows

    assert not isinstance(rows, AlikeRows)
    assert keys_of(rows) == {"k"}
