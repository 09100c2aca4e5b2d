"""How fast one server enqueues over HTTP, beside the library called as often at a time.

    python -m benchmarks.web_enqueue                       # 16 at a time, on SQLite
    python -m benchmarks.web_enqueue --url postgresql://…  # a migrated, empty database

Each server is a process of its own; all clients are this one, with a connection each that stays
open. The floors are the same uvicorn with another application: one that only reads the body and
answers as many bytes, and one that calls the library and does nothing else. All four take turns,
and the medians of these are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from benchmarks.markdown import table
from benchmarks.web_events import cpu_seconds
from dgx_music import close_db, enqueue, init_db

_PATIENCE = 60.0
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_WARM_UP = 200
_ANSWER_BYTES = 1_250
"""About what a row has."""
_PROMPTS = count()

Send = Callable[[], Awaitable[None]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000, help="in each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--url", help="the database; a SQLite file of its own if not given")
    parser.add_argument("--serve", choices=["bare", "library"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_floor(FLOORS[options.serve])
        return
    with tempfile.TemporaryDirectory() as folder:
        url = options.url or f"sqlite:///{folder}/music.db"
        asyncio.run(measure(url, options.requests, options.turns, options.at_once))


async def measure(url: str, requests: int, turns: int, at_once: int) -> None:
    await init_db(url)
    with ExitStack() as stack:
        contestants = [Contestant("the library", os.getpid())]
        for name, command in SERVERS.items():
            contestants.append(Contestant(name, *stack.enter_context(serving(command, url))))
        for turn in range(turns + 1):
            for each in contestants:
                await each.take_turn(requests if turn else _WARM_UP, at_once)
    await close_db()
    print(results(contestants, at_once))


@dataclass
class Contestant:
    """One way to enqueue: by HTTP, or without a ``port`` by a call."""

    name: str
    pid: int
    port: int | None = None
    rates: list[float] = field(default_factory=list)
    cpu_milliseconds: list[float] = field(default_factory=list)
    """Of the process that stores the rows, for each of them."""

    async def take_turn(self, requests: int, at_once: int) -> None:
        """Measure so many requests, on connections of this turn: a server closes idle ones."""
        clients = [await Client.connect(self.port) for _ in range(at_once) if self.port]
        senders = [each.enqueue for each in clients] or [call_library] * at_once
        cpu, started = cpu_seconds(self.pid), time.perf_counter()
        await send_all(senders, requests)
        self.rates.append(requests / (time.perf_counter() - started))
        self.cpu_milliseconds.append((cpu_seconds(self.pid) - cpu) / requests * 1_000)
        for each in clients:
            each.close()


async def send_all(senders: Sequence[Send], requests: int) -> None:
    left = iter(range(requests))

    async def work(send: Send) -> None:
        for _ in left:
            await send()

    await asyncio.gather(*[work(send) for send in senders])


def results(contestants: list[Contestant], at_once: int) -> str:
    library = statistics.median(contestants[0].rates[1:])
    rows = []
    for each in contestants:
        rate, cpu = (statistics.median(turns[1:]) for turns in (each.rates, each.cpu_milliseconds))
        rows.append((each.name, f"{rate:,.0f}", f"{rate / library:.2f}", f"{cpu:.2f}"))
    titles = (f"{at_once} at a time", "per second", "of the library", "CPU of the process, ms")
    return table(titles, rows)


async def call_library() -> None:
    await enqueue(f"lofi rain {next(_PROMPTS)}", duration=8)


class Client(asyncio.Protocol):
    """One connection that stays open, with one request at a time."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport
        self._answered: asyncio.Future[None]

    @classmethod
    async def connect(cls, port: int) -> Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(cls, "127.0.0.1", port)
        return client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def enqueue(self) -> None:
        body = json.dumps({"prompt": f"lofi rain {next(_PROMPTS)}", "duration": 8}).encode()
        head = (
            "POST /v1/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(head.encode() + body)
        await self._answered

    def close(self) -> None:
        self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(RuntimeError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        found = _LENGTH.search(head)
        if end and found and len(body) == int(found[1]):
            self._received = b""
            if not head.startswith(b"HTTP/1.1 202 "):
                self._answered.set_exception(RuntimeError(repr(body)))
            else:
                self._answered.set_result(None)


_OURS = ["-m", "dgx_music.cli", "web", "--port", "0"]
SERVERS = {
    "`dgx-music web`": _OURS,
    "floor: uvicorn alone": ["-m", "benchmarks.web_enqueue", "--serve", "bare"],
    "floor: uvicorn that calls the library": ["-m", "benchmarks.web_enqueue", "--serve", "library"],
}


@contextmanager
def serving(command: list[str], url: str) -> Iterator[tuple[int, int]]:
    """Run a server on a free port; gives its process id and the port."""
    environment = os.environ | {"DGX_MUSIC_DATABASE_URL": url, "DGX_MUSIC_MAX_PENDING": "0"}
    process = subprocess.Popen(
        [sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        yield process.pid, find_port(process)
    finally:
        process.terminate()
        process.communicate(timeout=_PATIENCE)


def find_port(process: subprocess.Popen[str]) -> int:
    for line in process.stderr or ():
        if found := _ADDRESS.search(line):
            return int(found[1])
    raise SystemExit("the server did not start")


async def answer_only(scope: Any, receive: Any, send: Any) -> None:
    """Read the body, and answer as many bytes as a row has."""
    await read_body(receive)
    await answer(send, b"x" * _ANSWER_BYTES)


async def call_and_answer(scope: Any, receive: Any, send: Any) -> None:
    """Enqueue what the body asks for, and answer the row."""
    row = await enqueue(**json.loads(await read_body(receive)))
    await answer(send, json.dumps(row.to_dict()).encode())


async def read_body(receive: Any) -> bytes:
    body, is_left = b"", True
    while is_left:
        message = await receive()
        body += message.get("body", b"")
        is_left = message.get("more_body", False)
    return body


async def answer(send: Any, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve_floor(app: Any) -> None:
    """Serve an application that has no layers, by the same uvicorn with the same options."""
    import uvicorn

    options: dict[str, Any] = {"log_config": None, "access_log": False, "lifespan": "off"}
    config = uvicorn.Config(app, ws="none", server_header=False, **options)
    with socket.create_server(("127.0.0.1", 0), backlog=2_048) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
        asyncio.run(uvicorn.Server(config).serve([listener]))


FLOORS = {"bare": answer_only, "library": call_and_answer}


if __name__ == "__main__":
    main()
