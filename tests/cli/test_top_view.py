"""The picture of ``top``: facts in, lines of text out, for each size of terminal."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from dgx_music.catalog import UNTRAINED_NOTICE
from dgx_music.cli.top_view import View, draw, share_rows
from dgx_music.forecast import Range
from dgx_music.statuses import GenerationStatus, WorkerState
from dgx_music.storage.overview import (
    ModelQueue,
    QueueEntry,
    QueueOverview,
    QueueRates,
    WorkerOverview,
)

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
SIZES = [(80, 24), (120, 40), (40, 12)]
MODEL, UNTRAINED = "musicgen-small", "musicgen-tiny-untrained"


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def worker(**changes: Any) -> WorkerOverview:
    values: dict[str, Any] = {
        "id": "dgx-4711-a1b2c3",
        "host": "dgx-one",
        "pid": 4711,
        "state": WorkerState.SERVING,
        "is_alive": True,
        "model_name": MODEL,
        "models": [MODEL],
        "device": "cuda",
        "slots": 8,
        "running_count": 2,
        "started_at": ago(99),
        "heartbeat_at": ago(1),
        "notice": None,
    }
    return WorkerOverview(**values | changes)


def entry(number: int = 0, **changes: Any) -> QueueEntry:
    values: dict[str, Any] = {
        "id": f"01a219a1-63e9-70f6-a16a-{number:012}",
        "prompt": f"lofi rain {number}",
        "model_name": MODEL,
        "duration_seconds": 16.0,
        "status": GenerationStatus.PENDING,
        "attempt": 0,
        "worker_id": None,
        "progress": 0.0,
        "cancel_requested": False,
        "run_at": ago(60),
        "started_at": None,
        **dict.fromkeys(("completed_at", "generation_time_seconds", "error_message")),
    }
    return QueueEntry(**values | changes)


def running(number: int = 0, **changes: Any) -> QueueEntry:
    values = {"status": GenerationStatus.PROCESSING, "attempt": 1, "progress": 0.42}
    held = {"worker_id": "dgx-4711-a1b2c3", "started_at": ago(12)}
    return entry(number, **values | held | changes)


def finished(number: int = 0, **changes: Any) -> QueueEntry:
    values = {"status": GenerationStatus.COMPLETED, "completed_at": ago(5)}
    return entry(number, **values | {"generation_time_seconds": 2.12} | changes)


def queue(**changes: Any) -> ModelQueue:
    values = {
        "model_name": MODEL,
        "waiting_count": 30,
        "scheduled_count": 2,
        "running_count": 2,
        "is_paused": False,
        "done_in": Range(130.0, 290.0),
        "unknown_because": None,
        "notice": None,
    }
    return ModelQueue(**values | changes)


def view(**changes: Any) -> View:
    """A view of a busy queue; the changes are of the overview, or of the view itself."""
    facts: dict[str, Any] = {
        "read_at": NOW,
        "is_paused": False,
        "workers": [worker()],
        "models": [queue()],
        "running": [running(1), running(2)],
        "waiting": [entry(number) for number in range(3, 33)],
        "finished": [finished(number) for number in range(40, 50)],
        "rates": QueueRates(
            window_seconds=300.0,
            completed_count=60,
            failed_count=3,
            completed_per_minute=12.0,
            audio_seconds_per_second=3.2,
        ),
    }
    own = {name: changes.pop(name) for name in [*changes] if name not in facts}
    overview = QueueOverview(**facts | changes)
    return View(**{"overview": overview, "now": NOW, "place": "sqlite:///music.db"} | own)


def text_of(shown: View, width: int = 120, height: int | None = 40) -> str:
    """Return the picture as a terminal of this size would show it."""
    file = io.StringIO()
    console = Console(file=file, width=width, markup=False, emoji=False, highlight=False)
    for line in draw(shown, width, height):
        console.print(line, soft_wrap=True)
    return file.getvalue()


def line_with(words: str, text: str) -> str:
    return next(line for line in text.splitlines() if words in line)


@pytest.mark.parametrize(("width", "height"), [*SIZES, (20, 4), (1, 1), (300, 100)])
@pytest.mark.parametrize("is_busy", [True, False])
def test_the_picture_fills_the_terminal_and_no_more(width: int, height: int, is_busy: bool) -> None:
    nothing: dict[str, Any] = {name: [] for name in ("workers", "models", "running", "waiting")}
    shown = view(message="m " * 300) if is_busy else view(**nothing, finished=[])
    lines = draw(shown, width, height)

    assert len(lines) == height
    assert max(cell_len(line.plain) for line in lines) <= width


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_size_shows_workers_queue_bars_and_keys(width: int, height: int) -> None:
    text = text_of(view(), width, height)

    assert all(words in text for words in ["alive", MODEL, "42%", "lofi rain", "completed"])
    assert "12 s" in line_with("42%", text)
    assert text.rstrip().endswith(("q quit",))


def test_a_worker_is_shown_with_all_that_is_asked() -> None:
    line = line_with("alive", text_of(view(), 80, 24))

    assert line.split() == f"alive …a1b2c3 2 of 8 {MODEL} 1 s ago cuda dgx-one".split()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"state": WorkerState.LOADING}, "loading"),
        ({"is_alive": False}, "silent"),
        ({"models": [MODEL, UNTRAINED]}, "musicgen-small +1"),
        ({"notice": UNTRAINED_NOTICE}, UNTRAINED_NOTICE),
    ],
)
def test_a_workers_state_is_one_word(changes: dict[str, Any], word: str) -> None:
    assert word in line_with("…a1b2c3", text_of(view(workers=[worker(**changes)])))


def test_without_a_worker_it_says_how_to_start_one() -> None:
    assert "start one with: dgx-music worker" in text_of(view(workers=[]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "30    2      2  in about 2 to 5 min"),
        ({"is_paused": True}, "paused"),
        ({"done_in": None, "unknown_because": "no worker serves it"}, "no worker serves it"),
        ({"notice": UNTRAINED_NOTICE}, f"in about 2 to 5 min · {UNTRAINED_NOTICE}"),
        (
            {"done_in": None, "unknown_because": "who knows", "notice": UNTRAINED_NOTICE},
            f"{UNTRAINED_NOTICE} · who knows",
        ),
        (
            dict.fromkeys(("waiting_count", "scheduled_count", "running_count"), 0)
            | {"done_in": None},
            "nothing to do",
        ),
        (
            {"waiting_count": 1, "running_count": 0, "scheduled_count": 1, "done_in": None},
            "nothing is due yet",
        ),
    ],
)
def test_a_models_queue_says_when_it_is_done(changes: dict[str, Any], words: str) -> None:
    shown = view(workers=[], running=[], waiting=[], finished=[], models=[queue(**changes)])

    assert words in line_with(MODEL, text_of(shown))


def test_the_summary_counts_and_rates() -> None:
    words = "2 running · 30 waiting, 2 of them later · 12.0 completed/min · 3.2 s of audio/s"

    assert f"{words} · 3 failed in 5 min" in text_of(view())


def test_a_pause_of_everything_is_said_first() -> None:
    assert "EVERYTHING IS PAUSED · 2 running" in text_of(view(is_paused=True), 40, 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ["waiting", "1 min"]),
        ({"run_at": ago(-7_200)}, ["scheduled", "in 2 h"]),
        ({"run_at": ago(-30), "attempt": 1}, ["retry", "in 30 s"]),
    ],
)
def test_what_waits_says_for_how_long(changes: dict[str, Any], words: list[str]) -> None:
    line = line_with("lofi rain 3", text_of(view(waiting=[entry(3, **changes)])))

    assert all(word in line for word in words)


def test_one_that_is_being_cancelled_says_so() -> None:
    shown = view(running=[running(1, cancel_requested=True)])

    assert "cancelling" in line_with("lofi rain 1", text_of(shown))


def test_a_finished_one_shows_length_run_time_and_age() -> None:
    line = line_with("lofi rain 40", text_of(view()))

    assert line.split() == [
        "completed",
        "…000040",
        "5",
        "s",
        "ago",
        "16",
        "s",
        "2.1",
        "s",
        "lofi",
        "rain",
        "40",
    ]


def test_a_failed_one_shows_why() -> None:
    failed = {"status": GenerationStatus.FAILED, "error_message": "out of\nmemory"}

    assert "lofi rain 40 · out of memory" in text_of(view(finished=[finished(40, **failed)]))


def test_an_empty_prompt_says_what_it_means() -> None:
    assert "(unconditional)" in text_of(view(running=[running(prompt="")]))


EVIL = "a\x1b[2Jb\x07c\u202ed\x9be\u2066f\r\ng [red]h"


@pytest.mark.parametrize("place", ["running", "waiting", "finished", "question", "message"])
def test_no_text_of_people_reaches_the_terminal_as_commands(place: str) -> None:
    maker = {"running": running, "waiting": entry, "finished": finished}.get(place)
    shown = view(**{place: EVIL if maker is None else [maker(0, prompt=EVIL)]})

    text = text_of(shown, 200, 40)

    assert "a\\x1b[2Jb\\x07c\\u202ed\\x9be\\u2066f g [red]h" in text
    assert {*"\x1b\x07\u202e\x9b\u2066\r"} & {*text} == set()


def test_names_of_machines_and_errors_are_cleaned_too() -> None:
    evil: dict[str, Any] = {"host": EVIL, "device": EVIL, "model_name": EVIL, "id": EVIL}
    failed = {"status": GenerationStatus.FAILED, "error_message": EVIL}
    shown = view(
        workers=[worker(**evil)],
        models=[queue(model_name=EVIL, done_in=None, unknown_because=EVIL)],
        running=[running(model_name=EVIL, worker_id=EVIL)],
        finished=[finished(**failed)],
        trouble=EVIL,
        place=EVIL,
        chosen_id=running().id,
    )

    assert {*"\x1b\x07\u202e\x9b\u2066\r"} & {*text_of(shown, 400)} == set()


def test_wide_characters_do_not_move_what_stands_beside_them() -> None:
    shown = view(running=[running(1, prompt="春の雨 " * 30)])

    assert max(cell_len(line.plain) for line in draw(shown, 80, 24)) <= 80
    assert "春の雨" in text_of(shown, 80, 24)


@pytest.mark.parametrize("number", [1, 2, 3, 20, 32])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_chosen_one_is_always_seen(width: int, height: int, number: int) -> None:
    text = text_of(view(chosen_id=entry(number).id), width, height)

    assert f"> …{number:06}" in text


def test_a_list_that_is_cut_says_which_part_is_seen() -> None:
    assert "PROMPT 15-24/32" in text_of(view(chosen_id=entry(20).id), 80, 24)


def test_how_many_are_finished_is_not_counted() -> None:
    assert line_with("FINISHED", text_of(view(), 80, 24)).rstrip().endswith("PROMPT")


def test_the_keys_say_what_a_pause_would_pause() -> None:
    assert "p pause, r resume all" in text_of(view())
    assert f"p pause, r resume {MODEL}" in text_of(view(chosen_id=entry(20).id))


def test_a_question_stands_in_the_place_of_the_keys() -> None:
    text = text_of(view(question="Cancel …000003? y/n"), 40, 12)

    assert text.splitlines()[-1] == "Cancel …000003? y/n"
    assert "quit" not in text


def test_trouble_is_told_without_passwords() -> None:
    text = text_of(view(trouble="postgresql://ann:hunter2@dgx/music cannot be used."), 80, 24)

    assert ("cannot be used." in text, "hunter2" in text) == (True, False)


def test_without_a_keyboard_it_says_so() -> None:
    assert "Keys cannot be read here; Ctrl-C ends it." in text_of(view(has_keys=False), 80, 24)


def test_without_a_height_everything_is_there_and_no_keys() -> None:
    text = text_of(view(), 10_000, None)

    assert all(f"lofi rain {number}\n" in text for number in [*range(1, 33), *range(40, 50)])
    assert "quit" not in text


def test_times_go_on_between_two_looks() -> None:
    later = replace(view(), now=ago(-8))

    assert "20 s" in line_with("lofi rain 1", text_of(later))


@pytest.mark.parametrize(
    ("room", "wants", "given"),
    [
        (None, [9, 9], [9, 9]),
        (0, [9, 9], [0, 0]),
        (2, [9, 9], [1, 0]),
        (5, [9, 9], [2, 1]),
        (8, [9, 9], [4, 2]),
        (100, [3, 1], [3, 1]),
    ],
)
def test_rows_are_shared_and_the_first_section_gets_most(
    room: int | None, wants: list[int], given: list[int]
) -> None:
    assert share_rows(room, wants) == given
