from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from dgx_music.cli.request_options import CHANGE_OPTIONS
from tests.cli.conftest import Run, Work, add, count_rows
from tests.factories import audio_file
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("migrated")


def add_finished(seconds: float) -> str:
    """Add a completed generation with a file of this length; return its id."""
    data = audio_file(seconds)
    Path("old-1.wav").write_bytes(data)
    file = {"file_path": str(Path("old-1.wav").absolute()), "sha256": sha256(data).hexdigest()}
    (old,) = add("lofi rain", status="completed", attempt=1, **file)
    return old


def test_a_generation_is_made_again_as_the_command_says(run: Run) -> None:
    old = run("enqueue", "lofi rain", "--top-k", 9).out.strip()

    rows = run("again", old, "--seed", 7, "--duration", 60, "--count", 3, "--json").json

    assert [(row["sampling"]["seed"], row["take"]) for row in rows] == [(7, 1), (8, 2), (9, 3)]
    assert {(row["duration_seconds"], row["parent_id"]) for row in rows} == {(60, old)}
    assert {row["sampling"]["top_k"] for row in rows} == {9}


def test_the_new_ids_are_on_stdout_and_how_to_follow_them_on_stderr(run: Run) -> None:
    (old,) = add("lofi rain")

    one, two = run("again", old[:18], "--seed", "new"), run("again", old, "--count", 2)

    assert one.err == f"Enqueued; follow it with: dgx-music watch {one.out.strip()}\n"
    (batch,) = run("batches", "--json").json
    assert two.err == f"Enqueued; follow them with: dgx-music watch {batch['id']}\n"
    assert len(two.out.split()) == 2


def test_a_prompt_metadata_and_a_clip_may_be_others(run: Run) -> None:
    (old,) = add("lofi rain")
    Path("clip.wav").write_bytes(audio_file(1.0))
    words = ("--prompt", "trap", "--metadata", '{"a": 1}', "--continuation", "clip.wav")

    (row,) = run("again", old, *words, "--duration", 9, "--json").json

    assert (row["prompt"], row["metadata"], row["duration_seconds"]) == ("trap", {"a": 1}, 9)
    assert row["continuation_sha256"] is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "old"), "--seed is 'old'; use new, same, or a whole number."),
        (("--seed", "-1"), "seed is -1; use a whole number from 0 to "),
        (("--count", "17"), "count is 17; use a whole number from 1 to 16."),
        (("--duration", "301"), "duration is 301 s; use 0.08 to 300 seconds."),
        (("--metadata", "{"), "metadata is not JSON"),
    ],
)
def test_a_change_that_cannot_be_made_ends_2(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    (old,) = add("lofi rain")

    result = run("again", old, *arguments)

    assert (result.code, count_rows()) == (2, 1)
    assert result.err.startswith(f"Error: {message}")


@pytest.mark.parametrize("command", [("again",), ("continue", "--duration", "60")])
def test_what_is_not_there_ends_3(run: Run, command: tuple[str, ...]) -> None:
    assert run(*command, "0" * 36).code == 3


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(2.0, "all 2 s of the audio"), (31.5, "the last 30 of the 31.5 s of the audio")],
)
def test_with_what_the_music_starts_is_said(run: Run, seconds: float, words: str) -> None:
    result = run("continue", add_finished(seconds), "--duration", 60)

    assert result.err.endswith(f"It starts with {words}; its 60 s count from there.\n")
    assert run("show", result.out.strip(), "--json").json["duration_seconds"] == 60


def test_json_of_a_continuation_says_it_too(run: Run) -> None:
    told = run("continue", add_finished(31.5), "--duration", 60, "--json").json

    assert (told["clip_seconds"], told["parent_seconds"]) == (30, 31.5)
    assert [row["prompt"] for row in told["generations"]] == ["lofi rain"]


def test_what_has_no_audio_yet_ends_4(run: Run) -> None:
    (old,) = add("lofi rain")

    result = run("continue", old, "--duration", 60)

    assert (result.code, f"{old} is pending and has no audio" in result.err) == (4, True)


def test_show_prints_the_family(run: Run) -> None:
    (old,) = add("lofi rain")
    new = run("again", old, "--seed", 5, "--duration", 60).out.strip()

    above, below = run("show", old).out, run("show", new)

    assert f"child             {new} (pending, 60 s, seed 5)\n" in above
    assert f"parent            {old} (pending, 8 s)\n" in below.out
    assert "parent id" not in below.out
    family = run("show", new, "--json").json["family"]
    assert (family["parent"]["id"], family["is_parent_deleted"]) == (old, False)


def test_show_says_that_a_parent_is_deleted(run: Run) -> None:
    (new,) = add("lofi rain", parent_id="0" * 36)

    assert f"parent            {'0' * 36} (deleted)\n" in run("show", new).out


def test_the_help_says_no_default_that_does_not_hold(run: Run) -> None:
    assert "default" not in CHANGE_OPTIONS["duration"].__metadata__[0].help
    assert "default 0." in CHANGE_OPTIONS["priority"].__metadata__[0].help


def test_what_was_made_again_with_its_seed_sounds_the_same(run: Run, work: Work, tone: Any) -> None:
    work()
    old = run("enqueue", "lofi rain", "--duration", 1, "--wait", "--timeout", PATIENCE).out.strip()

    (new,) = run("again", old, "--seed", "same", "--json").json
    run("watch", new["id"], "--timeout", PATIENCE)

    noted = [
        run("show", each, "--json").json["metadata"]["audio"]["seed"] for each in (old, new["id"])
    ]
    assert noted[0] == noted[1] == new["sampling"]["seed"] < 2**53
