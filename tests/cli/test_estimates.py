from __future__ import annotations

import asyncio

import pytest

from dgx_music.cli.estimates import in_words
from dgx_music.forecast import Range
from dgx_music.storage.estimates import Estimate, record_speed
from dgx_music.storage.workers import register_worker
from tests.cli.conftest import Run, add, opened_default
from tests.factories import MODEL

pytestmark = pytest.mark.usefixtures("migrated")


def start_fleet() -> None:
    """Let one worker be alive that takes 10 to 20 seconds for one of audio."""

    async def store() -> None:
        async with opened_default() as database, database.session() as session:
            one = {
                "id": "w",
                "host": "dgx",
                "pid": 1,
                "device": "cuda",
                "slots": 1,
                "lease_seconds": 60.0,
            }
            await register_worker(session, **one, model_name=MODEL, models=[MODEL])
            await record_speed(session, MODEL, "cuda", 10.0, 15.0, 20.0, 50)

    asyncio.run(store())


@pytest.mark.parametrize(
    ("starts_in", "done_in", "words"),
    [
        (Range(0.0, 0.0), Range(0.2, 0.9), "starts at once, done at once"),
        (Range(0.0, 1.0), Range(3.0, 3.0), "starts within 1 s, done in about 3 s"),
        (Range(0.4, 19.2), Range(1.9, 20.1), "starts within 20 s, done within 30 s"),
        (
            Range(21.0, 49.0),
            Range(99.0, 121.0),
            "starts in about 20 to 50 s, done in about 1 to 3 min",
        ),
        (Range(121.0, 298.0), Range(181.0, 7_201.0), "starts in about 2 to 5 min, done within 3 h"),
        (
            Range(7_200.0, 7_200.0),
            Range(7_200.0, 1e5),
            "starts in about 120 min, done in about 2 to 28 h",
        ),
        (
            Range(1e5, 1e6),
            Range(1e8, 1e9),
            "starts in about 1 to 12 d, done in about 1,157 to 11,575 d",
        ),
    ],
)
def test_a_range_is_told_in_one_unit_and_rounded_outwards(
    starts_in: Range, done_in: Range, words: str
) -> None:
    assert in_words(Estimate(status="pending", starts_in=starts_in, done_in=done_in)) == words


@pytest.mark.parametrize(("status", "what"), [("pending", "start"), ("processing", "end")])
def test_what_nobody_knows_is_told_with_the_reason(status: str, what: str) -> None:
    assert (
        in_words(Estimate(status=status, unknown_because="it rains")) == f"{what} unknown: it rains"
    )


def test_what_runs_has_an_end_and_what_is_finished_nothing() -> None:
    assert (
        in_words(Estimate(status="processing", done_in=Range(3.0, 5.0))) == "done in about 3 to 5 s"
    )
    assert in_words(Estimate(status="completed")) is None


def test_show_tells_when_a_waiting_generation_starts_and_ends(run: Run) -> None:
    start_fleet()
    *_, last = add("a", "b", "c", duration_seconds=10.0)

    result = run("show", last)

    assert "queue position    3\n" in result.out
    assert "estimate          starts in about 3 to 7 min, done in about 5 to 10 min\n" in result.out


def test_show_json_has_the_estimate_as_seconds(run: Run) -> None:
    start_fleet()
    *_, last = add("a", "b", duration_seconds=10.0)

    assert run("show", last, "--json").json["estimate"] == {
        "status": "pending",
        "position": 2,
        "starts_in_seconds": {"low": 100.0, "high": 200.0},
        "done_in_seconds": {"low": 200.0, "high": 400.0},
        "unknown_because": None,
    }


def test_show_tells_why_nobody_knows(run: Run) -> None:
    (generation_id,) = add("a")

    assert "start unknown: no worker serves musicgen-small\n" in run("show", generation_id).out
    assert run("show", generation_id, "--json").json["estimate"]["starts_in_seconds"] is None


def test_show_tells_no_estimate_of_what_is_finished(run: Run) -> None:
    (generation_id,) = add("a", status="failed")

    assert "estimate" not in run("show", generation_id).out


def test_enqueue_tells_the_place_and_the_times_on_stderr(run: Run) -> None:
    start_fleet()
    add("a", duration_seconds=30.0)

    result = run("enqueue", "lofi rain", "--duration", 6)

    assert (
        "place 2 in the queue, starts in about 5 to 10 min, done in about 6 to 12 min; follow it"
        in result.err
    )
    assert result.out.count("\n") == 1
