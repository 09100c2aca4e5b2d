"""A real browser, and a server with a worker beside it: what the tests of the page need.

They run with ``make test-web`` only. Without Chromium or playwright they are skipped, and say so.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.patience import PATIENCE
from tests.web.test_server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser") if (found := shutil.which(name))), None
)
MISSING = "Chromium is not installed; as root: apt-get install chromium"
EMPTIED = ("generations", "batches", "prompts", "uploads", "clips", "pauses", "tallies")


@pytest.fixture(scope="session")
def browser(migrated_file: Path) -> Iterator[Browser]:
    """Chromium; playwright's event loop runs from now on, so that ours had to end before."""
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip(MISSING)
    with sync.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def environment(folder: Path) -> dict[str, str]:
    """Return the variables of the commands: a database, and an engine that needs no weights."""
    return {
        **os.environ,
        "DGX_MUSIC_DATABASE_URL": f"sqlite:///{folder / 'web.db'}",
        "DGX_MUSIC_OUTPUT": str(folder / "audio"),
        "DGX_MUSIC_ENGINE": "tone",
        "DGX_MUSIC_TONE_SPEED": "8",
        "DGX_MUSIC_HEARTBEAT_SECONDS": "0.2",
        "DGX_MUSIC_POLL_SECONDS": "0.2",
        "DGX_MUSIC_GRACE_SECONDS": "2",
    }


def start(variables: dict[str, str], port: str = "0") -> Server:
    command = [sys.executable, "-m", "dgx_music.cli", "web", "--port", port, "--with-worker"]
    # No test is about how many requests one visitor may make.
    command += ["--requests-per-second", "0"]
    server = Server(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables))
    assert server.address
    return server


def stop(server: Server) -> None:
    server.process.terminate()
    server.process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="session")
def shared(
    migrated_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path]]:
    """One server with a worker for all tests that need none of their own, and its database."""
    folder = tmp_path_factory.mktemp("web")
    shutil.copyfile(migrated_file, folder / "web.db")
    server = start(environment(folder))
    yield server, folder / "web.db"
    stop(server)


@pytest.fixture
def server(shared: tuple[Server, Path]) -> Server:
    """The server that all share, with an empty queue."""
    server, file = shared
    with closing(sqlite3.connect(file, timeout=PATIENCE)) as database, database:
        database.execute("PRAGMA foreign_keys = ON")
        for table in EMPTIED:
            database.execute(f"DELETE FROM {table}")
    return server


@pytest.fixture
def variables(migrated_file: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a server of the test's own: an empty database."""
    shutil.copyfile(migrated_file, tmp_path / "web.db")
    return environment(tmp_path)


@pytest.fixture
def serve(variables: dict[str, str]) -> Iterator[Callable[..., Server]]:
    """Starts servers with a worker; none outlives the test."""
    servers: list[Server] = []

    def run(port: str = "0") -> Server:
        servers.append(start(variables, port))
        return servers[-1]

    yield run
    for each in servers:
        stop(each)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages in browsers of their own; at the end no console has said anything."""
    contexts: list[BrowserContext] = []
    said: list[str] = []
    expected = ["Password forms should have"]  # a hint of Chromium

    def open_page(url: str, *, may_say: str | None = None, **options: Any) -> Page:
        context = browser.new_context(reduced_motion="reduce", **options)
        context.set_default_timeout(PATIENCE * 1_000)
        contexts.append(context)
        expected.extend([may_say] if may_say else [])
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: dialog.type == "confirm" or said.append(dialog.message))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [line for line in said if not any(each in line for each in expected)] == []


@pytest.fixture
def page(visit: Callable[..., Page], server: Server) -> Page:
    """The page of an empty queue, once it is live."""
    opened = visit(server.address)
    opened.wait_for_selector("#live[data-state=live]")
    return opened
