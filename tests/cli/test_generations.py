from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dgx_music.client.requests import RequestOptions
from tests.cli.conftest import Run, add

pytestmark = pytest.mark.usefixtures("migrated")

COMMANDS_ON_ONE = ["show", "watch", "cancel", "retry"]


def test_list_json_is_an_array_of_rows_newest_first(run: Run) -> None:
    first, second = add("lofi rain", "trap beat")

    rows = run("list", "--json").json

    assert [row["id"] for row in rows] == [second, first]
    assert {"prompt", "status", "metadata", "file_path", "attempt"} <= rows[0].keys()


def test_list_prints_whole_ids_and_no_escapes_into_a_pipe(run: Run) -> None:
    (generation_id,) = add("[bold]lofi[/bold] :cat: " + "x" * 300)

    result = run("list")

    assert generation_id in result.out
    assert "[bold]lofi[/bold] :cat: " + "x" * 300 in result.out
    assert "\x1b" not in result.out + result.err


@pytest.mark.parametrize("columns", [1, 20, 80])
def test_list_survives_a_narrow_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (generation_id,) = add("lofi rain " * 20)

    result = run("list")

    assert result.code == 0
    assert generation_id[-4:] in result.out
    assert len(result.out.splitlines()) == 2


def test_list_takes_limit_offset_and_status_and_says_what_it_left_out(run: Run) -> None:
    oldest, *_ = add("a", "b", "c")
    add("d", status="failed")

    result = run("list", "--json", "--status", "pending", "--limit", 1, "--offset", 2)

    assert [row["id"] for row in result.json] == [oldest]
    assert "1 of 3" in result.err


def test_an_empty_list_says_what_to_type(run: Run) -> None:
    result = run("list")

    assert (result.code, result.out) == (0, "")
    assert "dgx-music enqueue" in result.err
    assert run("list", "--json").json == []


@pytest.mark.parametrize(
    "arguments", [["--status", "done"], ["--limit", "-1"], ["--offset", "-1"], ["--limit", "x"]]
)
def test_a_bad_page_ends_2(run: Run, arguments: list[str]) -> None:
    result = run("list", *arguments)

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)


def test_show_json_has_the_row_its_attempts_and_its_place(run: Run) -> None:
    _, second = add("lofi rain", "trap beat")

    shown = run("show", second, "--json").json

    assert (shown["prompt"], shown["attempts"], shown["queue_position"]) == ("trap beat", [], 2)


def test_show_prints_every_field_that_has_a_value(run: Run) -> None:
    told = {
        "error_message": "out of\nmemory",
        "metadata": {"mood": "calm"},
        "sampling": {"top_k": 10, "seed": None},
    }
    (generation_id,) = add("lofi rain", status="failed", **told)

    result = run("show", generation_id)

    assert generation_id in result.out
    assert "top k 10\n" in result.out
    assert "error message     out of\n                  memory\n" in result.out
    assert '"calm"' in result.out


def test_show_draws_the_waveform(run: Run) -> None:
    facts = {"loudness_lufs": -14.0, "waveform": [0.0, 0.5, 1.0], "duration_seconds": 3.0}
    (generation_id,) = add(
        "x", status="completed", metadata={"audio": facts}, generation_time_seconds=1.5, attempt=1
    )

    result = run("show", generation_id)

    assert "▁▅█" in result.out
    assert result.out.index("audio duration") < result.out.index("audio loudness")
    assert "waveform" not in result.out


@pytest.mark.parametrize("command", COMMANDS_ON_ONE)
def test_an_unknown_id_ends_3(run: Run, command: str) -> None:
    result = run(command, "01a2021d-nope")

    assert (result.code, result.out) == (3, "")
    assert re.search(r"There is no generation (or batch )?'01a2021d-nope'", result.err)


@pytest.mark.parametrize("command", COMMANDS_ON_ONE)
@pytest.mark.parametrize("given", ["", "\udc80", "a\nb", "x" * 500])
def test_an_id_that_cannot_be_one_ends_2(run: Run, command: str, given: str) -> None:
    assert run(command, given).code == 2


def test_any_part_of_an_id_is_enough(run: Run) -> None:
    (generation_id,) = add("lofi rain")

    for part in (generation_id[:18].upper(), generation_id[-4:], generation_id[20:27], "-"):
        assert run("show", part, "--json").json["id"] == generation_id


def test_a_short_part_of_an_id_must_be_in_no_other_one(run: Run) -> None:
    add("a", id="aaaa-1111-bbb7")
    add("b", id="7bbb-2222-ccc8")

    assert run("show", "8", "--json").json["prompt"] == "b"
    assert run("show", "111", "--json").json["prompt"] == "a"
    result = run("cancel", "7")
    assert result.code == 2
    assert (
        "ID '7' fits more than one; give more of it (aaaa-1111-bbb7, 7bbb-2222-ccc8)." in result.err
    )


def test_the_end_of_an_id_means_more_than_its_start_or_middle(run: Run) -> None:
    add("a", id="aaaa-1111-bbbb")
    add("b", id="bbbb-aaaa-cccc")

    assert run("show", "bbbb", "--json").json["prompt"] == "a"
    assert run("show", "aaaa", "--json").json["prompt"] == "a"
    assert run("show", "cccc", "--json").json["prompt"] == "b"


def test_first_characters_that_fit_two_ids_are_refused(run: Run) -> None:
    add("a", id="aaaaaaaa-1")
    add("b", id="aaaaaaaa-2")

    result = run("cancel", "aaaaaaaa")

    assert (result.code, "more than one" in result.err) == (2, True)
    assert run("show", "aaaaaaaa-1", "--json").json["status"] == "pending"


def test_a_pending_generation_is_cancelled_at_once_and_retry_revives_it(run: Run) -> None:
    (generation_id,) = add("lofi rain")

    assert "is cancelled" in run("cancel", generation_id).err
    assert run("retry", generation_id, "--json").json["status"] == "pending"


def test_a_running_generation_is_asked_to_stop(run: Run) -> None:
    (generation_id,) = add("lofi rain", status="processing", attempt=1)

    assert run("cancel", generation_id, "--json").json["cancel_requested"] is True
    assert "has been asked to stop" in run("cancel", generation_id).err


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("cancel", "completed"),
        ("cancel", "failed"),
        ("retry", "pending"),
        ("retry", "processing"),
        ("retry", "completed"),
    ],
)
def test_a_status_that_does_not_allow_it_ends_4_and_names_both(
    run: Run, command: str, status: str
) -> None:
    (generation_id,) = add("lofi rain", status=status)

    result = run(command, generation_id)

    assert result.code == 4
    assert (
        f"is {status} and cannot become {'cancelled' if command == 'cancel' else 'pending'}"
        in result.err
    )


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("failed", 1), ("cancelled", 1)])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_watch_ends_by_what_became_of_it(
    run: Run, status: str, code: int, options: list[str]
) -> None:
    (generation_id,) = add("lofi rain", status=status)

    result = run("watch", generation_id, *options)

    assert result.code == code
    assert status in (result.out if options else result.err)


def test_watch_gives_up_after_its_timeout(run: Run) -> None:
    (generation_id,) = add("lofi rain")

    result = run("watch", generation_id, "--timeout", 0.1, "--json")

    assert result.code == 124
    assert json.loads(result.out)["status"] == "pending"


def test_stats_json_is_the_seeds_statistics(run: Run) -> None:
    add("a", "b")
    add("a", status="cancelled")

    assert run("stats", "--json").json == {
        "total_generations": 3,
        "pending_generations": 2,
        "processing_generations": 0,
        "completed_generations": 0,
        "failed_generations": 0,
        "cancelled_generations": 1,
        "total_prompts": 0,
    }
    assert "cancelled generations   1" in run("stats").out


def test_prompts_are_listed_most_used_first(run: Run) -> None:
    for prompt in ("lofi rain", "trap beat", "trap beat"):
        run("enqueue", prompt)

    assert [(row["text"], row["used_count"]) for row in run("prompts", "--json").json] == [
        ("trap beat", 2),
        ("lofi rain", 1),
    ]
    assert "trap beat" in run("prompts", "--limit", 1).out


def test_workers_says_where_there_are_none(run: Run) -> None:
    assert "No worker is running" in run("workers").err
    assert run("workers", "--json").json == []


def test_every_option_of_a_request_is_an_option_of_enqueue(run: Run) -> None:
    text = run("enqueue", "--help").out

    assert [
        name for name in RequestOptions.__annotations__ if f"--{name.replace('_', '-')}" not in text
    ] == []


def test_another_database_can_be_named(run: Run) -> None:
    generation_id = run("enqueue", "x", "--database-url", "sqlite:///other.db").out.strip()

    assert run("show", generation_id).code == 3
    assert run("show", generation_id, "--database-url", "sqlite:///other.db").code == 0
    assert Path("other.db").exists()


@pytest.mark.parametrize("command", ["list", "show"])
def test_noise_is_called_noise_wherever_it_is_looked_at(run, command):
    generation_id = run("enqueue", "rain", "--model", "musicgen-tiny-untrained").out.strip()
    shown = run(*([command] if command == "list" else [command, generation_id]))
    assert "noise" in shown.err


def test_a_whole_id_is_looked_up_and_not_searched_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (generation_id,) = add("lofi rain")
    monkeypatch.delattr("dgx_music.cli.opening.find_generation_ids")

    assert run("show", generation_id, "--json").json["id"] == generation_id
