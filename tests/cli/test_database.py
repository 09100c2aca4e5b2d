from __future__ import annotations

import resource
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE
from tests.cli.conftest import Run, Spawn, add, count_rows
from tests.patience import PATIENCE


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
    monkeypatch.setattr(
        "typer.confirm", lambda question, err: "all 2 generations" in question and answer == "y"
    )

    assert run("db", "reset").code == code
    assert count_rows() == left


@pytest.fixture
def newer() -> None:
    """A database that a later version has migrated."""
    add("lofi rain")
    with closing(sqlite3.connect("data/generations.db")) as connection, connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")


@pytest.mark.usefixtures("newer")
@pytest.mark.parametrize(
    "words",
    [
        ("db", "reset", "--yes"),
        ("db", "migrate"),
        ("enqueue", "rain"),
        ("list",),
        ("worker", "--engine", "tone"),
    ],
)
def test_a_newer_schema_is_one_sentence_that_says_to_upgrade(
    run: Run, words: tuple[str, ...]
) -> None:
    result = run(*words)

    assert (result.code, len(result.err.splitlines())) == (5, 1)
    assert "9999" in result.err
    assert "; upgrade dgx-music." in result.err


@pytest.mark.usefixtures("newer")
def test_current_and_doctor_say_to_upgrade_on_a_newer_schema(run: Run) -> None:
    assert "upgrade dgx-music" in run("db", "current").err
    result = run("doctor", "--engine", "tone")
    assert (result.code, "upgrade dgx-music" in result.out) == (5, True)


@pytest.mark.parametrize("revision", ["abcdef123", "0003abc"])
@pytest.mark.parametrize("words", [("migrate",), ("reset", "--yes"), ("current",)])
def test_a_revision_that_is_none_of_ours_is_not_called_newer(
    run: Run, revision: str, words: tuple[str, ...]
) -> None:
    add("lofi rain")
    with closing(sqlite3.connect("data/generations.db")) as connection, connection:
        connection.execute(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'")

    result = run("db", *words)

    assert ("is not one of this product's" in result.err, "upgrade dgx-music" in result.err) == (
        True,
        False,
    )
    assert result.code == (0 if words == ("current",) else 5)


def test_a_backup_is_a_whole_database_of_one_file(run: Run) -> None:
    (generation_id,) = add("lofi rain")

    assert run("db", "backup", "copy.db").code == 0

    assert [path.name for path in Path().glob("copy.db*")] == ["copy.db"]
    assert run("show", generation_id, "--database-url", "sqlite:///copy.db").code == 0


@pytest.mark.parametrize(
    ("file", "words"),
    [("there", "there exists"), ("no/folder.db", "No such file"), (".", "exists")],
)
def test_a_backup_overwrites_nothing_and_leaves_nothing_half_done(
    run: Run, file: str, words: str
) -> None:
    add("lofi rain")
    Path("there").write_text("mine")
    before = set(Path().iterdir())

    result = run("db", "backup", file)

    assert (result.code, words in result.err, Path("there").read_text()) == (2, True, "mine")
    assert set(Path().iterdir()) == before


def test_a_backup_of_nothing_is_refused(run: Run) -> None:
    result = run("db", "backup", "copy.db")

    assert (result.code, "there is no such file" in result.err) == (5, True)
    assert not Path("data").exists()


def test_a_backup_of_postgresql_names_its_own_tool(run: Run) -> None:
    result = run(
        "db", "backup", "copy.dump", "--database-url", "postgresql://ada:secret@host/music"
    )

    assert (result.code, "secret" in result.err) == (2, False)
    assert "pg_dump --format=custom --file=copy.dump postgresql://ada@host/music" in result.err


def test_the_advice_of_a_backup_can_be_pasted(run: Run) -> None:
    name, url = (
        "ada's copy; $(date).dump",
        "postgresql://ada@host/ada's music?sslmode=disable&application_name=a",
    )

    command = (
        run("db", "backup", name, "--database-url", url).err.partition("`")[2].rpartition("`")[0]
    )

    words = shlex.split(command)
    assert words[:3] == ["pg_dump", "--format=custom", f"--file={name}"]
    assert (len(words), words[3].startswith("postgresql://ada@host/ada")) == (4, True)


@pytest.mark.parametrize("url", ["sqlite:///data/generations.db", "postgresql://host/music"])
def test_a_backup_into_no_name_is_said_to_be_that(run: Run, url: str) -> None:
    result = run("db", "backup", "", "--database-url", url)

    assert (result.code, "FILE is empty" in result.err) == (2, True)


@pytest.mark.parametrize("statement", ["", "CREATE TABLE theirs (id INTEGER)"])
def test_a_backup_of_what_is_not_ours_is_refused(run: Run, statement: str) -> None:
    with closing(sqlite3.connect("theirs.db")) as connection:
        connection.execute(statement)
    Path("theirs.db").touch()
    before = Path("theirs.db").read_bytes()

    result = run("db", "backup", "copy.db", "--database-url", "sqlite:///theirs.db")

    assert (result.code, "holds no tables of dgx-music" in result.err) == (5, True)
    assert ([path.name for path in Path().iterdir()], Path("theirs.db").read_bytes()) == (
        ["theirs.db"],
        before,
    )


def test_a_backup_onto_a_full_disk_does_not_blame_the_database(
    run: Run, migrated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(place: object, **options: Any) -> sqlite3.Connection:
        connection = real(place, **options)
        if "mode=ro" not in str(place):
            connection.execute("PRAGMA max_page_count = 3")
        return connection

    real: Any = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    result = run("db", "backup", "copy.db")
    assert (result.code, "generations.db" in result.err) == (7, False)
    assert "FILE copy.db cannot be written (No space left on device)" in result.err


def test_a_backup_beyond_the_limit_of_a_files_size_does_not_blame_the_database(
    spawn: Spawn, migrated: None
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))

    process = spawn("db", "backup", "copy.db", preexec_fn=limit)

    _, err = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode,
        "FILE copy.db cannot be written" in err,
        "generations.db" in err,
    ) == (7, True, False)
    assert [path.name for path in Path().iterdir()] == ["data"]


def test_the_first_use_says_that_it_creates_the_database(run: Run) -> None:
    assert "Created the database sqlite:///data/generations.db." in run("list").err
    assert "Created" not in run("list").err
