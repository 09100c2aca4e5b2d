"""How soon viewers hear of an event over HTTP, and how much memory the server needs for them.

    python -m benchmarks.web_events                            # 1,000 viewers, one event a second
    python -m benchmarks.web_events --viewers 200 --events 10
    python -m benchmarks.web_events --url postgresql://…       # a migrated, empty database

The server is a process of its own, and all viewers are another one. An event is a new title of one
generation that all of them watch; its latency is counted from the end of the commit.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.markdown import table
from benchmarks.measures import percentile
from dgx_music import close_db, enqueue, init_db
from dgx_music.client.labels import label_generation

_TITLE = re.compile(rb'"title":"(\d+)"')
_PATIENCE = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--viewers", type=int, default=1_000)
    parser.add_argument("--events", type=int, default=30, help="how many, one a second")
    parser.add_argument("--url", help="the database; a SQLite file of its own if not given")
    options = parser.parse_args()
    allow_connections(options.viewers)
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:///{folder}/music.db"
        asyncio.run(measure(url, Path(folder), options.viewers, options.events))


async def measure(url: str, folder: Path, viewers: int, events: int) -> None:
    await init_db(url)
    row = await enqueue("lofi rain")
    with serving(url, folder) as (process, port):
        empty = memory_mb(process.pid, "VmRSS")
        heard = await watch(port, row.id, viewers)
        latencies, cpu = [], cpu_seconds(process.pid)
        for number in range(events):
            await asyncio.sleep(1.0)
            await label_generation(row.id, title=str(number))
            latencies += await heard.latencies(number, time.perf_counter())
        cpu = (cpu_seconds(process.pid) - cpu) / events
        print_results(latencies, viewers, cpu, empty, memory_mb(process.pid, "VmHWM"))
    await close_db()


def print_results(
    latencies: Sequence[float], viewers: int, cpu: float, empty: float, highest: float
) -> None:
    values = sorted(latencies)
    rows = [
        ("viewers", f"{viewers:,}"),
        ("latency, p50", f"{percentile(values, 0.5) * 1_000:.0f} ms"),
        ("latency, p99", f"{percentile(values, 0.99) * 1_000:.0f} ms"),
        ("latency, highest", f"{values[-1] * 1_000:.0f} ms"),
        ("the server's CPU time for each event", f"{cpu * 1_000:.0f} ms"),
        ("the server's memory without viewers", f"{empty:.0f} MB"),
        ("the server's highest memory", f"{highest:.0f} MB"),
    ]
    print(table(("", "measured"), rows))


class Heard:
    """When each viewer has heard which event."""

    def __init__(self, viewers: int) -> None:
        self._viewers = viewers
        self._times: dict[int, list[float]] = {}
        self._begun = 0
        self._news = asyncio.Event()

    def note(self, number: int | None) -> None:
        """Note that a viewer has got this event, or with ``None`` its snapshot."""
        if number is None:
            self._begun += 1
        else:
            self._times.setdefault(number, []).append(time.perf_counter())
        self._news.set()

    async def all_begun(self) -> None:
        """Return once all viewers have their snapshots."""
        while self._begun < self._viewers:
            await self._wait()

    async def latencies(self, number: int, since: float) -> list[float]:
        """Return how long after this moment each viewer heard of the event; waits for all."""
        while len(self._times.get(number, ())) < self._viewers:
            await self._wait()
        return [max(0.0, each - since) for each in self._times.pop(number)]

    async def _wait(self) -> None:
        self._news.clear()
        await asyncio.wait_for(self._news.wait(), _PATIENCE)


class Viewer(asyncio.Protocol):
    """One connection, which reads its stream."""

    def __init__(self, path: str, heard: Heard) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
        self._heard = heard

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if b"event: snapshot" in data:
            self._heard.note(None)
        for found in _TITLE.findall(data):
            self._heard.note(int(found))


async def watch(port: int, generation_id: str, viewers: int) -> Heard:
    """Open all streams, and return when all have begun."""
    heard, loop = Heard(viewers), asyncio.get_running_loop()
    path = f"/v1/events?ids={generation_id}"
    for _ in range(viewers):
        await loop.create_connection(lambda: Viewer(path, heard), "127.0.0.1", port)
    await heard.all_begun()
    return heard


@contextmanager
def serving(url: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a server on a free port."""
    environment = os.environ | {
        "DGX_MUSIC_DATABASE_URL": url,
        "DGX_MUSIC_OUTPUT": str(folder / "audio"),
    }
    command = [sys.executable, "-m", "dgx_music.cli", "web", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process, find_port(process)
    finally:
        process.terminate()
        process.communicate(timeout=_PATIENCE)


def find_port(process: subprocess.Popen[str]) -> int:
    for line in process.stderr or ():
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            return int(found[1])
    raise SystemExit("the server did not start")


def memory_mb(pid: int, name: str) -> float:
    """Return a number of the process that the kernel counts in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith(name)]
    return int(line.split()[1]) / 1_024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def allow_connections(count: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, count + 1_000), most))


if __name__ == "__main__":
    main()
