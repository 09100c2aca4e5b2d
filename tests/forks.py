"""Processes that are forks of one in which everything is imported: a worker starts in hundredths of a second.

As a program of its own it would import for more than a second of the processor's time. Only a test of that first second
needs one.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from dgx_music import early

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.imported"])


class WorkerFork:
    """A worker in a fork; it has what the tests use of ``subprocess.Popen``."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._process = CONTEXT.Process(
            target=_run_worker, args=(arguments, environment, Path.cwd(), log), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended; raises ``subprocess.TimeoutExpired``."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_worker(arguments: list[str], environment: dict[str, str], folder: Path, log: Path) -> None:
    """Become ``dgx-music worker``, with its handlers of early signals."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv[:] = ["dgx-music", "worker", *arguments]
    importlib.reload(early)
    from dgx_music.cli import main

    sys.exit(main())
