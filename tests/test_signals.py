"""What signals do to a worker, from its first moment to its last: real processes, real signals."""

import asyncio
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.daemons import ROOT, add, is_running, rows_of, until
from tests.patience import PATIENCE

STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
COMMANDS = {
    "worker.py": [sys.executable, str(ROOT / "worker.py")],
    "module": [sys.executable, "-m", "dgx_music.cli", "worker"],
    "script": [str(Path(sys.executable).with_name("dgx-music")), "worker"],
}


@pytest.fixture
def database_url(sqlite_url):
    """One kind of database will do: this is not about them."""
    return sqlite_url


async def start_early(*command, number=signal.SIGQUIT, **options):
    """Start this, and return it as soon as it handles the signal, long before it has imported what it needs."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"DGX_MUSIC_ENGINE": "tone"},
        **options,
    )
    while not _caught(process.pid) & 1 << (number - 1):
        await asyncio.sleep(0.001)
    assert "_sqlite3" not in Path(f"/proc/{process.pid}/maps").read_text()
    return process


def _caught(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("SigCgt")), 16)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("number", STOPPING)
async def test_a_signal_while_a_worker_imports_ends_it_without_a_word(tmp_path, command, number):
    process = await start_early(*command, cwd=tmp_path)
    process.send_signal(number)
    said, _ = await process.communicate()
    assert (process.returncode, said) == (130 if number == signal.SIGINT else 0, b"")


async def test_ctrl_c_while_another_command_imports_prints_no_traceback(tmp_path):
    # found before the library of this name: an import that lasts until the signal comes
    (tmp_path / "asyncio.py").write_text(
        f"import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep({PATIENCE})\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dgx_music.cli", "list"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
    )
    with anyio.fail_after(PATIENCE):
        while not (tmp_path / "importing").exists():
            await asyncio.sleep(0.001)
    process.send_signal(signal.SIGINT)
    said, _ = await process.communicate()
    assert (process.returncode, said) == (130, b"")


def can_be_process_1():
    return (
        subprocess.run(
            ["unshare", "--pid", "--fork", "true"], capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.mark.skipif(
    not can_be_process_1(), reason="no process may have a PID namespace of its own here"
)
@pytest.mark.parametrize("number", STOPPING)
async def test_process_1_hears_a_signal_in_its_first_moments(tmp_path, number):
    unshare = await asyncio.create_subprocess_exec(
        *("unshare", "--pid", "--fork", "--kill-child", *COMMANDS["worker.py"]),
        cwd=tmp_path,
        env=os.environ | {"DGX_MUSIC_ENGINE": "tone"},
    )
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    while not (pids := children.read_text().split()) or not _caught(pids[0]) & 1 << (
        signal.SIGQUIT - 1
    ):
        await asyncio.sleep(0.001)
    os.kill(int(pids[0]), number)
    with anyio.fail_after(PATIENCE):
        assert await unshare.wait() == (130 if number == signal.SIGINT else 0)


@pytest.mark.parametrize("number", STOPPING)
async def test_a_signal_lets_what_runs_finish(database, start, script, number):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 0.5}))
    await until(database, generation, is_running)
    daemon.send(number)
    assert daemon.wait() == 0
    assert (await rows_of(database))[generation.id].status == "completed"


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGHUP, signal.SIGHUP), (signal.SIGQUIT, signal.SIGTERM)]
)
async def test_a_second_signal_releases_at_once_as_the_first_has_said(
    database, start, script, first, second
):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 60}))
    await until(database, generation, is_running)
    daemon.send(first)
    await daemon.says("1 running; press Ctrl-C or send the signal again to release at once")
    daemon.send(second)
    assert daemon.wait() == 0
    row = (await rows_of(database))[generation.id]
    assert (row.status, row.failures, row.attempt) == ("pending", 0, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_that_go_on_while_an_idle_worker_ends_do_not_change_how_it_ends(
    database, start, number
):
    daemon = start()
    await daemon.says("serves")
    while daemon.process.poll() is None:
        daemon.send(number)
        await asyncio.sleep(0.02)
    assert daemon.wait() == 0


async def test_a_worker_under_nohup_outlives_its_terminal(database, start, script):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        daemon = start(script=script(), is_fresh=True)
    finally:
        signal.signal(signal.SIGHUP, former)
    await daemon.says("serves")
    daemon.send(signal.SIGHUP)
    generation = await add(database)
    await until(database, generation, lambda row: row.is_finished)
    daemon.send(signal.SIGTERM)
    assert daemon.wait() == 0
    assert "SIGHUP" not in daemon.said()


async def test_a_signal_to_the_whole_process_group_leaves_the_engine_to_its_worker(
    database, start, script
):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 1.0}))
    await until(database, generation, is_running)
    # as a service manager does, with all that it has started
    for pid in (*daemon.children(), daemon.pid):
        os.kill(pid, signal.SIGTERM)
    assert daemon.wait() == 0
    row = (await rows_of(database))[generation.id]
    assert (row.status, row.attempt) == ("completed", 1)


async def test_a_worker_that_is_stopped_and_continued_goes_on(database, start, script):
    generation = await add(database)
    daemon = start(script=script({"do": "wait", "seconds": 1.0}), lease_seconds=30.0)
    await until(database, generation, is_running)
    daemon.send(signal.SIGTSTP)
    daemon.send(signal.SIGCONT)
    row = await until(database, generation, lambda row: row.is_finished)
    assert (row.status, row.attempt) == ("completed", 1)


async def test_a_terminal_that_closes_stops_the_worker(tmp_path, database, script):
    """Its log goes to that terminal, and cannot be written any more."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {
            "DGX_MUSIC_ENGINE": "tone",
            "DGX_MUSIC_DATABASE_URL": f"sqlite:///{tmp_path / 'test.db'}",
        }
        os.execv(sys.executable, [*COMMANDS["worker.py"], "--output", str(tmp_path / "audio")])
    said = b""
    while b"serves" not in said:
        said += await asyncio.to_thread(os.read, terminal, 4096)
    os.close(terminal)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
