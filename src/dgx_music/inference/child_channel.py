"""The child's end of the channel, and what an engine uses of it: one ``Run`` per generation."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import cast

from dgx_music.audio.samples import Audio
from dgx_music.errors import GenerationCancelledError
from dgx_music.inference.channel import Bytes, Decoder, encode, encode_in_parts
from dgx_music.inference.messages import FromParent, Part, Progress, SlotFreed

PROGRESS_SECONDS = 0.5
_READ_BYTES = 65_536


class Channel:
    """The child's end of the channel; any thread may send. Everything waits, except ``offer``."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._writable = select.poll()  # select.select() takes no descriptor above 1023
        self._writable.register(connection, select.POLLOUT)
        self._decoder = Decoder()
        self._received = memoryview(bytearray(_READ_BYTES))
        """Made once: a message must be read even if there is no memory left for its generation."""

    def send(self, *message: Bytes) -> None:
        """Send one encoded message, or its parts. Raises ``ConnectionError`` if the parent is gone."""
        with self._sending:
            for part in message:
                self._connection.sendall(part)

    def offer(self, message: bytes) -> bool:
        """Send a short encoded message if that needs no waiting; return whether it was sent.

        It waits neither for another sender nor for a busy parent. Raises ``ConnectionError`` if
        the parent is gone.
        """
        if not self._sending.acquire(blocking=False):
            return False
        try:
            is_writable = bool(self._writable.poll(0))
            if is_writable:
                self._connection.sendall(message)
            return is_writable
        finally:
            self._sending.release()

    def messages(self) -> Iterator[FromParent]:
        """Yield what the parent sends until it hangs up."""
        while count := self._connection.recv_into(self._received):
            for message in self._decoder.feed(self._received[:count]):
                yield cast(FromParent, message)


class ChannelRun:
    """The ``Run`` of one generation: its progress goes to the parent, which can cancel it."""

    def __init__(self, key: int, channel: Channel, make_room: Callable[[], bool]) -> None:
        self.key = key
        self.make_room = make_room
        self._channel = channel
        self.has_slot = True
        """Until the tokens are there; then only the audio is still to be made."""
        self._cancelled = threading.Event()
        self._next_progress_at = 0.0

    def report_progress(self, progress: float) -> None:
        """Send the progress, unless some was sent less than ``PROGRESS_SECONDS`` ago.

        It never waits, since one thread reports for all rows: if the channel is busy, the next
        call tries again.
        """
        now = time.monotonic()
        if now < self._next_progress_at:
            return
        if self._channel.offer(encode(Progress(self.key, progress))):
            self._next_progress_at = now + PROGRESS_SECONDS

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` if ``cancel`` was called."""
        if self._cancelled.is_set():
            raise GenerationCancelledError("The generation was cancelled.")

    def free_slot(self) -> None:
        """Tell the parent, once, that another generation may have the slot."""
        if self.has_slot:
            self.has_slot = False
            self._channel.send(encode(SlotFreed(self.key)))

    def hand_out(self, audio: Audio, start: int) -> None:
        """Send the part to the parent; waits while that is busy."""
        self._channel.send(*encode_in_parts(Part.of(self.key, audio, start)))

    def cancel(self) -> None:
        """Ask the engine to stop this generation, and no other."""
        self._cancelled.set()
