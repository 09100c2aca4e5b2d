"""SQLite's recipe, applied by ``configure_sqlite``.

A deferred transaction that reads and then writes fails at once with "database is locked" whatever the timeout, so writing
transactions start with BEGIN IMMEDIATE; ``synchronous=FULL`` because NORMAL loses acknowledged rows when the power fails;
WAL so that readers never wait.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import URL, Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from dgx_music.durability import flush_folder, give_name
from dgx_music.modes import create_file
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.connection.sqlite_file import DatabaseFile, waiting

READ_ONLY = "dgx_music_read_only"
"""Execution option of a connection whose transactions only read: they begin deferred and never wait for a writer."""

_BUSY_TIMEOUT_SECONDS = 30
_READERS = 4
_LEAST_FREE_BYTES = 65_536
"""SQLite lets the index of its log, beside the database, grow by half as much at once."""
_ERRORS_OF_WRITING = {
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_DELETE,
}


def create_engines(url: URL, file: DatabaseFile | None) -> tuple[AsyncEngine, AsyncEngine]:
    """Return the engine of writing and that of reading sessions; the same one where the database is in memory (no file).

    One connection writes, so that this process's writers queue fairly instead of polling each other's lock, and a few
    others read.
    """
    writing = _create_engine(url, connections=1)
    if file is None:
        return writing, writing
    reading = _create_engine(url, _READERS)
    for engine in (writing, reading):
        file.attach(engine.sync_engine)
    event.listen(reading.sync_engine, "connect", _refuse_writes)
    return writing, reading.execution_options(**{READ_ONLY: True})


def configure_sqlite(engine: AsyncEngine) -> None:
    """Give an engine of the caller's own the settings that a SQLite database of ours needs."""
    event.listen(engine.sync_engine, "connect", _set_up_connection)
    event.listen(engine.sync_engine, "begin", _begin)


def is_unavailable(error: BaseException) -> bool:
    """Tell a database that cannot be used from a mistake in using it; the plain class is SQLite's for a damaged file."""
    # The first comes from _begin, which nothing wraps.
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def known_reason(error: BaseException, path: Path) -> str | None:
    """Return what SQLite says of a full disk where it only says that it could not write; ``None`` for all else."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
    is_full = code & 0xFF == sqlite3.SQLITE_IOERR and _find_free_bytes(path.parent) < _LEAST_FREE_BYTES
    return "database or disk is full" if is_full else None


def _find_free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


def warn_of_old_sqlite() -> str | None:
    """Return a sentence where the SQLite library has the WAL-reset bug, fixed in 3.51.3; ``None`` where it has not."""
    if sqlite3.sqlite_version_info >= (3, 51, 3):
        return None
    return f"SQLite {sqlite3.sqlite_version} is older than 3.51.3, which fixed a rare WAL bug; memory mapping is off."


def _create_engine(url: URL, connections: int) -> AsyncEngine:
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"timeout": _BUSY_TIMEOUT_SECONDS},
    )
    configure_sqlite(engine)
    return engine


def _refuse_writes(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _set_up_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver opens no transactions of its own; _begin does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_SECONDS * 1000}")
    _switch_to_wal(connection, cursor)
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA mmap_size = 0")  # SQLite before 3.51.3 can corrupt a memory-mapped WAL database
    cursor.close()


def _switch_to_wal(connection: Any, cursor: Any) -> None:
    """Switch, as patiently as for any lock: of two that switch a new file at once, SQLite refuses one without waiting."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            connection.run_async(lambda _driver: asyncio.sleep(0.01))


def _begin(connection: Connection) -> None:
    """Begin on the driver's own connection: one trip to its thread where a statement takes three."""
    statement = "BEGIN" if connection.get_execution_options().get(READ_ONLY, False) else "BEGIN IMMEDIATE"
    driver: Any = connection.connection.dbapi_connection
    with waiting(connection):
        driver.run_async(lambda raw: raw.execute(statement))


def back_up(source: Path, target: Path) -> None:
    """Write a database as it is at this moment into a new file, whoever is writing meanwhile.

    Nothing has the file's name before it is whole; where the file system has no links, an empty file has it for a moment.
    Raises ``OSError`` for the target, ``sqlite3.Error`` for the source.
    """
    target = target.absolute()
    part = target.with_name(f"{target.name}.part-{uuid4().hex[:8]}")
    create_file(part, is_private=True)
    try:
        _copy(source, part)
        give_name(part, target, is_private=True)
    finally:
        part.unlink(missing_ok=True)
    flush_folder(target.parent)


def is_ours(source: Path) -> bool:
    """Return whether the file has the tables of some version of ours; nothing is written."""
    with closing(_open_to_read(source)) as connection:
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(connection.execute(query, (VERSION_TABLE,)).fetchone()[0])


def _copy(source: Path, target: Path) -> None:
    with closing(_open_to_read(source)) as from_source, closing(sqlite3.connect(target)) as to_target:
        try:
            to_target.execute("PRAGMA synchronous = FULL")
            from_source.backup(to_target)
            to_target.execute("PRAGMA journal_mode = DELETE")  # one file, with nothing beside it
        except sqlite3.Error as error:
            raise _of_the_target(error) from error


def _open_to_read(source: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_TIMEOUT_SECONDS)


def _of_the_target(error: sqlite3.Error) -> Exception:
    """Return an ``OSError`` for an error of writing, which is the copy's, since the source is only read; else the error."""
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if error.sqlite_errorcode in _ERRORS_OF_WRITING:  # SQLite does not say which; one is EFBIG
        return OSError(errno.EIO, "disk error, or a limit on the size of a file")
    return error
