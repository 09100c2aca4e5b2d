from __future__ import annotations

from pathlib import Path

import pytest

from dgx_music.storage.schema import SCHEMA_REVISION
from tests.cli.conftest import Run, add, count_rows


def test_current_looks_without_creating_anything(run: Run) -> None:
    result = run("db", "current", "--json")

    assert result.json == {"revision": None, "head": SCHEMA_REVISION, "is_at_head": False}
    assert run("db", "current").out == "none\n"
    assert not Path("data").exists()


@pytest.mark.parametrize("command", ["init", "migrate"])
def test_init_and_migrate_bring_the_database_to_head(run: Run, command: str) -> None:
    assert run("db", command).code == 0

    assert run("db", "current").out == f"{SCHEMA_REVISION} (head)\n"
    assert "already" in run("db", command).err


def test_reset_deletes_everything_once_agreed(run: Run) -> None:
    add("lofi rain")

    assert run("db", "reset", "--yes").code == 0

    assert (count_rows(), run("db", "current").out) == (0, f"{SCHEMA_REVISION} (head)\n")


def test_reset_without_a_terminal_to_ask_on_is_refused(run: Run) -> None:
    add("lofi rain")

    result = run("db", "reset")

    assert (result.code, count_rows()) == (2, 1)
    assert "--yes" in result.err


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 2), ("", 1, 2), ("y", 0, 0)])
def test_reset_asks_on_a_terminal_and_says_how_much_is_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, left: int
) -> None:
    add("lofi rain", "trap beat")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question, err: "all 2 generations" in question and answer == "y")

    assert run("db", "reset").code == code
    assert count_rows() == left


def test_the_first_use_says_that_it_creates_the_database(run: Run) -> None:
    assert "Created the database sqlite:///data/generations.db." in run("list").err
    assert "Created" not in run("list").err
