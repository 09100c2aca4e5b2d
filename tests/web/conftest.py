"""An API on each kind of database, without a server: requests go straight to the application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from dgx_music.client.tokens import create_token
from dgx_music.storage.database import Database
from dgx_music.web import WebOptions, create_app

HOST = "http://127.0.0.1:8321"
Connect = Callable[..., httpx.AsyncClient]


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the audio."""
    monkeypatch.setenv("DGX_MUSIC_OUTPUT", str(tmp_path / "audio"))
    return tmp_path / "audio"


@pytest.fixture
async def connect(default_database: Database, output: Path) -> AsyncIterator[Connect]:
    """Returns a client of an application, by default of one that is open to everybody."""
    async with AsyncExitStack() as clients:

        def make(app: FastAPI | None = None, token: str | None = None, **options):
            app = app or create_app(options=WebOptions(is_open=token is None, **options))
            # a mistake of ours is an answer too
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            client = httpx.AsyncClient(transport=transport, base_url=HOST, headers=headers)
            clients.push_async_callback(client.aclose)
            return client

        yield make


@pytest.fixture
async def client(connect: Connect) -> httpx.AsyncClient:
    """A client of an application that is open to everybody."""
    return connect()


@pytest.fixture
def holding(connect: Connect) -> Callable[..., object]:
    """Returns a client that sends a new token of this role, and tenant if one is given."""
    count = 0

    async def make(role: str, tenant: str | None = None, **options) -> httpx.AsyncClient:
        nonlocal count
        count += 1
        made = await create_token(f"{role}-{count}", role, tenant=tenant)
        return connect(token=made.secret, **options)

    return make
