"""The file that a SQLite connection has open, and whether that file still has its name.

If somebody replaces, deletes or moves a database under a running program, its connections stay in a
file that nobody will open again. So each connection remembers its file and its log (device and
inode). They are compared before a transaction begins, and after a commit, before the caller hears
of it.

SQLite also forbids to carry a connection through a fork: idle connections are closed before it, and
opened again after it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import ConnectionPoolEntry

from dgx_music.files import create_file
from dgx_music.storage.connection import sqlite_changes
from dgx_music.storage.connection.snapshots import snapshot
from dgx_music.storage.connection.sqlite_changes import Place, find_place

_OPENED = "dgx_music_opened"
_IS_SECOND = "dgx_music_is_second"
_LEAVE_SECONDS = 5.0
_CHECKPOINT_SECONDS = 2.0
GONE = "its file is gone; put it back, or make a new one: dgx-music db init"
_MOVED = (
    "its file was replaced or deleted meanwhile, and what was being written went with it; try again"
)
_IN_THE_WAY = "its file or its log (-wal) was replaced while others use it; stop them all, and start them again"
_FORKED = "this process was forked while a transaction was open in it; fork before or after, or start it as a new process"


@dataclass(eq=False)
class _Opened:
    """One connection: the file that it has open, and whether somebody uses it."""

    driver: Any
    file: Place
    log_name: str
    log: Place
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    is_used: bool = True
    is_waiting: bool = False
    is_left: bool = False
    """Nobody must use it any more."""
    is_closed: bool = False

    def close(self) -> None:
        """Close it, in its own thread."""
        self.driver._conn.close()
        self.is_closed = True


class DatabaseFile:
    """The file of one database, and this process's connections to it.

    ``is_known`` is true when it was opened: from then on nobody creates an empty file in its place.
    A file that ``is_private`` is created for its owner alone.
    """

    def __init__(self, path: Path, *, is_private: bool) -> None:
        self.path = path.absolute()
        self.is_private = is_private
        self.is_known = False
        self._opened: set[_Opened] = set()
        self._was_forked_in_use = False
        _files.add(self)

    def attach(self, engine: Engine) -> None:
        """Have this object open the engine's connections, and check them before each use."""
        event.listen(engine, "do_connect", self._open)
        event.listen(engine, "connect", self._note)
        event.listen(engine, "checkout", self._look)
        event.listen(engine, "checkin", self._rest)
        event.listen(engine, "close", self._forget)

    @property
    def is_gone(self) -> bool:
        """True if the file existed and nothing has its name now."""
        return self.is_known and find_place(self.path) is None

    @property
    def waits_for_lock(self) -> bool:
        """True while a transaction of this process waits to begin, since another process writes."""
        return any(opened.is_waiting for opened in tuple(self._opened))

    def check(self, connection_info: dict[str, Any]) -> None:
        """Raise if the file to which this connection has committed has lost its name."""
        opened: _Opened = connection_info[_OPENED]
        if not self._is_in_place(opened):
            self._leave(opened)
            raise sqlite3.OperationalError(_MOVED)

    def take(self, entry: ConnectionPoolEntry) -> bool:
        """Mark a connection as used, and return True, if it is good and its file has its name."""
        opened: _Opened = entry.info[_OPENED]
        with turn:
            opened.is_used = not opened.is_left and self._is_in_place(opened)
        return opened.is_used

    def give_back(self, entry: ConnectionPoolEntry) -> None:
        """Mark a connection as not used."""
        if isinstance(opened := entry.info.get(_OPENED), _Opened):
            opened.is_used = False

    def rest(self) -> None:
        """Close every connection that nobody uses, from any thread."""
        with turn:
            resting = [
                opened for opened in tuple(self._opened) if not (opened.is_used or opened.is_left)
            ]
            for opened in resting:
                opened.is_left = True
        for done in [_call_soon(opened, opened.close) for opened in resting]:
            done.wait(_LEAVE_SECONDS)

    def close_ended(self) -> None:
        """Close the connections of event loops that are closed."""
        for opened in [opened for opened in tuple(self._opened) if opened.loop.is_closed()]:
            self._opened.discard(opened)
            stopping = threading.Thread(
                target=opened.driver.stop
            )  # in a separate thread it calls no event loop
            stopping.start()
            stopping.join()

    def after_fork(self) -> list[Any]:
        """In the child: forget all connections and return them; they must never be used again."""
        inherited, self._opened = list(self._opened), set()
        self._was_forked_in_use |= not all(opened.is_closed for opened in inherited)
        return inherited

    def _open(
        self, _dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]
    ) -> None:
        """Fail here if the file cannot be opened, not in the driver's thread."""
        if self._was_forked_in_use:
            raise sqlite3.OperationalError(_FORKED)
        if not self.is_known:
            with suppress(OSError):  # it exists, or SQLite will say why it cannot
                create_file(Path(os.path.realpath(self.path)), is_private=self.is_private)
        arguments[0] = f"{self.path.as_uri()}?mode=rw"
        options["uri"] = True
        try:
            sqlite3.connect(arguments[0], uri=True).close()
        except sqlite3.OperationalError:
            if self.is_gone:
                raise sqlite3.OperationalError(GONE) from None
            raise
        record.info[_OPENED] = find_place(self.path)

    def _note(self, connection: Any, record: Any) -> None:
        """Remember the file that was opened: the one with the name both before and after."""
        cursor = connection.cursor()
        cursor.execute("SELECT 1 FROM sqlite_master LIMIT 1")  # the first read opens the log
        cursor.fetchall()
        cursor.close()
        file, log_name = find_place(self.path), f"{os.path.realpath(self.path)}-wal"
        if file is None or file != record.info[_OPENED]:
            connection.close()
            raise sqlite3.OperationalError(_MOVED)
        driver = connection.driver_connection
        opened = record.info[_OPENED] = _Opened(driver, file, log_name, find_place(log_name))
        self._opened.add(opened)
        self.is_known = True

    def _look(self, _connection: Any, record: Any, _proxy: Any) -> None:
        """Mark a connection as used; if its file has lost its name, have one other made instead."""
        opened: _Opened = record.info[_OPENED]
        is_good = self.take(record)
        is_second = record.record_info.pop(_IS_SECOND, False)
        if is_good:
            return
        if not opened.is_left:
            self._leave(opened)
        if is_second:
            raise sqlite3.OperationalError(_MOVED)
        record.record_info[_IS_SECOND] = True
        raise InvalidatePoolError

    def _leave(self, opened: _Opened) -> None:
        """Give up a file that was replaced or lost its log, after its log is written into it."""
        paused = sqlite_changes.pause(self.path)
        try:
            if self._has_stray_log(opened) and not _Checkpoint(opened).run():
                raise sqlite3.OperationalError(_IN_THE_WAY)
            self.rest()
        finally:
            sqlite_changes.resume(paused)

    def _has_stray_log(self, opened: _Opened) -> bool:
        """Return True if the log must be emptied: it is beside another file, or deleted."""
        is_same_file = opened.file == find_place(self.path)
        log = find_place(opened.log_name)
        return log is None if is_same_file else log == opened.log

    def _rest(self, _connection: Any, record: Any) -> None:
        self.give_back(record)

    def _forget(self, _connection: Any, record: Any) -> None:
        if isinstance(opened := record.info.get(_OPENED), _Opened):
            self._opened.discard(opened)

    def _is_in_place(self, opened: _Opened) -> bool:
        return opened.file == find_place(self.path) and (
            opened.log is None or opened.log == find_place(opened.log_name)
        )


class _Checkpoint:
    """Writes the log into the file that the connection has open, whatever its name is now."""

    def __init__(self, opened: _Opened) -> None:
        self._opened = opened
        self._is_empty = False

    def run(self) -> bool:
        """Return True if the log is empty now: no other process prevented it."""
        _call_soon(self._opened, self._write).wait(_LEAVE_SECONDS)
        return self._is_empty

    def _write(self) -> None:
        raw = self._opened.driver._conn
        raw.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_SECONDS * 1000:.0f}")
        is_busy, *_ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._is_empty = not is_busy


@contextmanager
def waiting(connection_info: dict[str, Any]) -> Iterator[None]:
    """Note that the connection waits for the lock while the block runs."""
    opened = connection_info.get(_OPENED)
    if not isinstance(opened, _Opened):  # an engine of the caller's own
        yield
        return
    opened.is_waiting = True
    try:
        yield
    finally:
        opened.is_waiting = False


def session_class(file: DatabaseFile) -> type[Session]:
    """Return a class of sessions that raise after a commit to a file that is gone."""

    class FileSession(Session):
        pass

    def begin(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
        session.info[_OPENED] = connection.info

    def commit(session: Session) -> None:
        if (info := session.info.pop(_OPENED, None)) is not None:
            file.check(info)

    event.listen(FileSession, "after_begin", begin)
    event.listen(FileSession, "after_commit", commit)
    return FileSession


def rest_all() -> None:
    """Close every connection of this process that nobody uses, before a fork."""
    for file in snapshot(_files):
        file.rest()


def close_ended() -> None:
    """Close the connections of event loops that are closed."""
    for file in snapshot(_files):
        file.close_ended()


def after_fork() -> list[Any]:
    """In the child: ``DatabaseFile.after_fork`` for every file, and a new lock."""
    global turn
    turn = threading.RLock()
    return [opened for file in snapshot(_files) for opened in file.after_fork()]


def _call_soon(opened: _Opened, work: Any) -> threading.Event:
    """Do the work in the connection's own thread; the event is set when it has ended."""
    done = threading.Event()

    def run() -> None:
        try:
            with suppress(sqlite3.Error):
                work()
        finally:
            done.set()

    opened.driver._tx.put_nowait((None, run))
    return done


turn = threading.RLock()
"""Held while a connection is marked as used, and from before a fork until after it."""

_files: WeakSet[DatabaseFile] = WeakSet()
