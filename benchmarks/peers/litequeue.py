"""litequeue, with synchronous=FULL instead of its NORMAL, which may lose what it acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from litequeue import LiteQueue

from benchmarks.contestants import Arrived, BlockingQueue, payload_text, prompt_of


class Peer(BlockingQueue):
    """See the module."""

    name = "litequeue"

    def __init__(self, path: str) -> None:
        super().__init__()
        self._queue = LiteQueue(path)
        self._queue.conn.execute("PRAGMA synchronous = FULL")

    @classmethod
    async def create(cls, location: str) -> None:
        await (await cls.open(location)).close()

    @classmethod
    async def open(cls, location: str) -> Self:
        return cls(location)

    async def enqueue(self, prompt: str) -> None:
        self._queue.put(payload_text(prompt))

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        with self._queue.transaction(mode="IMMEDIATE"):
            for prompt in prompts:
                self._queue.put(payload_text(prompt))

    def serve_one(self, arrived: Arrived) -> bool:
        message = self._queue.pop()
        if message is None:
            return False
        arrived(prompt_of(message.data))
        self._queue.done(message.message_id)
        return True

    async def close(self) -> None:
        self._queue.close()
