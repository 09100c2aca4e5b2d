"""The databases in which queues are measured: SQLite files, or those of a PostgreSQL server.

Each measurement of each queue gets a fresh one: a copy of one that the queue made once.
"""

from __future__ import annotations

import secrets
import shutil
import sqlite3
from abc import ABC, abstractmethod
from pathlib import Path

from benchmarks.contestants import Queue
from tests.postgres import OwnServer, PostgresServer


class Place(ABC):
    """A kind of database."""

    name: str

    def __init__(self) -> None:
        self._templates: dict[type[Queue], str] = {}

    async def fresh(self, kind: type[Queue]) -> str:
        """Return the location of a database of its own, with the tables of this queue."""
        if kind not in self._templates:
            self._templates[kind] = self._create()
            await kind.create(self._location(self._templates[kind]))
        return self._location(self._create(self._templates[kind]))

    @abstractmethod
    def _create(self, template: str | None = None) -> str:
        """Create a database, empty or as a copy, and return its name."""

    @abstractmethod
    def _location(self, name: str) -> str:
        """Return what ``Queue.open`` takes."""

    @abstractmethod
    def describe(self) -> str:
        """Return the version, the settings of durability, and the file system."""

    @abstractmethod
    def close(self) -> None:
        """Remove the databases."""


class SqlitePlace(Place):
    """Files in one folder."""

    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def _create(self, template: str | None = None) -> str:
        name = f"{secrets.token_hex(8)}.db"
        if template:
            shutil.copyfile(self._folder / template, self._folder / name)
        return name

    def _location(self, name: str) -> str:
        return str(self._folder / name)

    def describe(self) -> str:
        settings = f"WAL, synchronous=FULL, on {file_system(self._folder)}"
        return f"SQLite {sqlite3.sqlite_version} ({settings})"

    def close(self) -> None:
        return


class PostgresPlace(Place):
    """Databases of a server: of the one with this URL, or of one that is started here."""

    name = "PostgreSQL"

    def __init__(self, url: str | None) -> None:
        super().__init__()
        self.server = PostgresServer(url) if url else OwnServer.start(durable=True)
        self._names: list[str] = []

    def _create(self, template: str | None = None) -> str:
        self._names.append(f"benchmark_{secrets.token_hex(4)}")
        self.server.create_database(self._names[-1], template)
        return self._names[-1]

    def _location(self, name: str) -> str:
        return self.server.url(name)

    def vacuum(self, location: str) -> None:
        self.server.execute("VACUUM ANALYZE", database=database_of(location))

    def describe(self) -> str:
        def show(setting: str) -> str:
            return str(self.server.execute(f"SHOW {setting}")[0][0])

        facts = [f"{name}={show(name)}" for name in ("fsync", "synchronous_commit")]
        if isinstance(self.server, OwnServer):
            facts.append(f"on {file_system(self.server.folder)}")
        return f"PostgreSQL {show('server_version')} ({', '.join(facts)})"

    def close(self) -> None:
        if not isinstance(self.server, OwnServer):  # ours goes with all it has
            for name in self._names:
                self.server.drop_database(name)
        self.server.close()


def database_of(location: str) -> str:
    return location.rpartition("/")[2]


def file_system(folder: Path) -> str:
    """Return the type of the file system that has this folder, such as ``ext4`` or ``tmpfs``."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    found = [(len(point), kind) for point, kind in mounts if _is_under(folder.resolve(), point)]
    return max(found)[1]


def _is_under(folder: Path, mount_point: str) -> bool:
    return folder.is_relative_to(mount_point.replace("\\040", " "))
