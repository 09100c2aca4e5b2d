"""Waking up when another process commits to a SQLite file.

SQLite has no notifications between processes. But a commit writes to the write-ahead log, which the
kernel reports (inotify), and ``PRAGMA data_version`` says when another connection's commit has
become visible: it reads shared memory and takes no lock. One thread waits for the kernel and wakes
the subscribers; without inotify it looks eighty times a second.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sqlite3
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from weakref import WeakSet

from dgx_music.storage.connection.changes import Changes
from dgx_music.storage.connection.snapshots import snapshot

_LOOK_EVERY_SECONDS = 0.0125
_LOOK_AGAIN_SECONDS = 1.0
_PAUSE_SECONDS = 5.0
_VISIBLE_SECONDS = 0.001
_NEXT_COMMIT_SECONDS = 0.05
_SLOW_DISK_SECONDS = 0.02
_IN_MODIFY, _IN_NONBLOCK, _IN_CLOEXEC = 0x2, 0o4000, 0o2000000  # <sys/inotify.h>


class _Stop:
    """Ends the thread: an event that ``select`` can wait for."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()

    def fileno(self) -> int:
        return self._reader.fileno()

    def set(self) -> None:
        self._writer.close()

    def is_set(self) -> bool:
        return self._writer.fileno() < 0

    def wait(self, seconds: float) -> None:
        select.select([self], [], [], seconds)

    def close(self) -> None:
        self._reader.close()


class FileChanges(Changes):
    """Wakes its subscribers after each commit to a SQLite file, whatever their topics and keys.

    Its thread runs while there are any. Without a file to watch (``path`` is ``None``) it wakes
    nobody, and the subscribers rely on their polls.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__()
        self._path = Path() if path is None else path.absolute()
        self._is_file = path is not None
        self._stop: _Stop | None = None
        self._thread: threading.Thread | None = None
        _all.add(self)

    async def close(self) -> None:
        """Stop watching; there are no subscribers any more."""
        self.abandon()

    def abandon(self) -> None:
        """Forget the subscribers, whose event loop has ended, and stop watching."""
        self._subscriptions.clear()
        self._end()

    def watches(self, path: Path | None) -> bool:
        """Return True if its thread runs and watches this file; ``None`` stands for any."""
        return self._stop is not None and path in (None, self._path)

    def pause(self) -> None:
        """Close the connection to the file, and return when it is closed."""
        thread, self._thread = self._thread, None
        self._end()
        if thread is not None:
            thread.join(_PAUSE_SECONDS)

    def resume(self) -> None:
        """Watch again, after ``pause``, if there still are subscribers."""
        if self._subscriptions and self._stop is None:
            self._start()

    def _begin(self, *, is_first: bool) -> None:
        if is_first and self._is_file:
            self._start()

    def _start(self) -> None:
        self._end()
        self._stop = _Stop()
        self._thread = threading.Thread(
            target=self._watch, args=(self._stop,), name="dgx-music-changes", daemon=True
        )
        self._thread.start()

    def _end(self) -> None:
        if self._stop is not None:
            self._stop.set()
            self._stop = None

    def _watch(self, stop: _Stop) -> None:
        with closing(stop):
            self._watch_until(stop)

    def _watch_until(self, stop: _Stop) -> None:
        while not stop.is_set():
            try:
                self._watch_connection(stop)
            except sqlite3.Error:  # the file is gone or cannot be read for a moment
                stop.wait(_LOOK_AGAIN_SECONDS)

    def _watch_connection(self, stop: _Stop) -> None:
        path = self._path
        connection = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        with closing(connection), closing(_open_log_watch(path)) as log:
            seen, cursor, place = -1, connection.cursor(), find_place(path)
            while not stop.is_set() and find_place(path) == place:
                seen = self._look(cursor, seen, log, stop)
                log.wait(stop)

    def _look(
        self, cursor: sqlite3.Cursor, seen: int, log: _LogWatch | _NoLogWatch, stop: _Stop
    ) -> int:
        """Wake everybody if the version is not the one seen, and return the version.

        Goes on for a while after each write: the log is written first, then flushed to disk, which
        may take long, and only then the commit is visible.
        """
        until, pause = time.monotonic() + log.look_seconds, _VISIBLE_SECONDS
        while not stop.is_set():
            if is_written := log.drain():
                until, pause = time.monotonic() + log.look_seconds, _VISIBLE_SECONDS
            version: int = cursor.execute("PRAGMA data_version").fetchone()[0]
            if version != seen:
                seen = version
                self._wake_all()
                if not is_written:  # else the next commit may be coming already
                    until = min(until, time.monotonic() + _NEXT_COMMIT_SECONDS)
            if time.monotonic() >= until:
                break
            time.sleep(pause)
            pause = min(pause * 1.1, _SLOW_DISK_SECONDS)
        return seen

    def _wake_all(self) -> None:
        for subscription in tuple(self._subscriptions):
            try:
                subscription.wake()
            except RuntimeError:  # its event loop has closed
                self._subscriptions.discard(subscription)


class _LogWatch:
    """Waits until the kernel reports a write to the log, which comes and goes in its folder."""

    look_seconds = 2.0

    def __init__(self, path: Path) -> None:
        path = path.resolve()  # the log is beside the file, not beside a link to it
        self._log = f"{path.name}-wal".encode()
        libc = ctypes.CDLL(None, use_errno=True)
        self._events = libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        if self._events < 0:
            raise OSError(ctypes.get_errno(), "inotify")
        if libc.inotify_add_watch(self._events, bytes(path.parent), _IN_MODIFY) < 0:
            error = ctypes.get_errno()
            os.close(self._events)
            raise OSError(error, "inotify")

    def wait(self, stop: _Stop) -> None:
        """Wait for a write to the log, or the stop.

        Not for long: another folder may have taken this one's place.
        """
        readable: list[Any] = [self]
        while readable and not stop.is_set():
            readable, _, _ = select.select([self._events, stop], [], [], _LOOK_AGAIN_SECONDS)
            if self._events in readable and self.drain():
                return

    def drain(self) -> bool:
        """Read what the kernel has reported so far; return whether the log was written."""
        try:
            return self._log in os.read(self._events, 65_536)
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self._events)


class _NoLogWatch:
    """Used if the kernel does not report writes: the log may always have been written."""

    look_seconds = 0.0

    def wait(self, stop: _Stop) -> None:
        stop.wait(_LOOK_EVERY_SECONDS)

    def drain(self) -> bool:
        return True

    def close(self) -> None:
        return


Place = tuple[int, int] | None
"""Device and inode of the file with a name; ``None`` if there is none."""


def find_place(name: str | Path) -> Place:
    """Return what has this name now: another file of the same name has another place."""
    try:
        found = os.stat(name)  # noqa: PTH116 - asked before every transaction
    except OSError:
        return None
    return found.st_dev, found.st_ino


def pause(path: Path | None = None) -> list[FileChanges]:
    """Close the connections that watch this file, or any file; return what to ``resume``."""
    paused = [each for each in snapshot(_all) if each.watches(path)]
    for each in paused:
        each.pause()
    return paused


def resume(paused: list[FileChanges]) -> None:
    """Watch again."""
    for each in paused:
        each.resume()


def after_fork() -> list[FileChanges]:
    """In the child, which has none of the threads: forget all, and return them."""
    inherited = snapshot(_all)
    _all.clear()
    return inherited


_all: WeakSet[FileChanges] = WeakSet()


def _open_log_watch(path: Path) -> _LogWatch | _NoLogWatch:
    try:
        return _LogWatch(path) if sys.platform == "linux" else _NoLogWatch()
    except OSError:  # the user's limit of watches is reached
        return _NoLogWatch()
