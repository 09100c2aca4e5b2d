"""Requests, engines and the first sign of life of a generation."""

from __future__ import annotations

import asyncio
from typing import Any

from dgx_music.audio.samples import Audio
from dgx_music.errors import GenerationCancelledError
from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.process import EngineProcess
from tests.patience import PATIENCE


def make_request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(
        **{"generation_id": "g1", "prompt": "lofi rain", "duration": 0.08, "attempt": 1} | fields
    )


def make_settings(**fields: Any) -> EngineSettings:
    return EngineSettings(**{"engine": "tone", "model": "musicgen-small", "slots": 4} | fields)


def make_process(
    *, start_timeout_seconds: float = 30, cancel_grace_seconds: float = 5, **fields: Any
) -> EngineProcess:
    return EngineProcess(
        make_settings(**fields),
        start_timeout_seconds=start_timeout_seconds,
        cancel_grace_seconds=cancel_grace_seconds,
    )


def ignore(progress: float) -> None:
    """The ``on_progress`` of a generation that nobody watches."""


async def begin(process: EngineProcess, **fields: Any) -> asyncio.Task[Audio]:
    """Return the task of a generation that has reported progress: it is running in the child."""
    started = asyncio.Event()
    task = asyncio.create_task(
        process.generate(make_request(**fields), lambda progress: started.set())
    )
    await asyncio.wait_for(started.wait(), PATIENCE)
    return task


class QuietRun:
    """A ``Run`` for tests: keeps the progress; ``is_cancelled`` cancels it from the start."""

    def __init__(self, *, is_cancelled: bool = False, idle_engines: int = 0) -> None:
        self.progress: list[float] = []
        self.parts: list[tuple[int, Audio]] = []
        self.is_cancelled = is_cancelled
        self.has_slot = True
        self.idle_engines = idle_engines

    def report_progress(self, progress: float) -> None:
        self.progress.append(progress)

    def check_cancelled(self) -> None:
        if self.is_cancelled:
            raise GenerationCancelledError("The generation was cancelled.")

    def free_slot(self) -> None:
        self.has_slot = False

    def hand_out(self, audio: Audio, start: int) -> None:
        self.parts.append((start, audio))

    def make_room(self) -> bool:
        had_any, self.idle_engines = self.idle_engines > 0, 0
        return had_any
