"""The databases in which the queue is measured: SQLite files, or databases of a PostgreSQL server.

Each measurement gets a fresh one.
"""

from __future__ import annotations

import secrets
import sqlite3
from pathlib import Path
from typing import Protocol

from benchmarks.floor import Floor
from benchmarks.raw_asyncpg import AsyncpgFloor
from benchmarks.raw_sqlite import SqliteFloor
from dgx_music.storage.database import Database
from tests.postgres import OwnServer, PostgresServer


class Place(Protocol):
    """A kind of database, and the floor that it is compared with."""

    name: str
    floor_name: str

    async def fresh(self, driver: str = "") -> Database:
        """Return an empty, migrated database, with this driver or the usual one."""

    async def floor(self, database: Database) -> Floor:
        """Return the raw driver on that database."""

    def describe(self) -> str:
        """Return the version, and the settings of durability."""

    def close(self) -> None:
        """Remove the databases."""


class SqlitePlace:
    """See ``Place``."""

    name = "SQLite"
    floor_name = "raw sqlite3"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def fresh(self, driver: str = "") -> Database:
        database = Database(f"sqlite:///{self._folder / secrets.token_hex(8)}.db")
        await database.migrate()
        return database

    async def floor(self, database: Database) -> Floor:
        if database.path is None:
            raise ValueError("the benchmark needs a file")
        return SqliteFloor(database.path)

    def describe(self) -> str:
        return f"SQLite {sqlite3.sqlite_version} (WAL, synchronous=FULL)"

    def close(self) -> None:
        return


class PostgresPlace:
    """See ``Place``."""

    name = "PostgreSQL"
    floor_name = "raw asyncpg"

    def __init__(self, url: str | None) -> None:
        self.server = PostgresServer(url) if url else OwnServer.start(durable=True)
        self._template = ""
        self._names: list[str] = []

    async def fresh(self, driver: str = "") -> Database:
        if not self._template:
            self._template = self._name()
            template = Database(self.server.create_database(self._template))
            await template.migrate()
            await template.dispose()
        url = self.server.create_database(self._name(), self._template)
        return Database(f"postgresql+{driver or 'asyncpg'}://{url.partition('://')[2]}")

    async def floor(self, database: Database) -> AsyncpgFloor:
        return await AsyncpgFloor.connect(self.server.url(str(database.url.database)))

    def describe(self) -> str:
        def show(setting: str) -> str:
            return str(self.server.execute(f"SHOW {setting}")[0][0])

        durability = ", ".join(
            f"{setting}={show(setting)}" for setting in ("fsync", "synchronous_commit")
        )
        return f"PostgreSQL {show('server_version')} ({durability})"

    def close(self) -> None:
        if not isinstance(self.server, OwnServer):  # ours goes with all it has
            for name in self._names:
                self.server.drop_database(name)
        self.server.close()

    def _name(self) -> str:
        self._names.append(f"benchmark_{secrets.token_hex(4)}")
        return self._names[-1]
