"""Which file a SQLite connection is open on, and whether that is still the one under its name.

Who replaces, deletes or moves a database under a running program leaves its connections in a file that nobody will ever
open again. So each connection remembers the file it was opened on (device and inode, those of its log as well), and they are
compared before a transaction begins and after a commit, before anybody is told of it.

SQLite also forbids a connection to be carried through a fork: what rests is closed before, and opened again after.
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

from dgx_music.modes import create_file
from dgx_music.storage.connection import sqlite_changes
from dgx_music.storage.connection.snapshots import snapshot
from dgx_music.storage.connection.sqlite_changes import Place, find_place

_OPENED = "dgx_music_opened"
_IS_SECOND = "dgx_music_is_second"
_LEAVE_SECONDS = 5.0
_CHECKPOINT_SECONDS = 2.0
GONE = "its file is gone; put it back, or make a new one: dgx-music db init"
_MOVED = "its file was replaced or deleted meanwhile, and what was being written went with it; try again"
_IN_THE_WAY = "its file or its log (-wal) was replaced while others use it; stop them all, and start them again"
_FORKED = (
    "this process was forked while a transaction was open in it; fork before or after, or start it as a new process"
)


@dataclass(eq=False)
class _Opened:
    """One connection: what it is open on, and whether somebody is using it."""

    driver: Any
    file: Place
    log_name: str
    log: Place
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    is_used: bool = True
    is_waiting: bool = False
    is_left: bool = False
    """Nobody may use it any more."""
    is_closed: bool = False

    def close(self) -> None:
        """Close it, in its own thread."""
        self.driver._conn.close()
        self.is_closed = True


class DatabaseFile:
    """The file of one database, and this process's connections to it.

    ``is_known`` once it was opened: from then on nobody makes an empty one in its place. One that ``is_private`` is made for
    its owner alone.
    """

    def __init__(self, path: Path, *, is_private: bool) -> None:
        self.path = path.absolute()
        self.is_private = is_private
        self.is_known = False
        self._opened: set[_Opened] = set()
        self._was_forked_in_use = False
        _files.add(self)

    def attach(self, engine: Engine) -> None:
        """Have the engine's connections opened here, and looked at before each use."""
        event.listen(engine, "do_connect", self._open)
        event.listen(engine, "connect", self._note)
        event.listen(engine, "checkout", self._look)
        event.listen(engine, "checkin", self._rest)
        event.listen(engine, "close", self._forget)

    @property
    def is_gone(self) -> bool:
        """True where the file was there and has no successor: deleted, or moved away with its folder."""
        return self.is_known and find_place(self.path) is None

    @property
    def waits_for_lock(self) -> bool:
        """True while a transaction of this process waits to begin: somebody else is writing."""
        return any(opened.is_waiting for opened in tuple(self._opened))

    def check(self, connection_info: dict[str, Any]) -> None:
        """Raise where what this connection has just committed is not under the database's name any more."""
        opened: _Opened = connection_info[_OPENED]
        if not self._is_in_place(opened):
            self._leave(opened)
            raise sqlite3.OperationalError(_MOVED)

    def rest(self) -> None:
        """Close every connection that nobody is using, from any thread."""
        with turn:
            resting = [opened for opened in tuple(self._opened) if not (opened.is_used or opened.is_left)]
            for opened in resting:
                opened.is_left = True
        for done in [_call_soon(opened, opened.close) for opened in resting]:
            done.wait(_LEAVE_SECONDS)

    def close_ended(self) -> None:
        """Close the connections of event loops that were closed before them."""
        for opened in [opened for opened in tuple(self._opened) if opened.loop.is_closed()]:
            self._opened.discard(opened)
            stopping = threading.Thread(target=opened.driver.stop)  # in a thread of its own it tells no event loop
            stopping.start()
            stopping.join()

    def after_fork(self) -> list[Any]:
        """In the child: know of no connection; return those there were, which nobody may ever touch."""
        inherited, self._opened = list(self._opened), set()
        self._was_forked_in_use |= not all(opened.is_closed for opened in inherited)
        return inherited

    def _open(self, _dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        """Let a file that cannot be opened fail here: the driver's thread would tell an event loop closed by then."""
        if self._was_forked_in_use:
            raise sqlite3.OperationalError(_FORKED)
        if not self.is_known:
            with suppress(OSError):  # it is there, or SQLite will say why it cannot be
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
        """Remember what was opened: what was under the name both before and after."""
        cursor = connection.cursor()
        cursor.execute("SELECT 1 FROM sqlite_master LIMIT 1")  # the log is opened by the first to read
        cursor.fetchall()
        cursor.close()
        file, log_name = find_place(self.path), f"{os.path.realpath(self.path)}-wal"
        if file is None or file != record.info[_OPENED]:
            connection.close()
            raise sqlite3.OperationalError(_MOVED)
        opened = record.info[_OPENED] = _Opened(connection.driver_connection, file, log_name, find_place(log_name))
        self._opened.add(opened)
        self.is_known = True

    def _look(self, _connection: Any, record: Any, _proxy: Any) -> None:
        """Begin to use a connection that is open on the database as it is; have another one made in any other's place, once."""
        opened: _Opened = record.info[_OPENED]
        with turn:
            is_good = not opened.is_left and self._is_in_place(opened)
            opened.is_used = is_good
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
        """Leave a file that was replaced, or lost its log, with nothing in a log that is not beside its own file any more."""
        paused = sqlite_changes.pause(self.path)
        try:
            if self._has_stray_log(opened) and not _Checkpoint(opened).run():
                raise sqlite3.OperationalError(_IN_THE_WAY)
            self.rest()
        finally:
            sqlite_changes.resume(paused)

    def _has_stray_log(self, opened: _Opened) -> bool:
        """Return True where the log is to be emptied: it lies beside another file, or is deleted and would be lost."""
        is_same_file = opened.file == find_place(self.path)
        log = find_place(opened.log_name)
        return log is None if is_same_file else log == opened.log

    def _rest(self, _connection: Any, record: Any) -> None:
        if isinstance(opened := record.info.get(_OPENED), _Opened):
            opened.is_used = False

    def _forget(self, _connection: Any, record: Any) -> None:
        if isinstance(opened := record.info.get(_OPENED), _Opened):
            self._opened.discard(opened)

    def _is_in_place(self, opened: _Opened) -> bool:
        return opened.file == find_place(self.path) and (
            opened.log is None or opened.log == find_place(opened.log_name)
        )


class _Checkpoint:
    """Writes all that the log holds into the file that the connection is open on, whatever its name is now."""

    def __init__(self, opened: _Opened) -> None:
        self._opened = opened
        self._is_empty = False

    def run(self) -> bool:
        """Return whether the log is empty now: nobody else was in the way."""
        _call_soon(self._opened, self._write).wait(_LEAVE_SECONDS)
        return self._is_empty

    def _write(self) -> None:
        raw = self._opened.driver._conn
        raw.execute(f"PRAGMA busy_timeout = {_CHECKPOINT_SECONDS * 1000:.0f}")
        is_busy, *_ = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._is_empty = not is_busy


@contextmanager
def waiting(connection: Connection) -> Iterator[None]:
    """Note that the connection waits for the lock, for as long as the block runs."""
    opened = connection.info.get(_OPENED)
    if not isinstance(opened, _Opened):  # an engine of the caller's own
        yield
        return
    opened.is_waiting = True
    try:
        yield
    finally:
        opened.is_waiting = False


def session_class(file: DatabaseFile) -> type[Session]:
    """Return a class of sessions that raise after a commit into a file that was replaced or deleted."""

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
    """Close every connection of this process that nobody is using, for a fork."""
    for file in snapshot(_files):
        file.rest()


def close_ended() -> None:
    """Close the connections of event loops that were closed before them."""
    for file in snapshot(_files):
        file.close_ended()


def after_fork() -> list[Any]:
    """In the child: as ``DatabaseFile.after_fork``, for every file; the lock's holder is the parent's."""
    global turn
    turn = threading.RLock()
    return [opened for file in snapshot(_files) for opened in file.after_fork()]


def _call_soon(opened: _Opened, work: Any) -> threading.Event:
    """Do the work in the connection's own thread; the event is set once it is done, or has failed."""
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
"""Held while a connection is taken into use, and from before a fork until after it."""

_files: WeakSet[DatabaseFile] = WeakSet()
