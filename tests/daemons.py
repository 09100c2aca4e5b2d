"""Real worker daemons for tests: real processes, real signals, and what must be true after them."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import select

from dgx_music import enqueue, enqueue_many
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.database import Database
from dgx_music.storage.models import Attempt, Generation
from dgx_music.storage.workers import get_workers
from tests.factories import MODEL
from tests.forks import WorkerFork
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[1]
_WAITS = ("CONNECT", "STATEMENT", "COMMAND")


class Daemon:
    """``python worker.py`` on a database and an output folder; quick leases, the tone engine.

    It is a fork of a process that has imported all that it needs, unless it is to be ``is_fresh``.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        url: str | None = None,
        script: Path | None = None,
        timeout_seconds: float | None = None,
        is_fresh: bool = False,
        **settings: object,
    ) -> None:
        settings = {
            "engine": "tone",
            "slots": 4,
            "lease_seconds": 3.0,
            "heartbeat_seconds": 0.3,
        } | settings
        settings |= {"poll_seconds": 0.2, "output": folder / "audio", "backoff_base_seconds": 0.05}
        words = [
            word
            for name, value in settings.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]
        environment = os.environ | {
            "DGX_MUSIC_DATABASE_URL": url or f"sqlite:///{folder / 'test.db'}"
        }
        if script is not None:
            environment["DGX_MUSIC_TONE_SCRIPT"] = str(script)
        if timeout_seconds is not None:
            environment |= {
                f"DGX_MUSIC_{wait}_TIMEOUT_SECONDS": str(timeout_seconds) for wait in _WAITS
            }
        self.log = (folder / f"worker-{len(list(folder.glob('worker-*.log')))}.log").open("w+")
        self.process = self._start([*words, *options], environment, is_fresh=is_fresh)

    def _start(
        self, arguments: list[str], environment: dict[str, str], *, is_fresh: bool
    ) -> subprocess.Popen[bytes] | WorkerFork:
        if not is_fresh:
            return WorkerFork(arguments, environment, Path(self.log.name))
        command = [sys.executable, str(ROOT / "worker.py"), *arguments]
        return subprocess.Popen(command, env=environment, stderr=self.log, stdout=self.log)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit code."""
        return self.process.wait(timeout)

    def children(self) -> list[int]:
        """Return the pids of its children: its engine."""
        return [
            int(pid)
            for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ]

    def said(self) -> str:
        """Return its log so far."""
        return Path(self.log.name).read_text()

    async def says(self, words: str) -> None:
        """Return once its log has these words."""
        with anyio.fail_after(PATIENCE):
            while words not in self.said():
                await anyio.sleep(0.02)

    def close(self) -> None:
        """Kill it, if need be, and let go of its log."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def start(database: Database, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Return a function that starts a daemon on the test's database; at the end all are killed."""
    daemons: list[Daemon] = []

    def start_daemon(*options: str, url: str | None = None, **settings: Any) -> Daemon:
        daemons.append(Daemon(tmp_path, *options, url=url or url_of(database), **settings))
        return daemons[-1]

    yield start_daemon
    for daemon in daemons:
        daemon.close()


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that sets what the tone engine does from the next generation on."""
    path = tmp_path / "script.json"

    def write(*rules: dict[str, Any]) -> Path:
        path.with_suffix(".new").write_text(json.dumps(rules))
        path.with_suffix(".new").rename(path)
        return path

    return write


def url_of(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


async def add(database: Database, prompt: str = "lofi rain", **options: Any) -> Generation:
    async with database.session() as session:
        return await enqueue(prompt, session=session, **{"duration": 0.5, "model": MODEL} | options)


async def add_many(database: Database, count: int, **options: Any) -> None:
    async with database.session() as session:
        prompts = [f"prompt {number}" for number in range(count)]
        await enqueue_many(prompts, session=session, **{"duration": 0.1, "model": MODEL} | options)


async def rows_of(database: Database) -> dict[str, Generation]:
    async with database.session(read_only=True) as session:
        return {row.id: row for row in await session.scalars(select(Generation))}


async def attempts_of(database: Database) -> list[Attempt]:
    async with database.session(read_only=True) as session:
        return list(
            await session.scalars(select(Attempt).order_by(Attempt.generation_id, Attempt.attempt))
        )


Condition = Callable[[Generation], bool]


async def until(
    database: Database, generation: Generation, is_so: Condition, seconds: float = PATIENCE
) -> Generation:
    """Return the row once this holds of it."""
    with anyio.fail_after(seconds), database.changes.subscribe() as changes:
        while not is_so(row := (await rows_of(database))[generation.id]):
            await changes.wait(0.1)
        return row


async def until_all(database: Database, is_so: Condition, seconds: float = PATIENCE) -> None:
    """Return once this holds of every row; a database that cannot be asked has not said so."""
    with anyio.fail_after(seconds):
        while not await _holds_of_all(database, is_so):
            await anyio.sleep(0.1)


async def _holds_of_all(database: Database, is_so: Condition) -> bool:
    try:
        return all(map(is_so, (await rows_of(database)).values()))
    except DatabaseUnavailableError:
        return False


async def until_registered(database: Database, daemons: list[Daemon]) -> None:
    """Return once each of these has loaded its engine and said so."""
    with anyio.fail_after(PATIENCE), database.changes.subscribe() as changes:
        while True:
            async with database.session(read_only=True) as session:
                ready = {
                    row["pid"] for row in await get_workers(session) if row["state"] == "serving"
                }
            if {daemon.pid for daemon in daemons} <= ready:
                return
            await changes.wait(0.1)


def is_running(row: Generation) -> bool:
    return row.status == "processing"


def is_finished(row: Generation) -> bool:
    return row.is_finished


async def check_everything_is_true(database: Database, folder: Path, count: int) -> None:
    """Every row completed once, by its last attempt; one file each, as the row says; no two attempts at a time."""
    rows = await rows_of(database)
    assert [row.status for row in rows.values()] == ["completed"] * count
    attempts = await attempts_of(database)
    assert [a.generation_id for a in attempts if a.outcome == "completed"] == sorted(rows)
    assert all(
        rows[a.generation_id].attempt == a.attempt for a in attempts if a.outcome == "completed"
    )
    assert {a.outcome for a in attempts} <= {"completed", "lost", "released", "failed"}
    assert len(attempts) == sum(row.attempt for row in rows.values())
    for former, latter in itertools.pairwise(attempts):
        assert (
            former.generation_id != latter.generation_id or former.finished_at <= latter.started_at
        )
    files = {
        str(file): file.read_bytes() for file in (folder / "audio").iterdir() if file.is_file()
    }
    assert sorted(files) == sorted(str(row.file_path) for row in rows.values())
    said = {row.file_path: (row.file_size_bytes, row.sha256) for row in rows.values()}
    assert said == {
        file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in files.items()
    }
