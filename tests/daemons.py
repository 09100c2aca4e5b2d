"""Real worker daemons for tests: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio

ROOT = Path(__file__).parents[1]


class Daemon:
    """``python worker.py`` on a database and an output folder; quick leases, the tone engine."""

    def __init__(self, folder: Path, *options: str, script: Path | None = None, **settings: object) -> None:
        settings = {"engine": "tone", "slots": 4, "lease_seconds": 1.5, "heartbeat_seconds": 0.3} | settings
        settings |= {"poll_seconds": 0.2, "output": folder / "audio", "backoff_base_seconds": 0.05}
        words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        environment = os.environ | {"DGX_MUSIC_DATABASE_URL": f"sqlite:///{folder / 'test.db'}"}
        if script is not None:
            environment["DGX_MUSIC_TONE_SCRIPT"] = str(script)
        self.log = (folder / f"worker-{len(list(folder.glob('worker-*.log')))}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "worker.py"), *words, *options],
            env=environment,
            stderr=self.log,
            stdout=self.log,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """Return the exit code."""
        return self.process.wait(timeout)

    def children(self) -> list[int]:
        """Return the pids of its children: its engine."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    async def says(self, words: str) -> None:
        """Return once its log has these words."""
        with anyio.fail_after(20):
            while words not in Path(self.log.name).read_text():
                await anyio.sleep(0.02)

    def close(self) -> None:
        """Kill it, if need be, and let go of its log."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()
