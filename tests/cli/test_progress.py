from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

from dgx_music.cli.progress import MAX_BARS, board, describe
from dgx_music.storage import Generation
from tests.cli.conftest import Run, Spawn, Work
from tests.patience import PATIENCE


def generation(number: int = 0, **values: object) -> Generation:
    return Generation(**{"id": f"id-{number}", "prompt": "lofi rain", "progress": 0.0} | values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"status": "pending"}, "pending"),
        (
            {"status": "pending", "failures": 1, "max_attempts": 3, "error_message": "a\nb"},
            "pending after 1 of 3 failures: a b",
        ),
        ({"status": "processing", "attempt": 2}, "processing, attempt 2"),
        ({"status": "processing", "cancel_requested": True}, "is being cancelled"),
        ({"status": "failed", "error_message": "no weights"}, "failed: no weights"),
        (
            {"status": "completed", "generation_time_seconds": 1.5, "file_path": "/a.wav"},
            "completed in 1.50 s: /a.wav",
        ),
        ({"status": "cancelled"}, "cancelled"),
    ],
)
def test_where_a_generation_is_takes_a_few_words(values: dict[str, object], words: str) -> None:
    assert describe(generation(**values)) == words


def test_elsewhere_than_on_a_terminal_each_change_is_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with board(["id-0"]) as show:
        for progress in (0.1, 0.2):
            show(generation(status="processing", attempt=1, progress=progress))

    assert capsys.readouterr().err == "id-0 processing, attempt 1\n"


@pytest.mark.parametrize(
    ("count", "words"), [(2, "lofi rain"), (MAX_BARS + 1, f"1 of {MAX_BARS + 1}")]
)
def test_on_a_terminal_there_are_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "100")

    with board([f"id-{number}" for number in range(count)]) as show:
        show(generation(0, status="completed"))
        show(generation(1, status="processing", attempt=2, progress=0.5))

    last = capsys.readouterr().err
    assert words in last
    assert count > MAX_BARS or ("completed" in last and "attempt 2" in last)


def test_a_terminal_sees_progress_and_gets_its_cursor_back(
    work: Work, tone: Callable[..., None]
) -> None:
    worker = work()
    terminal, theirs = pty.openpty()
    words = ("enqueue", "lofi rain", "--duration", "1", "--wait")
    command = [sys.executable, "-m", "dgx_music.cli", *words]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        assert process.wait(PATIENCE) == 0
    os.close(theirs)
    seen = b""
    with suppress(OSError):  # which is how a terminal says that there is no more
        # a part at a time: the more there was to show, the more parts
        while part := os.read(terminal, 65_536):
            seen += part
    os.close(terminal)
    seen = seen.decode()

    assert "100%" in seen
    assert seen.count("\x1b[?25h") == seen.count("\x1b[?25l") > 0
    assert worker.poll() is None


def test_a_ctrl_c_while_waiting_ends_130_and_the_row_stays(run: Run, spawn: Spawn) -> None:
    process = spawn("enqueue", "lofi rain", "--wait")
    assert process.stdout is not None
    generation_id = process.stdout.readline().strip()

    process.send_signal(2)
    _, errors = process.communicate(timeout=PATIENCE)

    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert run("show", generation_id, "--json").json["status"] == "pending"
