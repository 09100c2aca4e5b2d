"""persist-queue's SQLiteAckQueue, with JSON. Two processes could get the same job from it."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from persistqueue import Empty, SQLiteAckQueue
from persistqueue.serializers import json as json_serializer

from benchmarks.contestants import Arrived, BlockingQueue, payload


class Peer(BlockingQueue):
    """See the module."""

    name = "persist-queue"
    has_bulk = False
    is_shared = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._queue = SQLiteAckQueue(
            str(path.parent),
            db_file_name=path.name,
            multithreading=True,
            auto_resume=False,
            serializer=json_serializer,
        )

    @classmethod
    async def create(cls, location: str) -> None:
        await (await cls.open(location)).close()

    @classmethod
    async def open(cls, location: str) -> Self:
        return cls(Path(location))

    async def enqueue(self, prompt: str) -> None:
        self._queue.put(payload(prompt))

    def serve_one(self, arrived: Arrived) -> bool:
        try:
            item = self._queue.get(block=False, raw=True)
        except Empty:
            return False
        arrived(item["data"]["prompt"])
        self._queue.ack(item)
        return True

    async def close(self) -> None:
        self._queue.close()
