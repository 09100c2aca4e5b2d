"""Fixtures of every test: a clean environment, and a migrated database of each kind."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from dgx_music.storage import close_db, init_db
from dgx_music.storage.database import Database
from tests.factories import DATABASE_KINDS, with_driver

if TYPE_CHECKING:
    from tests.postgres import PostgresServer

# Tests run side by side, and toy models are too small to share: threads of torch that wait for each other would take
# most of the processors' time. The processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise each of the many processes that tests start compiles the package again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# In the background of a script, or under nohup, these are ignored, and a program that ignores them is started ignoring
# them. One that handles them is not, so the processes that tests start hear the signals that tests send.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)

pytest_plugins = ["tests.postgres", "tests.daemons"]

hypothesis.settings.register_profile("patient", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--both-drivers", action="store_true", help="run what is marked any_driver with psycopg too"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked ``any_driver`` and would run with the second driver."""
    if config.getoption("--both-drivers"):
        return
    left_out = [
        item
        for item in items
        if item.get_closest_marker("any_driver") and _driver(item) == "psycopg"
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_finish() -> None:
    """Keep what is there by now out of every search for garbage: thousands of tests, and torch."""
    gc.collect()
    gc.freeze()


def _driver(item: pytest.Item) -> object:
    params = (
        item.callspec.params
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
        else {}
    )
    return params.get("database_url") or params.get("empty_url")


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

    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_template(postgres: PostgresServer) -> Iterator[str]:
    """The name of a migrated PostgreSQL database, to be copied likewise."""
    name = f"template_{secrets.token_hex(4)}"
    _migrate(postgres.create_database(name))
    yield name
    postgres.drop_database(name)


@pytest.fixture
def sqlite_url(migrated_file: Path, tmp_path: Path) -> str:
    """The URL of an empty, migrated SQLite file."""
    shutil.copy(migrated_file, tmp_path / "test.db")
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def postgres_url(postgres: PostgresServer, migrated_template: str) -> Iterator[str]:
    """The URL of an empty, migrated PostgreSQL database."""
    name = f"test_{secrets.token_hex(4)}"
    yield postgres.create_database(name, template=migrated_template)
    postgres.drop_database(name)


@pytest.fixture(params=DATABASE_KINDS)
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty, migrated database, of each kind in turn; ``factories.on`` says of which."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    return with_driver(request.getfixturevalue("postgres_url"), request.param)


@pytest.fixture(params=DATABASE_KINDS)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database of each kind in which there is nothing at all."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    name = f"empty_{secrets.token_hex(4)}"
    yield with_driver(server.create_database(name), request.param)
    server.drop_database(name)


@pytest.fixture
async def empty_database(empty_url: str) -> AsyncIterator[Database]:
    """A database in which there is nothing at all."""
    database = Database(empty_url)
    yield database
    await database.dispose()


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


def _migrate(url: str) -> None:
    async def migrate() -> None:
        database = Database(url)
        await database.migrate()
        await database.dispose()

    with asyncio.Runner() as runner:
        runner.run(migrate())
