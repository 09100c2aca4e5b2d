from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dgx_music.cli import main
from dgx_music.storage import Database, count_generations
from tests.factories import add_generation
from tests.forks import WorkerFork
from tests.patience import PATIENCE

URL = "sqlite:///data/generations.db"


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[str]"]
Work = Callable[..., WorkerFork]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, and no wishes about terminals."""
    for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def migrated(place: Path, migrated_file: Path) -> None:
    """A database in the default place; without it the first command makes one, which takes a while."""
    Path("data").mkdir()
    shutil.copy(migrated_file, "data/generations.db")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run_command(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return run_command


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts commands in processes of their own; none outlives the test."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dgx_music.cli", *map(str, arguments)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        processes.append(subprocess.Popen(command, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.fixture
def work(place: Path) -> Iterator[Work]:
    """Starts workers, which log to ``worker.log``; none outlives the test."""
    workers: list[WorkerFork] = []

    def start(*arguments: object) -> WorkerFork:
        words = [str(argument) for argument in arguments]
        workers.append(WorkerFork(words, dict(os.environ), place / "worker.log"))
        return workers[-1]

    yield start
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
        worker.wait(PATIENCE)


@pytest.fixture
def tone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes every worker of this test use the tone engine, with the script given."""
    script = tmp_path / "script.json"
    monkeypatch.setenv("DGX_MUSIC_ENGINE", "tone")
    monkeypatch.setenv("DGX_MUSIC_POLL_SECONDS", "0.2")
    monkeypatch.setenv("DGX_MUSIC_HEARTBEAT_SECONDS", "0.1")
    monkeypatch.setenv("DGX_MUSIC_TONE_SCRIPT", str(script))

    def write(*rules: dict[str, object]) -> None:
        script.write_text(json.dumps(rules))

    write()
    return write


def add(*prompts: str, **values: Any) -> list[str]:
    """Store a generation for each prompt in the default place, and return their ids."""

    async def store() -> list[str]:
        async with opened_default() as database, database.session() as session:
            return [
                (await add_generation(session, prompt=prompt, **values)).id for prompt in prompts
            ]

    return asyncio.run(store())


def count_rows() -> int:
    """Return how many generations the default place holds, 0 if it was never made."""

    async def count() -> int:
        async with opened_default() as database, database.session(read_only=True) as session:
            return await count_generations(session)

    return asyncio.run(count()) if Path("data/generations.db").exists() else 0


@asynccontextmanager
async def opened_default() -> AsyncIterator[Database]:
    database = Database(URL)
    await database.migrate()
    yield database
    await database.dispose()
