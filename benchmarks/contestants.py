"""What every queue must offer to be measured: dgx-music, the floor and the other libraries."""

from __future__ import annotations

import asyncio
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

MODEL = "musicgen-small"
DURATION = 0.08
PRODUCERS = 16
POLL_SECONDS = 0.005
"""How often a worker of a blocking library looks again."""

Arrived = Callable[[str], None]
"""Gets the prompt of each job when its handler is called, on any thread."""


class Queue(ABC):
    """One queue, open in this process; the handler of its worker does nothing."""

    name: ClassVar[str]
    has_bulk: ClassVar[bool] = True
    """It can enqueue many in one transaction."""
    is_shared: ClassVar[bool] = True
    """Worker processes can share it."""

    @classmethod
    def key(cls) -> str:
        """Return what ``pkgutil.resolve_name`` takes, so that another process finds the class."""
        return f"{cls.__module__}:{cls.__qualname__}"

    @classmethod
    @abstractmethod
    async def create(cls, location: str) -> None:
        """Make its tables in an empty database: the URL of PostgreSQL's, or the path of SQLite's."""

    @classmethod
    @abstractmethod
    async def open(cls, location: str) -> Self:
        """Return the queue with open connections."""

    @abstractmethod
    async def enqueue(self, prompt: str) -> None:
        """Enqueue one; it is on disk when this returns."""

    async def enqueue_and_wake(self, prompt: str) -> None:
        """Enqueue one so that an idle worker notices, if that takes more than ``enqueue``."""
        await self.enqueue(prompt)

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        """Enqueue all: in one transaction if it ``has_bulk``, else from several tasks at once."""
        await enqueue_at_once(self, prompts)

    @abstractmethod
    async def work(self, slots: int, arrived: Arrived) -> None:
        """Run a worker that has this many jobs at a time, until ``stop``."""

    @abstractmethod
    async def stop(self) -> None:
        """Let ``work`` finish its jobs and return."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""


class ClaimingQueue(Queue):
    """A queue whose claims are also measured alone, beside many finished rows."""

    @abstractmethod
    async def claim(self) -> None:
        """Claim one row; raise if there is none."""

    @abstractmethod
    async def add_finished(self, count: int) -> None:
        """Add finished rows, not timed; on PostgreSQL the table is not vacuumed from then on."""


class BlockingQueue(Queue):
    """A queue of a blocking library on SQLite, whose worker is one thread.

    It has one thread for any number of slots: more of them would only wait for SQLite's one writer.
    """

    def __init__(self) -> None:
        self._stopped = threading.Event()

    @abstractmethod
    def serve_one(self, arrived: Arrived) -> bool:
        """Claim one job and complete it; return False if there is none."""

    async def work(self, slots: int, arrived: Arrived) -> None:
        await asyncio.to_thread(self._serve, arrived)

    def _serve(self, arrived: Arrived) -> None:
        while not self._stopped.is_set():
            if not self.serve_one(arrived):
                self._stopped.wait(POLL_SECONDS)

    async def stop(self) -> None:
        self._stopped.set()


def payload(prompt: str) -> dict[str, str | float]:
    """Return what a job carries, the same for every queue."""
    return {"prompt": prompt, "model": MODEL, "duration": DURATION}


def payload_text(prompt: str) -> str:
    return json.dumps(payload(prompt))


def prompt_of(text: str | bytes) -> str:
    """Return the prompt of a payload."""
    return str(json.loads(text)["prompt"])


async def enqueue_each(queue: Queue, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        await queue.enqueue(prompt)


async def enqueue_at_once(queue: Queue, prompts: Sequence[str]) -> None:
    """Enqueue one by one from several tasks at once."""
    parts = [prompts[first::PRODUCERS] for first in range(PRODUCERS)]
    await asyncio.gather(*[enqueue_each(queue, part) for part in parts])
