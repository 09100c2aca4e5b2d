"""Standard streams that may be closed, full, or a pipe that nobody reads.

None of these changes what a command does.
"""

from __future__ import annotations

import errno
import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from typing_extensions import Buffer

_STANDARD = (0, 1, 2)


class _Lasting(io.RawIOBase):
    """A file descriptor to which every write succeeds: what cannot be written is dropped.

    It remembers the error. Once a part of the data is lost the rest is dropped too, since a reader
    would not see the gap. A log goes on when there is room again.
    """

    def __init__(self, descriptor: int | None, *, is_data: bool) -> None:
        self.trouble: OSError | None = None
        self._descriptor = descriptor
        self._is_data = is_data

    def has_lost_its_reader(self) -> bool:
        """Return True for a pipe whose reader has closed it, and for a terminal that was closed."""
        if self._descriptor is None or self.trouble is None:
            return False
        is_terminal = stat.S_ISCHR(os.fstat(self._descriptor).st_mode)
        return self.trouble.errno == errno.EPIPE or (
            is_terminal and self.trouble.errno == errno.EIO
        )

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._descriptor is None:
            raise io.UnsupportedOperation("this stream leads nowhere")
        return self._descriptor

    def isatty(self) -> bool:
        return self._descriptor is not None and os.isatty(self._descriptor)

    def write(self, data: Buffer, /) -> int:
        size = memoryview(data).nbytes
        if self._descriptor is None or (self._is_data and self.trouble is not None):
            return size
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another process has made this terminal or pipe non-blocking
            select.select((), (self._descriptor,), ())
            return 0
        except OSError as error:
            self.trouble = error
            return size


class Output:
    """Whether all that was printed on stdout has arrived."""

    def __init__(self, raw: _Lasting | None) -> None:
        self._raw = raw

    def find_loss(self) -> str | None:
        """Return why some output is lost; ``None`` if nothing is, or if the reader has left early."""
        sys.stdout.flush()
        trouble = None if self._raw is None else self._raw.trouble
        if self._raw is None or trouble is None or self._raw.has_lost_its_reader():
            return None
        return (trouble.strerror or str(trouble)).lower()


@contextmanager
def lasting_streams() -> Iterator[Output]:
    """Give this process standard streams that exist and never fail; then restore the others."""
    _open_closed_descriptors()
    former = sys.stdin, sys.stdout, sys.stderr
    if _is_closed(sys.stdin):
        sys.stdin = io.TextIOWrapper(io.BytesIO())
    raw = _replacement(sys.stdout, is_data=True)
    talk = _replacement(sys.stderr, is_data=False)
    sys.stdout, sys.stderr = (
        _as_text(raw, sys.stdout, "replace"),
        _as_text(talk, sys.stderr, "backslashreplace"),
    )
    try:
        yield Output(raw)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = former


def _open_closed_descriptors() -> None:
    """Open ``/dev/null`` as 0, 1 or 2 if they are closed.

    Else the next file or socket would get that number, and our output.
    """
    for descriptor in _STANDARD:
        try:
            os.fstat(descriptor)
        except OSError:
            # it gets the lowest free number
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _is_closed(stream: TextIO | None) -> bool:
    return stream is None or getattr(stream, "closed", False)


def _replacement(stream: TextIO | None, *, is_data: bool) -> _Lasting | None:
    """Return the replacement of a stream's file; ``None`` for a stream in memory, which stays."""
    if stream is None or _is_closed(stream):
        return _Lasting(None, is_data=is_data)
    with suppress(OSError):  # what was lost before this command is not its loss
        stream.flush()
    try:
        return _Lasting(stream.fileno(), is_data=is_data)
    except (OSError, AttributeError):
        return None


def _as_text(raw: _Lasting | None, former: TextIO, errors: str) -> TextIO:
    """Return a text stream in the former one's encoding; the former one if ``raw`` is ``None``."""
    if raw is None:
        return former
    like = former if isinstance(former, io.TextIOWrapper) and not former.closed else None
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if like is None else like.encoding,
        errors=errors,
        line_buffering=like is None or like.line_buffering,
        write_through=like is not None and like.write_through,
    )
