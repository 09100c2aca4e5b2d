from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from dgx_music.cli.batch_progress import board, in_words
from dgx_music.forecast import Range
from dgx_music.storage.batch_progress import BatchProgress
from tests.cli.conftest import Run, Work, add, count_rows
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("migrated")

NONE = dict.fromkeys(("pending", "processing", "completed", "failed", "cancelled"), 0)


def batch(done_in: Range | None = None, unknown: str | None = None, **counts: int) -> BatchProgress:
    now: Any = None
    return BatchProgress("id", "monday", now, NONE | counts, done_in, unknown)


def write_prompts(*lines: str, name: str = "prompts.txt") -> str:
    Path(name).write_text("".join(f"{line}\n" for line in lines))
    return name


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (batch(pending=2), "0 of 2"),
        (
            batch(Range(700.0, 720.0), pending=13, completed=36, failed=1),
            "37 of 50, 1 failed, about 11 to 12 min left",
        ),
        (batch(Range(0.0, 8.0), processing=1), "0 of 1, at most 8 s left"),
        (batch(Range(0.0, 0.5), processing=1, completed=1), "1 of 2, almost done"),
        (batch(Range(0.0, 0.5), processing=1), "0 of 1"),
        (batch(Range(0.0, 0.5), pending=1, completed=1), "1 of 2"),
        (
            batch(unknown="x is paused", pending=1, failed=1, cancelled=2),
            "3 of 4, 1 failed, 2 cancelled, end unknown: x is paused",
        ),
        (batch(completed=2_000), "2,000 of 2,000"),
    ],
)
def test_how_far_a_batch_is_takes_a_few_words(state: BatchProgress, words: str) -> None:
    assert in_words(state) == words


def test_a_file_is_a_batch_of_its_name(run: Run) -> None:
    write_prompts("a", "b")
    result = run("enqueue", "--file", "prompts.txt")

    (found,) = run("batches", "--json").json
    assert (found["name"], found["total"], found["finished"]) == ("prompts.txt", 2, 0)
    assert f"2 generations enqueued; follow them with: dgx-music watch {found['id']}" in result.err


@pytest.mark.parametrize("is_file", [True, False])
def test_a_batch_may_be_given_a_name(run: Run, is_file: bool) -> None:
    write_prompts("a")

    run("enqueue", *(["--file", "prompts.txt"] if is_file else ["a"]), "--batch", "monday")

    listed = run("batches", "--json").json
    assert [each["name"] for each in listed] == ["monday"]
    assert run("batches", "--page").json == {"batches": listed, "next": None}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a\nb.txt", "a b.txt"),
        ("\u200b.txt", "\u200b.txt"),
        (b"\xff.txt", "\ufffd.txt"),
        (" ", None),
    ],
)
def test_whatever_a_file_is_called_its_prompts_are_enqueued(
    run: Run, file: str | bytes, name: str | None
) -> None:
    file = os.fsdecode(file)
    Path(file).write_text("a\n")

    assert run("enqueue", "--file", file).code == 0
    assert [each["name"] for each in run("batches", "--json").json] == [name]


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb"])
def test_a_name_that_is_none_ends_2_and_stores_nothing(run: Run, name: str) -> None:
    result = run("enqueue", "a", "--batch", name)

    assert (result.code, result.err.startswith("Error: batch "), count_rows()) == (2, True, 0)


def test_takes_are_printed_and_are_a_batch(run: Run) -> None:
    result = run("enqueue", "lofi rain", "--variations", 3, "--seed", 7, "--json")

    assert [(row["take"], row["sampling"]["seed"]) for row in result.json] == [
        (1, 7),
        (2, 8),
        (3, 9),
    ]
    (found,) = run("batches", "--json").json
    assert {row["batch_id"] for row in result.json} == {found["id"]}
    assert f"watch {found['id']}" in result.err


def test_takes_for_one_audio_file_are_refused(run: Run) -> None:
    result = run("enqueue", "a", "--variations", 2, "--out", "a.wav")

    assert (result.code, "there are 2 generations" in result.err, count_rows()) == (2, True, 0)


def test_one_prompt_alone_is_no_batch(run: Run) -> None:
    run("enqueue", "a")

    result = run("batches")
    assert (result.code, result.out) == (0, "")
    assert "There are no batches yet" in result.err


def test_batches_are_a_table_page_by_page(run: Run) -> None:
    for name in ("monday", "tuesday", "friday"):
        run("enqueue", "a", "--batch", name)

    first = run("batches", "--limit", 2)
    rest = run("batches", "--after", first.err.split()[-1])

    assert [line.split()[-1] for line in first.out.splitlines()] == ["NAME", "friday", "tuesday"]
    assert "0 of 1" in first.out
    assert [line.split()[-1] for line in rest.out.splitlines()] == ["NAME", "monday"]


# comments


def test_a_line_that_begins_with_a_hash_and_a_space_is_a_comment(run: Run) -> None:
    write_prompts(
        "# pads", "#", "#trap beat", "  # more", "a # b", "# ", "#\tnot", '{"prompt": "c"}'
    )

    rows = run("enqueue", "--file", "prompts.txt", "--json").json

    assert [row["prompt"] for row in rows] == ["#", "#trap beat", "# more", "a # b", "#\tnot", "c"]


def test_comments_count_as_lines_and_json_lines_have_all_options(run: Run) -> None:
    line = '{"prompt": "a", "variations": 2, "seed": 5, "tenant": "t", "priority": 3}'
    write_prompts("# first", line, name="a.jsonl")
    write_prompts("# first", line, '{"prompt": "b", "variations": 17}', name="b.jsonl")

    rows = run("enqueue", "--file", "a.jsonl", "--json").json

    assert [(row["take"], row["tenant"], row["priority"]) for row in rows] == [
        (1, "t", 3),
        (2, "t", 3),
    ]
    assert run("enqueue", "--file", "b.jsonl").err.startswith("Error: line 3: variations is 17")


def test_a_file_of_comments_holds_no_prompts(run: Run) -> None:
    write_prompts("# a", "")

    assert run("enqueue", "--file", "prompts.txt").code == 2


# names


def test_a_whole_name_means_more_than_a_part_of_an_id(run: Run) -> None:
    (stranger,) = add("a stranger")
    name = stranger[-6:]
    run("enqueue", "--file", write_prompts("a"), "--batch", name)

    (found,) = [each for each in run("batches", "--json").json if each["name"] == name]
    assert run("watch", name, "--timeout", 0.1, "--json").json["id"] == found["id"]


def test_an_id_means_more_than_a_name(run: Run) -> None:
    run("enqueue", "--file", write_prompts("a"), "--batch", "first")
    (first,) = run("batches", "--json").json
    run("enqueue", "--file", write_prompts("b", "c"), "--batch", first["id"])

    assert [row["prompt"] for row in run("list", "--batch", first["id"], "--json").json] == ["a"]


# watching


@pytest.fixture
def monday(run: Run) -> dict[str, Any]:
    """A batch of two, one of them cancelled."""
    write_prompts("a", "b")
    rows = run("enqueue", "--file", "prompts.txt", "--batch", "Monday, first", "--json").json
    run("cancel", rows[0]["id"])
    (found,) = run("batches", "--json").json
    return {"id": found["id"], "rest": rows[1]["id"]}


def test_a_finished_batch_with_a_cancelled_one_ends_1(run: Run, monday: dict[str, str]) -> None:
    run("cancel", monday["rest"])

    for wanted in (monday["id"], monday["id"][-6:], monday["id"].upper(), "Monday, first"):
        result = run("watch", wanted)
        assert (result.code, result.err) == (1, "2 of 2, 2 cancelled\n0 of 2 completed.\n")


def test_a_batch_that_takes_too_long_ends_124_and_goes_on(run: Run, monday: dict[str, str]) -> None:
    result = run("watch", monday["id"], "--timeout", 0.1)

    assert result.code == 124
    assert "is not finished after 0.1 s (1 of 2, 1 cancelled, end unknown" in result.err
    assert result.err.endswith("; it goes on.\n")


def test_json_of_a_batch_is_a_line_for_each_change(run: Run, monday: dict[str, str]) -> None:
    run("cancel", monday["rest"])

    result = run("watch", monday["id"], "--json")

    assert (result.code, result.out.count("\n"), result.err) == (1, 1, "")
    assert (result.json["finished"], result.json["counts"]["cancelled"]) == (2, 2)


def test_a_name_of_several_batches_is_refused_with_what_tells_them_apart(run: Run) -> None:
    for _ in range(2):
        run("enqueue", "a", "--batch", "monday")
    newest = run("batches", "--json").json[0]["id"]

    result = run("cancel", "--batch", "monday", "--yes")

    assert (result.code, "'monday' fits more than one" in result.err) == (2, True)
    assert re.search(rf"\({newest}: \d+ s ago, 0 of 1; ", result.err)


def test_watch_follows_the_newest_batch_of_a_name_and_says_so(run: Run) -> None:
    for _ in range(2):
        run("enqueue", "a", "--batch", "monday")
    newest, _ = run("batches", "--json").json
    run("cancel", "--batch", newest["id"], "--yes")

    result = run("watch", "monday", "--timeout", 5)

    assert (result.code, "0 of 1 completed." in result.err) == (1, True)
    assert f"Several batches are called 'monday'; this is the newest, {newest['id']}" in result.err


def test_what_is_neither_a_generation_nor_a_batch_ends_3(run: Run) -> None:
    result = run("watch", "monday")

    assert (result.code, "no generation or batch 'monday'" in result.err) == (3, True)


def test_only_counts_that_changed_are_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with board() as show:
        for state in (
            batch(Range(1, 9), pending=2),
            batch(Range(1, 8), pending=2),
            batch(failed=2),
        ):
            show(state)

    assert capsys.readouterr().err == "0 of 2, at most 9 s left\n2 of 2, 2 failed\n".replace(
        "at most", "about 1 to"
    )


def test_on_a_terminal_a_batch_has_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    with board() as show:
        show(batch(pending=1, completed=1))

    assert "monday" in (seen := capsys.readouterr().err)
    assert "1 of 2" in seen


def test_a_batch_that_is_made_ends_0(work: Work, run: Run, tone: Any) -> None:
    write_prompts("a", "b")
    run("enqueue", "--file", "prompts.txt", "--duration", 1)
    work()

    result = run("watch", "prompts.txt", "--timeout", PATIENCE)

    assert (result.code, result.err.splitlines()[-1]) == (0, "2 of 2 completed.")


def test_a_batch_is_a_filter_by_its_id_and_by_its_name(run: Run, monday: dict[str, str]) -> None:
    add("another")

    for wanted in (monday["id"], monday["id"][-6:], "Monday, first"):
        rows = run("list", "--batch", wanted, "--json").json
        assert sorted(row["prompt"] for row in rows) == ["a", "b"]
    assert run("list", "--batch", "tuesday").code == 3


def test_a_cursor_that_is_none_is_refused(run: Run) -> None:
    result = run("batches", "--after", "zzz")

    assert (result.code, "after is not a page's cursor" in result.err) == (2, True)


def test_a_name_of_two_batches_asks_for_an_id(run: Run) -> None:
    for _ in range(2):
        run("enqueue", "--file", write_prompts("a"), "--batch", "daily")

    assert "give one of the ids (" in run("list", "--batch", "daily").err
