"""Fixtures of every test: a clean environment, and a migrated database of each kind."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dgx_music.storage import close_db, init_db
from dgx_music.storage.database import Database

DATABASE_KINDS = ["sqlite"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the settings of whoever runs the tests."""
    for name in [*os.environ]:
        if name.startswith("DGX_MUSIC_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied: a migration takes longer than most tests."""
    path = tmp_path_factory.mktemp("migrated") / "test.db"

    async def make() -> None:
        database = Database(f"sqlite:///{path}")
        await database.migrate()
        await database.dispose()

    with asyncio.Runner() as runner:
        runner.run(make())
    return path


@pytest.fixture(params=DATABASE_KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty, migrated database."""
    shutil.copy(request.getfixturevalue("migrated_file"), tmp_path / "test.db")
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An empty, migrated database."""
    database = Database(database_url)
    yield database
    await database.dispose()


@pytest.fixture
async def default_database(database_url: str) -> AsyncIterator[Database]:
    """An empty, migrated database that ``get_session`` and the public coroutines use."""
    yield await init_db(database_url)
    await close_db()
