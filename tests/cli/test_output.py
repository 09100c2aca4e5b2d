from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from dgx_music.cli import output

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s ago"),
        (59, "59 s ago"),
        (60, "1 min ago"),
        (7_199, "1 h ago"),
        (86_400, "1 d ago"),
        (-90, "in 1 min"),
    ],
)
def test_a_distance_is_told_in_its_largest_whole_unit(seconds: int, words: str) -> None:
    assert output.distance(NOW - timedelta(seconds=seconds), NOW) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_a_size_is_told_in_its_unit(count: int, words: str) -> None:
    assert output.size(count) == words


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("created_at", "2026-01-31T11:59:00+00:00", "2026-01-31 11:59:00 UTC (1 min ago)"),
        ("file_size_bytes", 2048, "2.0 KiB"),
        ("duration_seconds", 16.0, "16 s"),
        ("device_seconds", 0.1234, "0.123 s"),
        ("progress", 0.5, "50%"),
        ("sample_rate", 32_000, "32,000 Hz"),
        ("sampling", {"top_k": 250, "seed": None}, "top k 250"),
        ("sampling", {"new": 1, "seed": 7, "top_k": 250}, "top k 250, seed 7, new 1"),
        ("cancel_requested", False, "no"),
        ("peak", 0.123456789, "0.123457"),
        ("metadata", {"mood": "ruhig ☂"}, '{"mood": "ruhig ☂"}'),
    ],
)
def test_a_field_is_told_by_what_its_name_says(name: str, value: object, words: str) -> None:
    assert output.shown(name, value, NOW) == words


def test_a_table_cuts_its_last_column_to_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "24")

    output.print_table(("NUMBER", "PROMPT"), [(1, "音楽" * 20), (22, "x")], numbers=["NUMBER"])

    assert capsys.readouterr().out.splitlines() == [
        "NUMBER  PROMPT",
        "     1  音楽音楽音楽音 …",
        "    22  x",
    ]


def test_a_table_that_wraps_keeps_its_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "24")

    output.print_table(("CHECK", "DETAIL"), [("ok", "all of this is well here")], is_cut=False)

    assert capsys.readouterr().out.splitlines() == [
        "CHECK  DETAIL",
        "ok     all of this is ",
        "       well here",
    ]


def test_an_error_is_one_line_whatever_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert output.fail("first\n  second", 6) == 6
    assert capsys.readouterr().err == "Error: first second\n"


def test_a_path_beneath_this_folder_is_told_from_here(place: Path) -> None:
    assert output.near(str(place / "audio" / "a.wav")) == "audio/a.wav"
    assert output.near("/elsewhere/a.wav") == "/elsewhere/a.wav"
