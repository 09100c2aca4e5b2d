"""A TCP proxy in front of PostgreSQL that fails when a test says so: silence, refusals, cut lines, lost replies."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from tests.patience import PATIENCE

# of a client: its type, b"" before the session starts, and its payload
Message = tuple[bytes, bytes]

# for TLS and for GSSAPI; the server says one byte, and no
_REQUESTS_BEFORE_STARTUP = {80877103, 80877104}
_READY_FOR_QUERY = b"Z\0\0\0\5"  # ends the reply to a simple query, but for one byte
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def is_commit(message: Message) -> bool:
    """Return True for the COMMIT of a driver; asyncpg and psycopg both send it as a simple query."""
    kind, payload = message
    return kind == b"Q" and payload.rstrip(b"\0; \n").upper() == b"COMMIT"


class Loss:
    """One message of a client that the proxy will lose, or whose reply it will lose."""

    def __init__(
        self,
        is_it: Callable[[Message], bool],
        what: Literal["request", "reply"],
        *,
        after: bytes = b"",
        cut: bool,
    ) -> None:
        self.is_it, self.what, self.after, self.cut = is_it, what, after, cut
        self.reply = b""  # what the server said and the client never heard
        self.happened: Future[None] = Future()
        self.line: _Line | None = None

    async def wait(self, timeout: float = PATIENCE) -> None:
        """Return once it is lost; a lost reply means that the server has done what the message said."""
        if not (await asyncio.wait({asyncio.wrap_future(self.happened)}, timeout=timeout))[0]:
            raise TimeoutError("the proxy saw no such message")


class Proxy:
    """Forwards connections to the server of a URL, from a thread of its own; a context manager.

    ``black_hole`` and ``refuse`` last until ``heal``; a ``Loss`` happens once, to the first connection it fits.
    """

    def __init__(self, url: str) -> None:
        self._server = (urlsplit(url).hostname, urlsplit(url).port or 5432)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._flows = asyncio.Event()
        self._flows.set()
        self._lines: dict[asyncio.Task[None], _Line] = {}
        self._loss: Loss | None = None
        self._door: asyncio.Task[None] | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._open_door())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def url(self, url: str) -> str:
        """Return this URL of the server, by way of the proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    @property
    def connection_count(self) -> int:
        """How many connections are open, silent ones included."""
        return len(self._lines)

    def black_hole(self) -> None:
        """Take all and deliver nothing, not even that an end has closed; new connections get no answer."""
        self._do(self._set_flow(is_open=False))

    def refuse(self) -> None:
        """Cut all connections and refuse new ones."""
        self._do(self._refuse())

    def cut(self, *, reset: bool = False) -> None:
        """Close all connections at both ends, or reset them; new ones are welcome."""
        self._do(self._cut(reset=reset))

    def heal(self) -> None:
        """Forward again, first of all what was held back."""
        self._do(self._heal())

    def forget(self) -> None:
        """Leave all connections silent for good, as a firewall that has lost its memory; new ones are welcome."""
        self._do(self._forget())

    def lose_reply(
        self, to: Callable[[Message], bool] = is_commit, *, after: bytes = b"", cut: bool = True
    ) -> Loss:
        """Deliver the next such message, swallow the reply to it, then cut the line or leave it silent for good.

        The reply must end with ReadyForQuery: a simple query has such a reply, and so has the Sync of an extended one.
        What commits is a COMMIT, or the Sync of a statement that is a transaction of its own. With ``after``, only in
        a transaction in which the client has said this.
        """
        return self._arm(Loss(to, "reply", after=after, cut=cut))

    def lose_request(
        self, which: Callable[[Message], bool] = is_commit, *, after: bytes = b"", cut: bool = True
    ) -> Loss:
        """Swallow the next such message before the server sees it, then cut the line or leave it silent for good."""
        return self._arm(Loss(which, "request", after=after, cut=cut))

    def deliver(self, loss: Loss) -> None:
        """Deliver a request that was lost without a cut after all, whether or not its client has left meanwhile."""
        self._do(self._deliver(loss))

    def _arm(self, loss: Loss) -> Loss:
        self._loss = loss
        return loss

    def _do(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(PATIENCE)

    async def _set_flow(self, *, is_open: bool) -> None:
        (self._flows.set if is_open else self._flows.clear)()

    async def _forget(self) -> None:
        for line in self._lines.values():
            line.talks.clear()

    async def _deliver(self, loss: Loss) -> None:
        assert loss.line is not None
        loss.line.talks.set()

    async def _heal(self) -> None:
        await self._set_flow(is_open=True)
        await self._open_door()

    async def _open_door(self) -> None:
        if self._door is None:
            listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
            listener.setblocking(False)
            self.port = listener.getsockname()[1]
            self._door = self._loop.create_task(self._accept(listener))

    async def _refuse(self) -> None:
        if self._door is not None:
            await _end(self._door)
            self._door = None
        await self._cut()

    async def _cut(self, *, reset: bool = False) -> None:
        if reset:
            for line in self._lines.values():
                line.reset_on_close()
        await _end(*self._lines)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                line = _Line((await self._loop.sock_accept(listener))[0])
                task = self._loop.create_task(self._forward(line))
                self._lines[task] = line
                task.add_done_callback(self._lines.pop)

    async def _forward(self, line: _Line) -> None:
        """Forward one connection, both ways, until both ends have closed it, one fails or a test cuts it."""
        with line.client, line.server, contextlib.suppress(OSError):
            await self._flows.wait()
            await self._loop.sock_connect(line.server, self._server)
            ways = [
                self._loop.create_task(way(line))
                for way in (self._forward_requests, self._forward_replies)
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                await _end(*ways)

    async def _forward_requests(self, line: _Line) -> None:
        reader = _RequestReader()
        while data := await self._loop.sock_recv(line.client, 65_536):
            for raw, message in reader.feed(data):
                await self._flows.wait()
                if self._is_to_lose(message, line):
                    await line.lose()
                await line.talks.wait()
                await self._loop.sock_sendall(line.server, raw)
        await self._flows.wait()
        await line.talks.wait()
        line.server.shutdown(socket.SHUT_WR)

    def _is_to_lose(self, message: Message, line: _Line) -> bool:
        """Return True for a request to swallow; the message whose reply to swallow is marked."""
        line.note(message)
        if (loss := self._loss) is None or loss.after not in line.said:
            return False
        if not (loss.is_it(message) or (loss.is_it is is_commit and line.ended_alone)):
            return False
        self._loss, line.loss, loss.line = None, loss, line
        return loss.what == "request"

    async def _forward_replies(self, line: _Line) -> None:
        while data := await self._loop.sock_recv(line.server, 65_536):
            await self._flows.wait()
            if line.loss is None:
                await line.talks.wait()
                await self._loop.sock_sendall(line.client, data)
                continue
            line.loss.reply += data
            if _READY_FOR_QUERY in line.loss.reply:
                await line.lose()
        await self._flows.wait()
        await line.talks.wait()
        line.client.shutdown(socket.SHUT_WR)


class _Line:
    """One connection: the sockets to its ends, and what of it is lost."""

    def __init__(self, client: socket.socket) -> None:
        self.client, self.server = client, socket.socket()
        self.loss: Loss | None = None
        self.said = b""  # by the client, in its transaction
        self.prepared: dict[bytes, bytes] = {}  # statements by their names
        self.is_open = False  # a transaction of several statements
        self.has_executed = False
        self.ended_alone = False  # the last message ended a statement that is a transaction
        self.talks = asyncio.Event()
        self.talks.set()
        for side in (self.client, self.server):
            side.setblocking(False)
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def note(self, message: Message) -> None:
        kind, payload = message
        if self.ended_alone:
            self.said, self.has_executed = b"", False
        if kind == b"P":
            name, statement, *_ = payload.split(b"\0")
            self.prepared[name] = statement
        is_begin = kind == b"Q" and payload[:5].upper() == b"BEGIN"
        self.said = payload if is_begin else self.said + payload
        if kind == b"B":
            self.said += self.prepared.get(payload.split(b"\0")[1], b"")
        if kind == b"Q":
            self.is_open = is_begin or (
                self.is_open and not payload.startswith((b"COMMIT", b"ROLL"))
            )
        self.has_executed |= kind == b"E"
        self.ended_alone = kind == b"S" and self.has_executed and not self.is_open

    def reset_on_close(self) -> None:
        for side in (self.client, self.server):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)

    async def lose(self) -> None:
        """Say that it is lost, and raise, which cuts the line, or stay silent for good."""
        assert self.loss is not None
        self.talks.clear()
        if not self.loss.happened.done():
            self.loss.happened.set_result(None)
        if self.loss.cut:
            raise ConnectionAbortedError
        await self.talks.wait()


class _RequestReader:
    """Cuts what a client sends into messages of the PostgreSQL protocol, version 3."""

    def __init__(self) -> None:
        self._data = b""
        self._has_started = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, Message]]:
        """Take what came and yield each message that is whole: its bytes, and what they say."""
        self._data += data
        while True:
            head = 1 if self._has_started else 0
            end = head + int.from_bytes(self._data[head : head + 4])
            if len(self._data) < head + 4 or len(self._data) < end:
                return
            raw, self._data = self._data[:end], self._data[end:]
            if not self._has_started:
                self._has_started = int.from_bytes(raw[4:8]) not in _REQUESTS_BEFORE_STARTUP
            yield raw, (raw[:head], raw[head + 4 :])


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
