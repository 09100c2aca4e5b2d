"""A real S3-speaking server in a process of its own, and an HTTP proxy before it that fails when a test says so."""

from __future__ import annotations

import http.client
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple, Self
from uuid import uuid4

import anyio.lowlevel
import pytest

BUCKET = "music"
_MILLISECOND = timedelta(milliseconds=1)
HANG, LOSE_REPLY, LOSE_REQUEST, CUT = "hang", "lose reply", "lose request", "cut"
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "server", "date"}


@contextmanager
def run_server() -> Iterator[int]:
    """Run moto's server with an empty bucket and give its port."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            port = _read_port(process)
            assert send(port, "PUT", f"/{BUCKET}").status == 200
            yield port
        finally:
            process.kill()


def _read_port(process: subprocess.Popen[str]) -> int:
    """Wait until the server says where it listens; then let it talk to nobody."""
    log = process.stderr
    assert log is not None
    port = next(int(found[1]) for line in log if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
    threading.Thread(target=log.read, name="server's log", daemon=True).start()
    return port


@pytest.fixture(scope="session", name="s3_port")
def s3_port_fixture() -> Iterator[int]:
    with run_server() as port:
        yield port


@pytest.fixture(name="s3")
def s3_fixture(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in the store, which the environment leads to."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    use_port(s3_port, monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    return f"s3://{BUCKET}/{uuid4()}"


@pytest.fixture(name="proxy")
def proxy_fixture(s3: str, s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy that the environment leads to; hung replies are given up soon, and three rounds take no time."""
    quick = {
        "max_retries": 2,
        "backoff": {"init_backoff": _MILLISECOND, "max_backoff": _MILLISECOND, "base": 2},
    }
    monkeypatch.setattr("dgx_music.artifacts.objects.RETRY", quick)
    monkeypatch.setattr("dgx_music.artifacts.objects.PATIENCE_SECONDS", 2.0)
    skip_waits(monkeypatch)
    monkeypatch.setenv("AWS_TIMEOUT", "300 ms")
    with Proxy(s3_port) as proxy:
        use_port(proxy.server_port, monkeypatch)
        yield proxy


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have the waits between rounds take no time but on the clock that they are counted by; return what was waited."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await anyio.lowlevel.checkpoint()

    monkeypatch.setattr("dgx_music.artifacts.objects.sleep", sleep)
    monkeypatch.setattr("dgx_music.artifacts.objects.monotonic", lambda: sum(waits))
    return waits


def use_port(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


class Reply(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes


def send(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Reply:
    """Send one request to the port and return the reply."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        return Reply(reply.status, reply.getheaders(), reply.read())
    finally:
        connection.close()


class Seen(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a port and notes them; ``fail`` says what becomes of the next ones of a method.

    A fault is a status that the server would never see the request for, or one of ``HANG`` (no reply, ever),
    ``LOSE_REPLY`` (carried out, then the line is cut), ``LOSE_REQUEST`` and ``CUT`` (half of the reply's body).
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.seen: list[Seen] = []
        self.released = threading.Event()
        self.arrived = threading.Event()
        self._faults: dict[str, list[int | str]] = {}
        self._plan: tuple[str, dict[str, list[int | str]]] | None = None

    def __enter__(self) -> Self:
        threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.01}, name="proxy"
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    def fail(self, method: str, *faults: int | str) -> None:
        self._faults.setdefault(method, []).extend(faults)

    def plan_after(self, method: str, faults: dict[str, list[int | str]]) -> None:
        """Let the next request of this method pass, and have the faults, by method, from then on."""
        self._plan = method, faults

    def next_fault(self, method: str) -> int | str | None:
        self.arrived.set()
        if self._plan is not None and self._plan[0] == method:
            self._faults, self._plan = self._plan[1], None
            return None
        faults = self._faults.get(method)
        return faults.pop(0) if faults else None

    def count(self, method: str) -> int:
        """Return how many requests of this method have come."""
        return sum(seen.method == method for seen in self.seen)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(
            Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        )
        fault = self.server.next_fault(self.command)
        if isinstance(fault, int):
            return self._answer(Reply(fault, [], b""))
        if fault == HANG:
            self.server.released.wait()
        if fault in (HANG, LOSE_REQUEST):
            return self._hang_up()
        reply = send(self.server.target, self.command, self.path, body, dict(self.headers))
        return self._hang_up() if fault == LOSE_REPLY else self._answer(reply, is_cut=fault == CUT)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

    def _answer(self, reply: Reply, *, is_cut: bool = False) -> None:
        self.send_response_only(reply.status)
        length = len(reply.body)
        for name, value in reply.headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = int(value)
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        self.send_header("Date", self.date_time_string())
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(reply.body[: length // 2] if is_cut else reply.body)
        if is_cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
