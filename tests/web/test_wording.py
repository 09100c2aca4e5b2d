"""The words of the page: lengths, facts, outlook, and the command for the same request."""

from __future__ import annotations

import json
import shlex

import pytest

from dgx_music.web.wording import curl_of, facts_of, outlook_of, seconds, sounds_of, status_of

ROW = {
    "prompt": "rock 'n' roll",
    "status": "processing",
    "progress": 0.42,
    "cancel_requested": False,
    "duration_seconds": 16.0,
    "model_name": "musicgen-small",
    "take": 2,
    "bpm": 137.6,
    "musical_key": "F#m",
    "tags": ["night"],
    "sampling": {"seed": "4711"},
    "estimate": {"position": 3, "done_in_seconds": None, "unknown_because": "no worker is alive"},
    "urls": {"self": "/music/v1/generations/01a2", "audio": None, "preview": None},
}


@pytest.mark.parametrize(
    ("length", "told"), [(9.5, "9.5 s"), (10.0, "10 s"), (59.96, "60 s"), (65.2, "1:05 min")]
)
def test_lengths_are_short(length, told):
    assert seconds(length) == told


def test_a_row_tells_its_facts():
    assert facts_of(ROW) == ["16 s", "musicgen-small", "take 2", "~138 BPM", "F♯m", "#night"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "running 42%"),
        ({"cancel_requested": True}, "stopping"),
        ({"status": "pending"}, "waiting"),
        ({"status": "completed"}, "done"),
    ],
)
def test_a_status_is_a_word(change, told):
    assert status_of({**ROW, **change}) == told


def test_an_outlook_is_a_place_and_a_time_or_why_none_is_known():
    known = {"position": 3, "done_in_seconds": {"low": 4.1, "high": 6.3}, "unknown_because": None}

    assert outlook_of(ROW) == "number 3 in the queue · no worker is alive"
    assert outlook_of({**ROW, "estimate": known}) == "number 3 in the queue · done in 5 to 7 s"
    assert outlook_of({**ROW, "status": "failed"}) == ""


def test_the_command_for_the_same_survives_a_shell():
    command = shlex.split(curl_of(ROW, "https://music.example/music/?show=01a2"))

    assert command[1] == "https://music.example/music/v1/generations"
    assert json.loads(command[-1]) == {
        "prompt": "rock 'n' roll",
        "model": "musicgen-small",
        "duration": 16.0,
        "seed": "4711",
    }


@pytest.mark.parametrize(
    ("urls", "links"),
    [
        ({}, []),
        ({"preview": "1/preview"}, [("1/preview", "Listen while it is made")]),
        ({"audio": "1/audio"}, [("1/audio", "Play")]),
    ],
)
def test_it_links_to_what_can_be_heard(urls: dict[str, str], links: list[tuple[str, str]]) -> None:
    assert sounds_of({"urls": {"audio": None, "preview": None} | urls}) == links
