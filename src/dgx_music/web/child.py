"""The worker that ``dgx-music web --with-worker`` starts: a process of its own, ended with ours."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import Mapping

import anyio

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
# Looked up here: between fork and exec, a library must not be opened while threads run.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_AFTER_GRACE_SECONDS = 10.0
"""How long the worker may take to end beyond the grace that its generations get."""
_URGENT_SECONDS = 10.0


class WorkerProcess:
    """A worker in a process of its own; ``dgx-music worker``, with the settings of ``variables``."""

    def __init__(self, variables: Mapping[str, str], grace_seconds: float) -> None:
        self._variables = variables
        self._patience = grace_seconds + _AFTER_GRACE_SECONDS
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it. Ctrl-C on our terminal does not reach it: its end is asked for once, by us."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dgx_music.cli", "worker"),
            env={**os.environ, **self._variables},
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_the_parent,
        )

    async def wait(self) -> int:
        """Wait for its end and return its exit code; negative is the signal that killed it."""
        return await self._started.wait()

    async def stop(self) -> None:
        """End it: what it runs gets its grace, then goes back into the queue."""
        for seconds in (self._patience, _URGENT_SECONDS):
            self.request_stop()
            with anyio.move_on_after(seconds):
                await self._started.wait()
                return
        self._started.kill()
        await self._started.wait()

    def request_stop(self) -> None:
        """Send SIGTERM; a second one has it release at once what it runs."""
        if self._started.returncode is None:
            self._started.terminate()

    @property
    def _started(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError("the worker's process was not started")
        return self._process


def _end_with_the_parent() -> None:
    """Have Linux send SIGTERM when the parent is gone, however it ended."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
