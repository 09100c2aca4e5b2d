"""``dgx-music web`` as a process: where it listens, who may ask, and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dgx_music.web.server import Listening, listen
from tests.patience import PATIENCE

ADDRESS = re.compile(r"(http://\S+)/v1")


class Server:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def read_until(self, pattern: str) -> re.Match[str]:
        """Read what it says until a line fits."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(self.lines)

    @property
    def address(self) -> str:
        for line in self.lines:
            if found := ADDRESS.search(line):
                return found[1]
        return self.read_until(ADDRESS.pattern)[1]

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


Start = Callable[..., Server]


@pytest.fixture
def variables(sqlite_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of the commands: an empty database, and an engine that needs no weights."""
    return {
        **os.environ,
        "DGX_MUSIC_DATABASE_URL": sqlite_url,
        "DGX_MUSIC_OUTPUT": str(tmp_path / "audio"),
        "DGX_MUSIC_ENGINE": "tone",
        "DGX_MUSIC_HEARTBEAT_SECONDS": "0.1",
        "DGX_MUSIC_POLL_SECONDS": "0.2",
        "DGX_MUSIC_GRACE_SECONDS": "2",
    }


@pytest.fixture
def start(variables: dict[str, str]) -> Iterator[Start]:
    """Starts servers on a free port; none outlives the test."""
    servers: list[Server] = []

    def run(*arguments: str) -> Server:
        command = [sys.executable, "-m", "dgx_music.cli", "web", "--port", "0", *arguments]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
        servers.append(Server(process))
        return servers[-1]

    yield run
    for server in servers:
        server.process.kill()
        server.process.communicate(timeout=PATIENCE)


def token(variables: dict[str, str]) -> str:
    command = [sys.executable, "-m", "dgx_music.cli", "token", "create", "shop"]
    return subprocess.run(
        command, env=variables, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_this_machine_until_a_signal(start: Start, number: int) -> None:
    server = start()

    status, row = server.ask("/v1/generations", {"prompt": "lofi rain"})

    assert (status, row["status"]) == (202, "pending")
    assert "everybody on this machine" in server.lines[-1]
    assert server.end(number) == 0


def test_no_part_of_an_answer_waits_for_the_receipt_of_another() -> None:
    with listen(Listening(port=0)) as listener, socket.socket() as client:
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "arguments", [["--host", "0.0.0.0"], ["--allowed-hosts", "music.example"], ["--host", "::"]]
)
def test_it_refuses_to_be_open_to_others(start: Start, arguments: list[str]) -> None:
    server = start(*arguments)

    assert server.process.wait(PATIENCE) == 2
    assert server.process.stderr is not None
    (line,) = server.process.stderr.read().splitlines()
    assert "there is no valid token; make one with `dgx-music token create" in line


def test_others_need_a_token(start: Start, variables: dict[str, str]) -> None:
    secret, server = token(variables), start("--host", "0.0.0.0")

    port = server.address.rpartition(":")[2]
    host = f"127.0.0.1:{port}"
    assert server.ask("/v1/models", Host=host)[0] == 401
    assert server.ask("/v1/models", Host=host, Authorization=f"Bearer {secret}")[0] == 200
    assert server.ask("/v1/models", Host="evil.example")[0] == 421
    assert "everybody" not in server.lines[-1]


def test_the_address_may_be_in_use(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        server = start("--port", str(other.getsockname()[1]))

        assert server.process.wait(PATIENCE) == 2
    assert server.process.stderr is not None
    assert "choose another address" in server.process.stderr.read()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "99999"],
        ["--port", "-1"],
        ["--requests-per-second", "-1"],
        ["--most-streams", "0"],
        ["--max-upload-mb", "101"],
    ],
)
def test_a_wrong_option_ends_with_2(start: Start, arguments: list[str]) -> None:
    assert start(*arguments).process.wait(PATIENCE) == 2


def test_a_request_that_waits_ends_with_the_server(start: Start) -> None:
    server, answers = start(), []
    server.ask("/healthz")

    def post() -> None:
        answers.append(server.ask("/v1/generations", {"prompt": "a"}, Prefer="wait=60"))

    posting = threading.Thread(target=post)
    posting.start()
    while server.ask("/v1/stats")[1]["total_generations"] == 0:
        time.sleep(0.01)
    began = time.monotonic()
    code = server.end()
    posting.join(PATIENCE)

    assert code == 0
    assert [(status, row["status"]) for status, row in answers] == [(202, "pending")]
    assert time.monotonic() - began < 10


def test_streams_end_with_the_server(start: Start) -> None:
    server = start()
    with urllib.request.urlopen(server.address + "/v1/events", timeout=PATIENCE) as stream:
        assert stream.readline() == b"retry: 2000\n"
        began = time.monotonic()
        assert server.end() == 0
        stream.read()

    assert time.monotonic() - began < 5


MOUNTED = """
import os, uvicorn
from fastapi import FastAPI
from dgx_music.web import Access, music_lifespan, music_router

async def who() -> Access:
    return Access("read")

app = FastAPI(lifespan=music_lifespan)
app.include_router(music_router(who), prefix="/music")
uvicorn.run(app, fd=int(os.environ["LISTENER"]), log_config=None)
"""


def test_streams_end_with_another_applications_server(variables: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, number = listener.getsockname()[1], listener.fileno()
        server = subprocess.Popen(
            [sys.executable, "-c", MOUNTED],
            env={**variables, "LISTENER": str(number)},
            pass_fds=[number],
        )
    try:
        address = f"http://127.0.0.1:{port}/music/v1/events"
        with urllib.request.urlopen(address, timeout=PATIENCE) as stream:
            assert stream.readline() == b"retry: 2000\n"
            server.terminate()
            stream.read()
        server.wait(PATIENCE)
    finally:
        server.kill()
        server.wait()


def test_a_worker_beside_it_makes_the_music(start: Start) -> None:
    server = start("--with-worker")
    _, row = server.ask("/v1/generations", {"prompt": "lofi rain", "duration": 1}, Prefer="wait=60")

    assert row["status"] == "completed"
    with urllib.request.urlopen(server.address + row["urls"]["audio"], timeout=PATIENCE) as audio:
        assert audio.read(4) == b"RIFF"
    (worker,) = server.ask("/v1/workers")[1]["workers"]
    assert server.end() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(worker["pid"], 0)


def find_worker(server: Server) -> int:
    """Return the worker's process, once it has said that it is there."""
    while not (workers := server.ask("/v1/workers")[1]["workers"]):
        time.sleep(0.05)
    return int(workers[0]["pid"])


def test_it_says_that_its_worker_has_died_and_goes_on(start: Start) -> None:
    server = start("--with-worker")

    os.kill(find_worker(server), signal.SIGKILL)

    server.read_until("The worker has ended by signal 9, so nothing is made")
    assert server.ask("/healthz")[0] == 200
    assert server.end() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell the child")
def test_the_worker_ends_with_it_even_if_it_is_killed(start: Start) -> None:
    server = start("--with-worker")
    worker = find_worker(server)

    server.process.kill()

    began = time.monotonic()
    while is_alive(worker):
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(") ")[2][0] != "Z"
