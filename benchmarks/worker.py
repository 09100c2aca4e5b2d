"""The real worker, with an engine that makes silence and artifacts in memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks.floor import MODEL, SILENCE, SLOTS
from dgx_music.artifacts import MemoryArtifacts
from dgx_music.audio.samples import Audio
from dgx_music.config import load_settings
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.messages import EngineInfo
from dgx_music.storage.database import Database
from dgx_music.worker.worker import Worker


class NoopEngine:
    """Stands in for the engine's process: makes 80 ms of silence, at once or after some seconds.

    ``arrived_at`` has the time at which each generation was asked for, by its id.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.arrived_at: dict[str, float] = {}
        self._seconds = seconds

    async def start(self, model: str) -> EngineInfo:
        return EngineInfo(
            slots=SLOTS, device="none", model_version="noop", notice=None, pid=os.getpid()
        )

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: Callable[[float], None],
        on_slot_free: Callable[[], None],
    ) -> Audio:
        self.arrived_at[request.generation_id] = time.monotonic()
        if self._seconds:
            await asyncio.sleep(self._seconds)
        return SILENCE

    async def close(self) -> None:
        return


def noop_worker(database: Database, engine: NoopEngine | None = None, **settings: Any) -> Worker:
    """Return a worker with 16 slots."""
    options = load_settings(model=MODEL, engine="tone", slots=SLOTS, **settings)
    return Worker(database, engine or NoopEngine(), MemoryArtifacts(), options)
