"""Standard streams that are closed, full, or a pipe without a reader: the exit code tells what happened to the row."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dgx_music.cli import main
from tests.cli.conftest import Spawn, add, count_rows
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("migrated")

LOST = "Error: Not all could be printed, because of stdout (no space left on device); what was asked for is done all the same."
OPEN_FILES = """
import os, pathlib, sys
from dgx_music.cli import generations, main
def look(*_):
    links = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
    pathlib.Path("links").write_text(" ".join(links))
    return []
generations.print_fields = look
sys.exit(main(["stats"]))
"""


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which $M is the command."""
    env = os.environ | {"M": f"{sys.executable} -m dgx_music.cli"} | environment
    return subprocess.run(
        ["bash", "-c", line], check=False, capture_output=True, text=True, env=env
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full", "| head -c 0"])
def test_what_is_enqueued_ends_0_whoever_listens(closed: str) -> None:
    result = shell(f'$M enqueue "lofi rain" {closed}; echo "code ${{PIPESTATUS[0]}}" >&2')

    assert (result.stderr.splitlines()[-1], count_rows()) == ("code 0", 1)
    assert "Traceback" not in result.stderr
    assert "ignored" not in result.stderr


@pytest.mark.parametrize("command", ["enqueue 'lofi rain'", "list", "list --json", "--help"])
def test_a_full_stdout_is_told_in_a_code_of_its_own(command: str) -> None:
    add("trap beat")
    result = shell(f"$M {command} >/dev/full")

    assert result.returncode == 74
    assert result.stderr.splitlines()[-1] == LOST


def test_a_full_stdout_hides_no_other_code() -> None:
    result = shell("$M list --limit x >/dev/full; echo $?; $M >/dev/full; echo $?")

    assert result.stdout.split() == ["2", "2"]
    assert "all the same" not in result.stderr


@pytest.mark.parametrize(
    ("command", "reader"),
    [("list", "head -n 1"), ("list --json", "head -c 9"), ("prompts", "true")],
)
def test_a_reader_that_has_enough_is_no_trouble(command: str, reader: str) -> None:
    add(*("lofi rain " * 100 for _ in range(200)))
    result = shell(
        f"$M {command} --limit 200 | {reader} >/dev/null; echo ${{PIPESTATUS[0]}}",
        PYTHONUNBUFFERED="1",
    )

    assert result.stdout == "0\n"
    assert "rror" not in result.stderr


def test_no_file_and_no_socket_gets_the_number_of_a_closed_stream() -> None:
    result = shell(f"{sys.executable} -c '{OPEN_FILES}' <&- >&- 2>&-")

    assert (result.returncode, Path("links").read_text()) == (0, " ".join(["/dev/null"] * 3))


def test_a_pipe_that_does_not_wait_gets_everything(spawn: Spawn) -> None:
    add(*("lofi rain " * 100 for _ in range(200)))
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)

    process = spawn("list", "--json", "--limit", 200, stdout=writer)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123 - a number
        assert len(json.load(pipe)) == 200
    assert process.wait(timeout=PATIENCE) == 0


def test_a_terminal_that_was_closed_changes_nothing(spawn: Spawn) -> None:
    terminal, theirs = pty.openpty()
    os.close(terminal)

    process = spawn("enqueue", "lofi rain", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)

    assert (process.wait(timeout=60), count_rows()) == (0, 1)


@pytest.mark.parametrize("log", ["<&- >&- 2>&-", "2>/dev/full", "2>&1 | head -n 1"])
def test_a_worker_without_a_log_makes_music(tone: Callable[..., None], log: str) -> None:
    tone()
    result = shell(
        f"$M enqueue 'lofi rain'; $M worker --drain {log}; echo ${{PIPESTATUS[0]}}; $M list --status completed --json"
    )

    *_, code, rows = (
        result.stdout.partition("[")[0].split()[-1],
        result.stdout[result.stdout.index("[") :],
    )
    assert (code, [row["prompt"] for row in json.loads(rows)]) == ("0", ["lofi rain"])


@pytest.mark.parametrize("stream", [None, "closed"])
def test_a_program_without_streams_may_call_main(
    monkeypatch: pytest.MonkeyPatch, stream: str | None
) -> None:
    gone = None if stream is None else io.StringIO()
    if gone is not None:
        gone.close()
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, gone)

    assert (main(["enqueue", "--file", "-"]), main(["enqueue", "lofi rain"])) == (2, 0)
    assert (sys.stdin, sys.stdout, sys.stderr) == (gone, gone, gone)
    assert count_rows() == 1


@pytest.mark.parametrize(
    ("encoding", "options"), [("ascii", ""), ("ascii", "--json"), ("utf-16", "")]
)
def test_what_the_encoding_lacks_is_no_trouble(encoding: str, options: str) -> None:
    line = f"$M enqueue 静かな雨 {options} && $M list {options} && $M enqueue 静かな雨 --seed -1 --tenant 雨"
    result = subprocess.run(
        ["bash", "-c", line],
        check=False,
        capture_output=True,
        env=os.environ
        | {"M": f"{sys.executable} -m dgx_music.cli", "PYTHONIOENCODING": encoding, "LANG": "C"},
    )

    assert (result.returncode, count_rows()) == (2, 1)
    assert b"Traceback" not in result.stderr
