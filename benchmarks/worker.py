"""The real worker, with an engine that makes silence and artifacts in memory."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contestants import MODEL, Arrived
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.audio.samples import Audio
from dgx_music.config import load_settings
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.messages import EngineInfo
from dgx_music.storage.database import Database
from dgx_music.worker.worker import Worker

SILENCE = Audio(np.zeros((1, 2_560), dtype=np.float32), 32_000)


class NoopEngine:
    """Stands in for the engine's process: makes 80 ms of silence, at once or after some seconds.

    ``arrived`` gets the prompt of each generation that it is asked for.
    """

    def __init__(
        self, slots: int, arrived: Arrived = lambda _: None, *, seconds: float = 0.0
    ) -> None:
        self.slots = slots
        self._arrived, self._seconds = arrived, seconds

    async def start(self, model: str) -> EngineInfo:
        return EngineInfo(
            slots=self.slots, device="none", model_version="noop", notice=None, pid=os.getpid()
        )

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: Callable[[float], None],
        on_slot_free: Callable[[], None],
        on_part: Callable[[Audio, int], None],
    ) -> Audio:
        self._arrived(request.prompt)
        if self._seconds:
            await asyncio.sleep(self._seconds)
        return SILENCE

    async def close(self) -> None:
        return


def noop_worker(database: Database, engine: NoopEngine, **settings: Any) -> Worker:
    """Return a worker with as many slots as its engine."""
    options = load_settings(model=MODEL, engine="tone", slots=engine.slots, **settings)
    return Worker(database, engine, MemoryArtifacts(), options)
