"""Ids, and the SQL functions as each database spells them."""

import time
import uuid

import pytest
from sqlalchemy import column, literal
from sqlalchemy.dialects import postgresql, sqlite

from dgx_music.storage.schema import Status, new_id, new_ids, now, now_plus, with_json_key


def test_ids_are_uuids_of_version_7_that_say_when_they_were_made():
    before, made, after = (
        time.time_ns() // 1_000_000,
        uuid.UUID(new_id()),
        time.time_ns() // 1_000_000,
    )

    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before <= made.int >> 80 <= after


def test_ids_made_a_microsecond_apart_sort_by_time(monkeypatch):
    moments = iter(range(1_800_000_000_000_000_000, 1_800_000_000_002_000_000, 1_000))
    monkeypatch.setattr("dgx_music.storage.schema.time.time_ns", lambda: next(moments))
    ids = [new_id() for _ in range(2000)]

    assert ids == sorted(ids)
    assert len(set(ids)) == 2000


def test_ids_made_together_sort_in_their_order(monkeypatch):
    last_quarter = 1_800_000_000_000_999_900  # the next ones are in the next millisecond
    monkeypatch.setattr("dgx_music.storage.schema.time.time_ns", lambda: last_quarter)
    ids = new_ids(10_000)

    assert ids == sorted(ids)
    assert len(set(ids)) == 10_000
    made = [uuid.UUID(each) for each in ids]
    assert {(each.version, each.variant) for each in made} == {(7, uuid.RFC_4122)}
    milliseconds = [each.int >> 80 for each in made]
    assert (milliseconds[0], milliseconds[-1]) == (1_800_000_000_000, 1_800_000_000_003)
    assert len({each.int & (1 << 62) - 1 for each in made}) == 10_000
    assert new_ids(0) == []


@pytest.mark.parametrize(
    ("function", "on_sqlite", "on_postgresql"),
    [
        (now(), "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')", "clock_timestamp()"),
        (
            now_plus(column("seconds")),
            "(strftime('%Y-%m-%d %H:%M:%f', 'now', (seconds) || ' seconds') || '000')",
            "(clock_timestamp() + make_interval(secs => seconds))",
        ),
        (
            with_json_key(column("data"), column("name"), column("value")),
            "json_set(coalesce(data, '{}'), '$.' || name, json(value))",
            "(coalesce(data, '{}'::jsonb) || ('{' || to_json(name::text) || ':' || (value) || '}')::jsonb)",
        ),
    ],
)
def test_each_database_has_its_own_spelling(function, on_sqlite, on_postgresql):
    assert str(function.compile(dialect=sqlite.dialect())) == on_sqlite
    assert str(function.compile(dialect=postgresql.dialect())) == on_postgresql


def test_the_clock_takes_a_number_or_an_expression():
    assert str(now_plus(literal(1.0)).compile(dialect=sqlite.dialect())) == str(
        now_plus(1).compile(dialect=sqlite.dialect())
    )


def test_a_status_that_only_a_newer_version_knows_is_read_as_text():
    assert Status().process_result_value("archived", sqlite.dialect()) == "archived"
