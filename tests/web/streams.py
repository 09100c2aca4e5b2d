"""A client of one stream of events, without a server: it reads when a test says so."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple, Self

import anyio
from fastapi import FastAPI

from tests.patience import PATIENCE


class Told(NamedTuple):
    """One event."""

    kind: str
    data: Any
    id: str


class Stream:
    """One stream; of what the application sends, as much waits as there is room for."""

    def __init__(
        self, app: FastAPI, path: str, *, last_id: str = "", token: str = "", room: int = 1_000
    ) -> None:
        self._app = app
        path, _, query = path.partition("?")
        headers = {"host": "127.0.0.1", "last-event-id": last_id, "authorization": token}
        self._scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(k.encode(), v.encode()) for k, v in headers.items() if v],
        }
        self._sent: asyncio.Queue[dict[str, Any]] = asyncio.Queue(room)
        self._has_left = asyncio.Event()
        self._events: list[Told] = []
        self.status = 0
        self.headers: dict[str, str] = {}
        self.comments = 0
        self.is_ended = False

    async def __aenter__(self) -> Self:
        async def receive() -> dict[str, Any]:
            await self._has_left.wait()
            return {"type": "http.disconnect"}

        self._answering = asyncio.create_task(self._app(self._scope, receive, self._sent.put))
        start = await self._next_message()
        self.status = start["status"]
        self.headers = {k.decode(): v.decode() for k, v in start["headers"]}
        return self

    @property
    def is_full(self) -> bool:
        """True if the application waits until something is read."""
        return self._sent.full()

    async def __aexit__(self, *_error: object) -> None:
        self._has_left.set()
        while not self._answering.done():
            while not self._sent.empty():
                self._sent.get_nowait()
            await asyncio.wait([self._answering], timeout=0.01)
        await self._answering

    async def next(self) -> Told:
        """Return the next event."""
        while not self._events:
            await self._read()
        return self._events.pop(0)

    async def next_of(self, kind: str) -> Told:
        """Return the next event of this kind; others are passed over."""
        while (told := await self.next()).kind != kind:
            pass
        return told

    async def rest(self) -> list[Told]:
        """Return all events up to the end of the stream."""
        while not self.is_ended:
            await self._read()
        return self._events

    async def comment(self) -> None:
        """Return once there is one more comment."""
        count = self.comments
        while self.comments == count:
            await self._read()

    async def body(self) -> Any:
        """Return the JSON of an answer that is no stream."""
        return json.loads((await self._next_message())["body"])

    async def part(self) -> bytes:
        """Return the next bytes of a stream that is not of events; empty at its end."""
        body: bytes = (await self._next_message())["body"]
        return body

    async def _read(self) -> None:
        assert not self.is_ended
        message = await self._next_message()
        self.is_ended = not message.get("more_body")
        for block in message["body"].decode().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in block.splitlines())
            if "" in fields:
                self.comments += 1
            elif "event" in fields:
                data = json.loads(fields["data"])
                self._events.append(Told(fields["event"], data, fields["id"]))

    async def _next_message(self) -> dict[str, Any]:
        with anyio.fail_after(PATIENCE):
            return await self._sent.get()
