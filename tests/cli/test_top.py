"""``top`` as a person has it: the real command on a real pseudo-terminal, and in a pipe."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dgx_music import close_db, init_db, queue_overview
from dgx_music.storage.pauses import get_pauses
from tests.cli.conftest import URL, Run, Work, add, opened_default
from tests.patience import PATIENCE
from tests.proxy import Proxy

pytestmark = pytest.mark.usefixtures("migrated")

TOP = ("-m", "dgx_music.cli", "top", "--interval", "0.2")
_SEQUENCE = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]")
_PAIRS = [(b"\x1b[?1049h", b"\x1b[?1049l"), (b"\x1b[?25l", b"\x1b[?25h")]
"""Second screen on and off; cursor off and on."""
_FAILING = """
import sys
from dgx_music.cli import main
from dgx_music.client import fleet
overview, calls = fleet.queue_overview, []
async def fail(**limits):
    calls.append(limits)
    if len(calls) > 2:
        raise ZeroDivisionError
    return await overview(**limits)
fleet.queue_overview = fail
sys.exit(main(["top", "--interval", "0.1"]))
"""


class Terminal:
    """A terminal with a program on it: what the program shows, and keys for it."""

    def __init__(self, *words: str, columns: int = 120, lines: int = 30, **options: Any) -> None:
        self._end, self._theirs = pty.openpty()
        self.resize(columns, lines)
        self.former = termios.tcgetattr(self._theirs)
        self.seen = b""
        self._from = 0
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), self._theirs)
        command, environment = [sys.executable, *(words or TOP)], os.environ | {"TERM": "xterm"}
        self.process = subprocess.Popen(command, env=environment, **(streams | options))

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: str) -> None:
        """Press these keys; what is looked for from now on must be shown after that."""
        self._from = len(self.seen)
        os.write(self._end, keys.encode())

    def until(self, words: str) -> str:
        """Return what is shown once it has these words."""
        self._read_until(lambda: words in self._shown())
        return self._shown()

    def until_raw(self, sequence: bytes) -> None:
        """Return once the terminal was sent this."""
        self._read_until(lambda: sequence in self.seen)

    def wait(self) -> int:
        """Return the exit code, once all that was shown is read."""
        code = self.process.wait(PATIENCE)
        while select.select([self._end], [], [], 0)[0]:
            self.seen += os.read(self._end, 65_536)
        return code

    @property
    def modes(self) -> list[Any]:
        return termios.tcgetattr(self._theirs)

    def is_restored(self) -> bool:
        """Return True if modes, screen and cursor are as they were, after they were not."""
        is_undone = all(
            self.seen.count(on) == self.seen.count(off) > 0
            and self.seen.rindex(off) > self.seen.rindex(on)
            for on, off in _PAIRS
        )
        return is_undone and self.modes == self.former

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._theirs)
        os.close(self._end)

    def _read_until(self, is_so: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not is_so():
            rest = max(0.0, end - time.monotonic())
            assert select.select([self._end], [], [], rest)[0], self._shown()
            self.seen += os.read(self._end, 65_536)

    def _shown(self) -> str:
        return _SEQUENCE.sub(b"", self.seen[self._from :]).decode(errors="ignore")


@pytest.fixture
def start() -> Iterator[Callable[..., Terminal]]:
    """Starts a program, by default ``top``, on a terminal of its own."""
    terminals: list[Terminal] = []

    def start_one(*words: str, **options: Any) -> Terminal:
        terminals.append(Terminal(*words, **options))
        return terminals[-1]

    yield start_one
    for terminal in terminals:
        terminal.close()


Start = Callable[..., Terminal]


def paused_models() -> list[str]:
    async def read() -> list[str]:
        async with opened_default() as database, database.session(read_only=True) as session:
            return [pause.model_name for pause in await get_pauses(session)]

    return asyncio.run(read())


@pytest.mark.parametrize("key", ["q", "\x1b"])
def test_a_key_ends_it_and_the_terminal_is_as_it_was(start: Start, key: str) -> None:
    add("lofi rain")
    terminal = start()
    terminal.until("lofi rain")
    assert terminal.modes != terminal.former

    terminal.press(key)

    assert (terminal.wait(), terminal.is_restored()) == (0, True)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP)],
)
def test_a_signal_ends_it_and_the_terminal_is_as_it_was(
    start: Start, number: signal.Signals, code: int
) -> None:
    terminal = start()
    terminal.until("q quit")

    terminal.process.send_signal(number)

    assert (terminal.wait(), terminal.is_restored()) == (code, True)


def test_an_error_that_nobody_expected_leaves_the_terminal_as_it_was(start: Start) -> None:
    terminal = start("-c", _FAILING)

    assert (terminal.wait(), terminal.is_restored()) == (1, True)
    assert b"ZeroDivisionError" in terminal.seen.rpartition(b"\x1b[?1049l")[2]


def test_a_waiting_generation_is_cancelled_after_a_yes(start: Start, run: Run) -> None:
    (generation_id,) = add("lofi rain")
    terminal = start()
    terminal.until("lofi rain")

    terminal.press("jc")
    terminal.until(f"Cancel …{generation_id[-6:]}? y/n · lofi rain")
    terminal.press("y")
    terminal.until(f"…{generation_id[-6:]} is cancelled.")

    assert run("show", generation_id, "--json").json["status"] == "cancelled"


def test_any_other_answer_cancels_nothing(start: Start, run: Run) -> None:
    (generation_id,) = add("lofi rain")
    terminal = start()
    terminal.until("lofi rain")

    terminal.press("\x1b[Bc")
    terminal.until("y/n")
    terminal.press("q")
    terminal.until("Nothing was cancelled.")

    assert run("show", generation_id, "--json").json["status"] == "pending"


def test_without_a_choice_there_is_nothing_to_cancel(start: Start) -> None:
    add("lofi rain")
    terminal = start()
    terminal.until("lofi rain")

    terminal.press("jkc")

    assert terminal.until("Choose a generation first")


def test_one_that_runs_is_shown_and_stopped(
    start: Start, work: Work, tone: Callable[..., None], run: Run
) -> None:
    tone({"prompt": "rain", "do": "wait", "seconds": 3_600})
    (generation_id,) = add("lofi rain")
    terminal = start()
    work("--slots", 1)
    terminal.until("1 of 1")

    terminal.press("jc")
    terminal.until("y/n · lofi rain")
    terminal.press("y")
    terminal.until("its worker has been asked to stop it")
    terminal.until(f"cancelled  …{generation_id[-6:]}")

    assert run("show", generation_id, "--json").json["status"] == "cancelled"


def test_everything_is_paused_and_resumed(start: Start) -> None:
    add("lofi rain")
    terminal = start()
    terminal.until("lofi rain")

    terminal.press("p")
    terminal.until("Everything is paused; what runs goes on.")
    assert paused_models() == ["*"]
    terminal.until("EVERYTHING IS PAUSED")

    terminal.press("r")
    terminal.until("Everything is no longer paused.")
    assert paused_models() == []


def test_the_chosen_model_is_paused_and_resumed(start: Start) -> None:
    add("lofi rain", model_name="musicgen-large")
    terminal = start()
    terminal.until("lofi rain")

    terminal.press("jp")
    terminal.until("musicgen-large is paused")
    assert paused_models() == ["musicgen-large"]

    terminal.press("r")
    terminal.until("musicgen-large is no longer paused.")
    assert paused_models() == []


def test_a_model_does_not_go_on_while_everything_is_paused(start: Start, run: Run) -> None:
    add("lofi rain")
    run("pause")
    terminal = start()
    terminal.until("EVERYTHING IS PAUSED")

    terminal.press("jr")

    terminal.until("All models are paused: go up until none is chosen, then press r.")
    assert paused_models() == ["*"]


def test_new_generations_appear_by_themselves(start: Start) -> None:
    terminal = start()
    terminal.until("Nothing runs and nothing waits")

    add("lofi rain")

    assert terminal.until("lofi rain")


def test_while_the_database_is_away_it_says_so_and_goes_on_trying(start: Start) -> None:
    add("lofi rain")
    terminal = start()
    terminal.until("lofi rain")

    Path("data").rename("gone")
    terminal.until("Trying again.")
    Path("gone").rename("data")
    add("slow piano")
    assert terminal.until("slow piano")


def test_keys_work_while_the_database_is_away(start: Start) -> None:
    terminal = start()
    terminal.until("q quit")
    Path("data").rename("gone")
    terminal.until("Trying again.")

    terminal.press("c")
    terminal.until("Choose a generation first")
    terminal.press("q")

    assert (terminal.wait(), terminal.is_restored()) == (0, True)


@pytest.fixture
def proxy(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """What stands between ``top`` and a server that is the default database."""
    with Proxy(postgres_url) as proxy:
        monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", proxy.url(postgres_url))
        yield proxy


def test_a_server_that_is_back_is_used_again(
    start: Start, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGX_MUSIC_COMMAND_TIMEOUT_SECONDS", "1")
    terminal = start()
    terminal.until("q quit")

    proxy.black_hole()
    terminal.until("Trying again.")
    proxy.heal()
    terminal.press("p")

    assert terminal.until("EVERYTHING IS PAUSED")


def test_a_server_that_does_not_answer_keeps_nobody_in_it(start: Start, proxy: Proxy) -> None:
    terminal = start()
    terminal.until("q quit")
    proxy.black_hole()

    terminal.press("q")
    terminal.until_raw(b"\x1b[?1049l")

    assert terminal.modes == terminal.former
    proxy.heal()
    assert (terminal.wait(), terminal.is_restored()) == (0, True)


def test_a_new_size_is_heeded_at_once(start: Start) -> None:
    terminal = start()
    terminal.until("p pause, r resume all")

    terminal.resize(40, 12)
    terminal.process.send_signal(signal.SIGWINCH)

    assert terminal.until("j/k c cancel p pause r resume q quit")


def test_a_stopped_one_gives_the_terminal_back_and_takes_it_again(start: Start) -> None:
    terminal = start()
    terminal.until("q quit")

    terminal.process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert (os.WIFSTOPPED(status), terminal.modes == terminal.former) == (True, True)
    terminal.process.send_signal(signal.SIGCONT)
    terminal.press("q")

    assert (terminal.wait(), terminal.is_restored()) == (0, True)
    assert terminal.seen.count(b"\x1b[?1049h") == 2


def test_without_a_keyboard_it_is_a_view(start: Start) -> None:
    terminal = start(stdin=subprocess.DEVNULL)
    terminal.until("Keys cannot be read here; Ctrl-C ends it.")

    terminal.process.send_signal(signal.SIGINT)

    assert (terminal.wait(), terminal.is_restored()) == (0, True)


def test_in_a_pipe_it_prints_one_picture(run: Run) -> None:
    add("lofi rain", "slow \u202epiano")

    code, out, err = run("top")

    assert (code, err, "\x1b" in out, "quit" in out) == (0, "", False, False)
    assert all(words in out for words in ["2 waiting", "lofi rain", "slow \\u202epiano"])


def test_a_terminal_that_can_only_print_gets_one_picture(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")

    assert run("top").code == 0


def test_json_has_the_names_of_the_library(run: Run) -> None:
    add("lofi rain")

    async def read() -> dict[str, Any]:
        await init_db(URL)
        found = await queue_overview()
        await close_db()
        return found.to_dict()

    told, expected = run("top", "--json").json, asyncio.run(read())
    assert told.keys() == expected.keys()
    assert (told["waiting"], told["models"]) == (expected["waiting"], expected["models"])


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "1e9"])
def test_an_interval_out_of_range_is_refused(run: Run, interval: str) -> None:
    code, _, err = run("top", "--interval", interval)

    assert (code, "--interval" in err) == (2, True)


def test_a_database_that_is_not_there_ends_5_before_anything_is_drawn(start: Start) -> None:
    terminal = start(*TOP, "--database-url", "postgresql://127.0.0.1:1/music")

    assert (terminal.wait(), terminal.modes == terminal.former) == (5, True)
    assert b"?1049h" not in terminal.seen
