"""Changes of many by command: it says how many, asks, and says what was refused and why."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgx_music.cli import chosen
from dgx_music.storage import Generation
from dgx_music.storage.models import Batch
from tests.cli.conftest import Run, add, count_rows, opened_default
from tests.factories import read
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("migrated")

COMMANDS = ["cancel", "retry", "delete", "star", "tag"]
MORE: dict[str, list[str]] = {"tag": ["--add", "keep"]}


def row(generation_id: str) -> Generation:
    async def work() -> Generation:
        async with opened_default() as database:
            return await read(database, generation_id)

    return asyncio.run(work())


def add_batch(batch_id: str, *prompts: str, **values: Any) -> list[str]:
    async def work() -> None:
        async with opened_default() as database, database.session() as session:
            session.add(Batch(id=batch_id))

    asyncio.run(work())
    return add(*prompts, batch_id=batch_id, **values)


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], list[str]]:
    """Returns a function that has a person on a terminal give this answer; it returns what is asked."""

    def give(is_yes: bool) -> list[str]:
        asked: list[str] = []

        def confirm(question: str, err: bool) -> bool:
            asked.append(question)
            return is_yes

        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("typer.confirm", confirm)
        return asked

    return give


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_ids_and_filters_ends_2(run: Run, command: str) -> None:
    result = run(command, *MORE.get(command, []), "--yes")
    assert (result.code, "ID is missing, and so are filters" in result.err) == (2, True)


@pytest.mark.parametrize("command", COMMANDS)
def test_ids_together_with_filters_end_2(run: Run, command: str) -> None:
    (mine,) = add("a")
    result = run(command, mine, *MORE.get(command, []), "--tenant", "x", "--yes")
    assert (result.code, "ID comes with filters" in result.err) == (2, True)


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_terminal_filters_need_yes_and_it_says_how_many_it_would_be(
    run: Run, command: str
) -> None:
    add("a", "b", tenant="label-7", status="failed")

    result = run(command, *MORE.get(command, []), "--tenant", "label-7")

    assert result.code == 2
    assert "2 generations (tenant label-7)" in result.err
    assert "--yes is missing" in result.err
    assert count_rows() == 2


def test_on_a_terminal_it_asks_and_a_no_changes_nothing(
    run: Run, answer: Callable[[bool], list[str]]
) -> None:
    mine, other = add("a", "b", tenant="label-7")
    asked = answer(False)

    assert run("cancel", "--tenant", "label-7").code == 1

    assert asked[0].startswith("Cancel 2 generations (tenant label-7) in ")
    assert (row(mine).status, row(other).status) == ("pending", "pending")


def wait_until_it_sleeps(pid: int) -> None:
    """Return once the process waits for its answer: a signal just before that read does not end it."""
    began = time.monotonic()
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "S":
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.01)


def test_the_first_ctrl_c_ends_a_question_and_changes_nothing() -> None:
    (generation_id,) = add("lofi rain")
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "dgx_music.cli", "cancel", "--status", "pending"]

    with subprocess.Popen(command, stdin=theirs, stderr=theirs, stdout=theirs) as process:
        shown = b""
        while b"[y/N]: " not in shown:
            shown += os.read(ours, 4_096)
        wait_until_it_sleeps(process.pid)
        process.send_signal(signal.SIGINT)

        assert process.wait(PATIENCE) == 130
    os.close(ours)
    os.close(theirs)
    assert row(generation_id).is_pending


def test_on_a_terminal_a_yes_changes_what_was_counted(
    run: Run, answer: Callable[[bool], list[str]]
) -> None:
    ids = add("a", "b", tenant="label-7")
    (other,) = add("c")
    answer(True)

    result = run("cancel", "--tenant", "label-7", "--json")

    assert result.json == {
        "changed": 2,
        "unchanged": 0,
        "running": 0,
        "refused_count": 0,
        "refused": [],
    }
    assert [row(each).status for each in (*ids, other)] == ["cancelled", "cancelled", "pending"]


def test_a_batch_that_is_half_completed_is_cancelled(run: Run) -> None:
    ids = add_batch("0191-wrong-batch", "a", "b")
    add("c", batch_id="0191-wrong-batch", status="completed")

    result = run("cancel", "--batch", "0191-wrong-batch", "--yes")

    assert result.code == 0
    assert "To do: cancel 3 generations (batch 0191-wrong-batch)" in result.err
    assert "Cancelled 2 generations; 1 refused." in result.err
    assert "it is completed and cannot become cancelled" in result.err
    assert [row(each).status for each in ids] == ["cancelled"] * 2


def test_if_all_that_fit_are_refused_it_ends_4(run: Run) -> None:
    add("a", "b", status="completed")
    result = run("cancel", "--status", "completed", "--yes")
    assert (result.code, "Cancelled 0 generations; 2 refused." in result.err) == (4, True)


def test_several_ids_are_changed_without_a_question_and_a_refused_one_ends_4(run: Run) -> None:
    waiting, running = *add("a"), *add("b", worker_id="worker-1")
    (done,) = add("c", status="completed")

    result = run("cancel", waiting, running, done)

    assert result.code == 4
    assert "Cancelled 2 generations; 1 of them run until their workers have stopped" in result.err
    assert f"Refused {done}: it is completed and cannot become cancelled." in result.err
    assert row(running).cancel_requested


@pytest.mark.parametrize("command", ["cancel", "star", "tag"])
def test_an_id_that_is_not_there_is_refused_and_the_others_are_changed(
    run: Run, command: str
) -> None:
    (mine,) = add("a")
    result = run(command, "no-such-generation", mine, *MORE.get(command, []), "--json")
    assert (result.code, result.json["changed"]) == (3, 1)
    assert "Refused no-such-generation: there is no such generation." in result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_one_id_that_is_not_there_ends_3(run: Run, command: str) -> None:
    result = run(command, "no-such-generation", *MORE.get(command, []))
    assert (result.code, "here is no" in result.err) == (3, True)


def test_ids_that_are_refused_for_several_reasons_end_4(run: Run) -> None:
    (done,) = add("a", status="completed")
    assert run("cancel", "no-such-generation", done).code == 4


def test_filters_that_nothing_fits_change_nothing_and_ask_nothing(run: Run) -> None:
    add("a")
    result = run("retry", "--status", "failed")
    assert (result.code, result.err) == (0, "Put back into the queue: 0 generations.\n")


def test_many_are_retried(run: Run) -> None:
    ids = add("a", "b", status="failed")
    assert run("retry", "--status", "failed", "--status", "cancelled", "--yes").code == 0
    assert [row(each).status for each in ids] == ["pending"] * 2


def test_a_star_is_given_and_taken(run: Run) -> None:
    (mine,) = add("a")
    assert "Starred 1 generation." in run("star", mine).err
    assert row(mine).is_starred
    assert "1 already so" in run("star", mine).err
    assert "Took the star from 1 generation." in run("star", "--starred", "--off", "--yes").err
    assert not row(mine).is_starred


def test_tags_are_added_and_removed(run: Run) -> None:
    (mine,) = add("a", tags=["draft"])
    assert run("tag", mine, "--add", "Keep", "--add", "rain", "--remove", "draft").code == 0
    assert row(mine).tags == ["keep", "rain"]


@pytest.mark.parametrize("options", [[], ["--add", "x", "--remove", "X"]])
def test_tags_that_say_nothing_end_2(run: Run, options: list[str]) -> None:
    (mine,) = add("a")
    assert run("tag", mine, *options).code == 2


def test_more_refusals_than_fit_on_a_page_are_counted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chosen, "_REFUSALS_SHOWN", 2)
    add(*"abcde", status="completed")
    result = run("cancel", "--status", "completed", "--yes")
    assert (result.err.count("Refused "), "3 more were refused" in result.err) == (2, True)


# Delete


def completed(folder: Path) -> tuple[str, Path]:
    (mine,) = add("a", status="completed", attempt=1)
    folder.mkdir(exist_ok=True)
    file = folder / f"{mine}-1.wav"
    file.write_text("music")
    return mine, file


def test_delete_takes_row_and_audio(run: Run, place: Path) -> None:
    mine, file = completed(place / "audio")

    result = run("delete", mine, "--output", "audio", "--yes")

    assert (result.code, file.exists(), count_rows()) == (0, False, 0)
    assert f"To do: delete generation {mine} in" in result.err
    assert "Deleted 1 generation." in result.err


def test_delete_that_was_broken_off_and_is_repeated_deletes_the_rest(run: Run, place: Path) -> None:
    (gone, _), (mine, file) = completed(place / "audio"), completed(place / "audio")
    run("delete", gone, "--output", "audio", "--yes")

    result = run("delete", gone, mine, "--output", "audio", "--yes")

    assert (result.code, file.exists(), count_rows()) == (3, False, 0)
    assert f"Refused {gone}: there is no such generation." in result.err


def test_delete_asks_also_for_an_id(run: Run, place: Path) -> None:
    mine, file = completed(place / "audio")
    result = run("delete", mine, "--output", "audio")
    assert (result.code, file.exists(), count_rows()) == (2, True, 1)
    assert f"add it to delete generation {mine} in" in result.err
    assert ", audio included" in result.err


def test_delete_refuses_what_is_running_and_names_force(run: Run) -> None:
    (mine,) = add("a", worker_id="worker-1")
    result = run("delete", mine, "--yes")
    assert (result.code, count_rows()) == (4, 1)
    assert "delete it with force" in result.err


def test_delete_with_force_gives_up_after_the_timeout(run: Run) -> None:
    (mine,) = add("a", worker_id="worker-1")
    result = run("delete", mine, "--yes", "--force", "--timeout", 0.1, "--json")
    assert (result.code, result.json["refused"][0]["status"]) == (4, "processing")
    assert row(mine).cancel_requested
