"""The settings of SQLite, applied by ``configure_sqlite``, and copies of a SQLite file.

Writing transactions start with BEGIN IMMEDIATE: a deferred one that reads and then writes fails at
once with "database is locked", whatever the timeout. ``synchronous=FULL``, because NORMAL loses
acknowledged rows when the power fails. WAL, so that readers never wait.
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

from dgx_music.files import create_file, flush_folder, give_name
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.connection.sqlite_file import DatabaseFile, waiting
from dgx_music.storage.connection.warm_pool import WarmPool

READ_ONLY = "dgx_music_read_only"
"""Execution option of a connection that only reads: it never waits for a writer."""

_BUSY_TIMEOUT_SECONDS = 30
_READERS = 4
_LEAST_FREE_BYTES = 65_536
"""Twice what the index of SQLite's log, beside the database, grows by at once."""
_ERRORS_OF_WRITING = {
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_FSYNC,
    sqlite3.SQLITE_IOERR_DIR_FSYNC,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_DELETE,
}


def create_engines(url: URL, file: DatabaseFile | None) -> tuple[AsyncEngine, AsyncEngine]:
    """Return the engines of writing and of reading sessions; one for both in memory.

    One connection writes, so that the writers of this process queue fairly instead of polling each
    other's lock; a few others read. ``file`` is ``None`` for a database in memory.
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
    """Give the caller's own engine the settings that our SQLite databases need."""
    event.listen(engine.sync_engine, "connect", _set_up_connection)
    event.listen(engine.sync_engine, "begin", _begin)


def is_unavailable(error: BaseException) -> bool:
    """Return True if the database cannot be used, False for a mistake in using it."""
    # Nothing wraps the first: it comes from _begin. SQLite raises the plain class for a damaged file.
    return isinstance(error, sqlite3.OperationalError) or type(error) is sqlite3.DatabaseError


def known_reason(error: BaseException, path: Path) -> str | None:
    """Return "database or disk is full" if a full disk caused this write error, else ``None``."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", 0)
    if code & 0xFF != sqlite3.SQLITE_IOERR or _find_free_bytes(path.parent) >= _LEAST_FREE_BYTES:
        return None
    return "database or disk is full"


def _find_free_bytes(folder: Path) -> float:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return math.inf


def warn_of_old_sqlite() -> str | None:
    """Return a warning if the SQLite library has the WAL-reset bug, or ``None``."""
    if sqlite3.sqlite_version_info >= (3, 51, 3):
        return None
    version = f"SQLite {sqlite3.sqlite_version}"
    return f"{version} is older than 3.51.3, which fixed a rare WAL bug; memory mapping is off."


def _create_engine(url: URL, connections: int) -> AsyncEngine:
    engine = create_async_engine(
        url,
        poolclass=WarmPool,
        pool_size=connections,
        max_overflow=0,
        pool_reset_on_return=None,
        connect_args={"timeout": _BUSY_TIMEOUT_SECONDS},
    )
    event.listen(engine.sync_engine, "reset", _roll_back_if_begun)
    configure_sqlite(engine)
    return engine


def _roll_back_if_begun(connection: Any, _record: Any, _state: Any) -> None:
    """Spare the trip to the connection's thread if nothing is to be rolled back."""
    if connection.driver_connection.in_transaction:
        connection.rollback()


def _refuse_writes(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _set_up_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins no transactions; _begin does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_SECONDS * 1000}")
    _switch_to_wal(connection, cursor)
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    # A statement with a trigger first copies each page that it changes: in files that doubles its time.
    cursor.execute("PRAGMA temp_store = MEMORY")
    cursor.execute("PRAGMA mmap_size = 0")  # SQLite before 3.51.3 can damage a mapped file
    cursor.close()


def _switch_to_wal(connection: Any, cursor: Any) -> None:
    """Switch, and wait if another process switches too: SQLite itself would fail at once."""
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
    """Begin on the driver's own connection: one trip to its thread; a statement takes three."""
    is_reading = connection.get_execution_options().get(READ_ONLY, False)
    statement = "BEGIN" if is_reading else "BEGIN IMMEDIATE"
    driver: Any = connection.connection.dbapi_connection
    with waiting(connection.info):
        driver.run_async(lambda raw: raw.execute(statement))


def back_up(source: Path, target: Path) -> None:
    """Copy a database as it is at this moment into a new file, also while others write.

    The new file gets its name when it is complete; on a file system without links an empty file has
    the name for a moment. Raises ``OSError`` for the target, ``sqlite3.Error`` for the source.
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
    """Return True if the file has our tables, of any version; writes nothing."""
    with closing(_open_to_read(source)) as connection:
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
        return bool(connection.execute(query, (VERSION_TABLE,)).fetchone()[0])


def _copy(source: Path, target: Path) -> None:
    with (
        closing(_open_to_read(source)) as from_source,
        closing(sqlite3.connect(target)) as to_target,
    ):
        try:
            to_target.execute("PRAGMA synchronous = FULL")
            from_source.backup(to_target)
            to_target.execute("PRAGMA journal_mode = DELETE")  # one file, no log beside it
        except sqlite3.Error as error:
            raise _of_the_target(error) from error


def _open_to_read(source: Path) -> sqlite3.Connection:
    uri = f"{source.absolute().as_uri()}?mode=ro"
    return sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_SECONDS)


def _of_the_target(error: sqlite3.Error) -> Exception:
    """Return an ``OSError`` for an error of writing: only the copy is written."""
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if error.sqlite_errorcode in _ERRORS_OF_WRITING:  # SQLite does not say which
        return OSError(errno.EIO, "disk error, or a limit on the size of a file")
    return error
