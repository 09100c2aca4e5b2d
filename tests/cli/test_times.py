"""Times as people type them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from dgx_music.cli.times import local_words, read_time
from dgx_music.errors import InvalidRequestError

NOW = datetime(2026, 11, 26, 15, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time one hour before UTC in winter, two in summer, whatever this machine has."""
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    os.environ.pop("TZ")
    time.tzset()


@pytest.mark.parametrize(
    ("text", "moment", "is_local"),
    [
        ("2h", NOW - timedelta(hours=2), False),
        ("90 min", NOW - timedelta(minutes=90), False),
        ("3d ago", NOW - timedelta(days=3), False),
        ("1w", NOW - timedelta(days=7), False),
        ("today", datetime(2026, 11, 25, 23, tzinfo=UTC), True),
        ("Yesterday", datetime(2026, 11, 24, 23, tzinfo=UTC), True),
        ("2026-11-25", datetime(2026, 11, 24, 23, tzinfo=UTC), True),
        ("2026-07-01", datetime(2026, 6, 30, 22, tzinfo=UTC), True),
        ("2026-11-25 14:30", datetime(2026, 11, 25, 13, 30, tzinfo=UTC), True),
        ("2026-11-25T14:30:00Z", datetime(2026, 11, 25, 14, 30, tzinfo=UTC), False),
        ("2026-11-25T14:30:00+05:00", datetime(2026, 11, 25, 9, 30, tzinfo=UTC), False),
    ],
)
def test_a_time_is_read_in_local_time_unless_it_has_a_zone(
    text: str, moment: datetime, is_local: bool
) -> None:
    assert read_time(text, "--since", NOW) == (moment, is_local)


def test_yesterday_begins_at_midnight_also_after_the_clocks_changed() -> None:
    after_the_change = datetime(2026, 10, 25, 12, tzinfo=UTC)

    assert read_time("yesterday", "--since", after_the_change)[0] == datetime(
        2026, 10, 23, 22, tzinfo=UTC
    )
    assert read_time("today", "--since", after_the_change)[0] == datetime(
        2026, 10, 24, 22, tzinfo=UTC
    )


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "2 fortnights", "-2h", "2026-13-01", "9999999w", "0001-01-01"]
)
def test_another_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^--since is .*; use yesterday, 2h, 3d, 2026-"):
        read_time(text, "--since", NOW)


def test_a_moment_is_told_with_its_offset() -> None:
    assert local_words(NOW) == "2026-11-26 16:30 UTC+0100"
