from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dgx_music
from dgx_music.cli import COMMANDS as LAZY
from dgx_music.cli import _explain, main
from dgx_music.cli.lazy import LazyCommand
from dgx_music.errors import DatabaseUnavailableError, EngineUnavailableError, unwrap
from tests.cli.conftest import Run, Spawn, add

COMMANDS = [*LAZY, "db init", "db migrate", "db reset", "db current"]
COMMANDS += ["token create", "token list", "token revoke"]
HEAVY = (
    "torch",
    "transformers",
    "alembic",
    "scipy",
    "pyloudnorm",
    "numpy",
    "soundfile",
    "soxr",
    "fastapi",
)
HEAVY += (
    "sqlalchemy",
    "pydantic",
    "pydantic_core",
    "httpx",
    "asyncpg",
    "psycopg",
    "aiosqlite",
    "obstore",
    "anyio",
)
LOADED = "import sys, json; from dgx_music.cli import main; code = main({}); print(json.dumps([*sys.modules]))"


HELPS = f"""
import json, sys
from dgx_music.cli import main
loaded = {{{{}}}}
for arguments in {{}}:
    main(arguments)
    if found := [name for name in {HEAVY} if name in sys.modules]:
        loaded[" ".join(arguments)] = found
print(json.dumps(loaded))
"""


def loaded_after(program: str) -> Any:
    """Return what a program prints as its last line, which is JSON."""
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.splitlines()[-1])


def loaded_by(*arguments: str) -> list[str]:
    """Return which of the heavy packages a command imports."""
    loaded = loaded_after(LOADED.format([*arguments]))
    return [name for name in HEAVY if name in loaded]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    assert loaded_by(option) == []


def test_a_commands_help_imports_nothing_heavy() -> None:
    commands = [[*command.split(), "--help"] for command in (*LAZY, "db reset", "db backup")]

    assert loaded_after(HELPS.format(commands)) == {}


@pytest.mark.usefixtures("migrated")
@pytest.mark.parametrize("command", ["list", "stats", "prompts"])
def test_looking_at_the_database_imports_only_its_driver(command: str) -> None:
    assert {*loaded_by(command)} <= {"sqlalchemy", "aiosqlite", "anyio"}


@pytest.mark.parametrize(("name", "about"), LAZY.items())
def test_the_list_of_commands_says_what_each_command_says(
    name: str, about: tuple[str, str, str]
) -> None:
    command = LazyCommand(name, *about).load()

    assert command.help.partition("\n\n")[0].replace("\n", " ") == about[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    result = run(*command.split(), "--help")

    assert (result.code, result.err) == (0, "")
    assert f"dgx-music {command}" in result.out


@pytest.mark.parametrize("command", LAZY)
def test_the_help_of_a_command_breaks_no_paragraph(command: str) -> None:
    text = LazyCommand(command, *LAZY[command]).load().help

    broken = [line for part in text.split("\n\n") for line in part.split("\n")[1:]]
    assert [line for line in broken if not line.startswith("dgx-music ")] == []


def test_help_documents_the_exit_codes(run: Run) -> None:
    text = " ".join(run("--help").out.split())

    assert "3 no such generation" in text
    assert "124 timeout" in text
    assert "answered with no, packages are missing (doctor), or an unexpected error · 2 bad" in text


def test_nothing_to_do_prints_the_help_and_ends_2(run: Run) -> None:
    result = run()

    assert result.code == 2
    assert "enqueue" in result.out


def test_version(run: Run) -> None:
    assert run("--version").out == f"dgx-music {dgx_music.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["list", "--bogus"], ["db", "frobnicate"], ["show"]]
)
def test_a_usage_error_ends_2_with_one_sentence(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)

    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("Error: ")
    assert "--help`" in result.err


@pytest.mark.parametrize(
    "url",
    [
        "mysql://ann:hunter2@host/db",
        "postgresql://ann:hunter2@host",
        "postgresql://ann:hunter2@host:port/db",
        "postgresql+psycopg2://ann:hunter2@host/db",
        "postgresql://ann:hunter2@host/db?verify=yes",
        "ann:hunter2@host",
        "sqlite://ann:hunter2@host/db",
        "",
    ],
)
@pytest.mark.parametrize("command", ["list", "doctor", "worker", "db current", "db init"])
def test_a_bad_database_url_is_named_and_its_password_never_printed(
    run: Run, command: str, url: str
) -> None:
    result = run(*command.split(), "--database-url", url)

    assert result.code == 2
    assert "DGX_MUSIC_DATABASE_URL" in result.out + result.err
    assert "hunter2" not in result.out + result.err


@pytest.mark.parametrize("driver", ["", "+asyncpg", "+psycopg"])
@pytest.mark.parametrize(
    "command", ["list", "doctor", "worker --engine tone", "db current", "db init"]
)
def test_a_server_that_is_not_there_ends_5_and_its_password_is_never_printed(
    run: Run, command: str, driver: str
) -> None:
    result = run(
        *command.split(), "--database-url", f"postgresql{driver}://ann:hunter2@127.0.0.1:1/db"
    )

    assert result.code == 5
    assert "127.0.0.1:1/db cannot be used" in result.out + result.err
    assert "hunter2" not in result.out + result.err


WARNED = (
    "Warning: every user of this machine can read the password in {}, in `ps`; set {} instead.\n"
)


@pytest.mark.parametrize("option", ["--database-url", "--replica-url"])
def test_a_password_among_the_arguments_is_warned_of(run: Run, option: str) -> None:
    result = run(
        "worker", option, "postgresql://ann:hunter2@127.0.0.1:1/db", "--lease-seconds", "never"
    )

    variable = f"DGX_MUSIC_{option[2:].upper().replace('-', '_')}"
    assert result.err.startswith(WARNED.format(option, variable))
    assert "hunter2" not in result.err


@pytest.mark.parametrize(
    "url",
    ["postgresql://ann@127.0.0.1:1/db", "postgresql:///db?host=/run/pg", "sqlite:///a:b@c.db"],
)
def test_a_url_without_a_password_is_not_warned_of(run: Run, url: str) -> None:
    assert "Warning" not in run("list", "--database-url", url).err


def test_a_password_of_the_environment_is_not_warned_of(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", "postgresql://ann:hunter2@127.0.0.1:1/db")

    assert "Warning" not in run("list").err


@pytest.mark.parametrize(
    ("setting", "value", "remedy"),
    [
        ("SLOTS", "many", "auto or a whole number from 1 to 256"),
        ("KERNELS", "true", "one of auto, off"),
    ],
)
def test_a_wrong_setting_of_the_environment_ends_2_and_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, setting: str, value: str, remedy: str
) -> None:
    monkeypatch.setenv(f"DGX_MUSIC_{setting}", value)

    assert run("list").err == f"Error: DGX_MUSIC_{setting} is {value!r}; use {remedy}.\n"


def test_a_lone_error_comes_out_of_its_groups(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def fail(*_: object) -> None:
        raise ExceptionGroup(
            "tasks", [ExceptionGroup("more", [EngineUnavailableError("No weights.")])]
        )

    monkeypatch.setattr("dgx_music.cli.generations._stats", fail)

    assert run("stats")[::2] == (6, "Error: No weights.\n")


LOST = [DatabaseUnavailableError("db", "gone"), DatabaseUnavailableError("db", "still gone")]


@pytest.mark.parametrize(
    "errors", [LOST, [ExceptionGroup("more", LOST), *LOST], [LOST[0], ExceptionGroup("more", LOST)]]
)
def test_of_several_told_errors_the_first_is_told(
    monkeypatch: pytest.MonkeyPatch, run: Run, errors: list[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise ExceptionGroup("tasks", errors)

    monkeypatch.setattr("dgx_music.cli.generations._stats", fail)

    assert run("stats")[::2] == (5, f"Error: {LOST[0]}\n")


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't start new thread")])
def test_a_lack_of_memory_is_told_in_one_sentence(
    capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert _explain(error) == 1
    assert (
        capsys.readouterr().err
        == f"Error: There is no memory to go on ({error}); raise the limit (`ulimit -v`).\n"
    )


def test_an_unexpected_error_beside_others_keeps_its_traceback() -> None:
    group = ExceptionGroup("tasks", [LOST[0], ZeroDivisionError()])

    assert unwrap(group) is group


def test_an_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        _explain(ZeroDivisionError())


def test_an_interrupt_ends_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dgx_music.cli.generations._stats", interrupt)

    assert main(["stats"]) == 130


def test_a_reader_that_leaves_early_is_no_trouble(spawn: Spawn) -> None:
    add(*("lofi rain " * 100 for _ in range(200)))
    process = spawn("list", "--json", "--limit", 200)
    assert process.stdout is not None
    assert process.stderr is not None

    process.stdout.readline()
    process.stdout.close()

    assert process.stderr.read() == ""


def test_output_that_fits_the_pipe_is_no_trouble_either() -> None:
    add("lofi rain")
    reader, writer = os.pipe()
    os.close(reader)

    command = [sys.executable, "-m", "dgx_music.cli", "list"]
    process = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)

    assert process.stderr == b""


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setenv("_DGX_MUSIC_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "dgx-music enq")
    monkeypatch.setenv("COMP_CWORD", "1")

    assert run().out.strip() == "enqueue"


def test_worker_py_is_the_worker_command(place: Path) -> None:
    script = Path(dgx_music.__file__).parents[2] / "worker.py"

    result = subprocess.run(
        [sys.executable, script, "--slots", "0"], check=False, capture_output=True, text=True
    )

    assert (result.returncode, "DGX_MUSIC_SLOTS" in result.stderr) == (2, True)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_without_unicode_is_no_trouble(options: list[str]) -> None:
    (generation_id,) = add("лофи", status="completed", metadata={"audio": {"waveform": [0.5]}})
    command = [sys.executable, "-m", "dgx_music.cli", "show", generation_id, *options]

    process = subprocess.run(
        command, check=True, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"}
    )

    assert process.stderr == b""
    assert (
        (json.loads(process.stdout)["prompt"] == "лофи") if options else (b"????" in process.stdout)
    )
