"""The engine of the loaded model: starting it, replacing a dead one, switching models."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from itertools import count
from typing import Protocol

import anyio

from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineUnavailableError
from dgx_music.forecast import Speedometer
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.messages import EngineInfo
from dgx_music.retrying import keep_trying
from dgx_music.statuses import WorkerState
from dgx_music.worker.engine_deaths import EngineDeaths
from dgx_music.worker.stopping import Stopping

logger = logging.getLogger(__name__)

_ENGINE_STARTS = 5
_NOT_LOADED = EngineInfo(slots=1, device="", model_version="", notice=None, pid=0)


class EngineHost(Protocol):
    """What the worker needs of an engine: ``inference.process.EngineProcess``, or a test's fake."""

    async def start(self, model: str) -> EngineInfo:
        """Return what the engine says of itself with this model loaded; starts a dead one anew."""

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: Callable[[float], None],
        on_slot_free: Callable[[], None],
        on_part: Callable[[Audio, int], None],
    ) -> Audio:
        """Return the audio of one request; cancelling the call stops the generation.

        ``on_slot_free`` is called if the slot becomes free before the audio is made, and
        ``on_part`` with each part of the audio that is made before the end.
        """

    async def close(self) -> None:
        """End the engine."""


class LiveEngine:
    """The engine, the model that it has loaded, and what is known of its process."""

    def __init__(
        self,
        host: EngineHost,
        models: Iterable[str],
        stopping: Stopping,
        worker_id: str,
    ) -> None:
        self.models = list(models)
        """Those that the worker serves."""
        self.model = self.models[0]
        """The loaded one, or the one that is being loaded."""
        self.state = WorkerState.LOADING
        self.info = _NOT_LOADED
        self.loaded_at = time.monotonic()
        self.deaths = EngineDeaths(stopping)
        self.speeds = Speedometer()
        self._host = host
        self._stopping = stopping
        self._worker_id = worker_id

    async def load(self) -> bool:
        """Load the model, which may take minutes; return False if a stop came first.

        Raises ``EngineUnavailableError`` if it cannot be loaded.
        """
        info = await self._start_host()
        if info is None:
            return False
        self.info, self.loaded_at = info, time.monotonic()
        self.state = WorkerState.SERVING
        if info.notice:
            logger.warning("worker %s: %s", self._worker_id, info.notice)
        return True

    async def start(self) -> None:
        """Have a living engine, a fresh one if the last has died.

        Raises ``EngineUnavailableError`` after several starts that failed.
        """
        starts = count(1)

        def note(error: EngineUnavailableError, _wait: float | None) -> None:
            self.state = WorkerState.LOADING
            logger.warning(
                "worker %s: engine start %d of %d failed: %s",
                self._worker_id,
                next(starts),
                _ENGINE_STARTS,
                error,
            )

        waits = [2.0**start for start in range(_ENGINE_STARTS - 1)]
        info = await keep_trying(
            self._start_host,
            on=EngineUnavailableError,
            waits=waits,
            note=note,
            sleep=self._stopping.wait,
        )
        if info is not None:
            self._note_start(info)

    async def switch(self, model: str) -> None:
        """Load another model; if it cannot be loaded here, it is no longer served."""
        former, self.model = self.model, model
        self.state = WorkerState.LOADING
        try:
            await self.load()
        except EngineUnavailableError as error:
            logger.error("worker %s: no longer serves %s: %s", self._worker_id, model, error)
            self.models.remove(model)
            self.model, self.state = former, WorkerState.SERVING

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: Callable[[float], None],
        on_slot_free: Callable[[], None],
        on_part: Callable[[Audio, int], None],
    ) -> Audio:
        """Return the audio of one request; see ``EngineHost.generate``."""
        return await self._host.generate(request, on_progress, on_slot_free, on_part)

    async def close(self) -> None:
        """End the engine."""
        await self._host.close()

    async def _start_host(self) -> EngineInfo | None:
        """Return what the engine says of itself, or ``None`` if a stop came first."""
        with anyio.CancelScope() as scope:
            self._stopping.cancel_on_stop(scope)
            return None if self._stopping.is_requested else await self._host.start(self.model)
        return None

    def _note_start(self, info: EngineInfo) -> None:
        """Count a fresh process as a death of the former one; it may have fewer slots."""
        self.state = WorkerState.SERVING
        if info.pid != self.info.pid:
            self.deaths.note_replacement()
        if info.slots != self.info.slots:
            logger.warning(
                "worker %s: %s has %d slots now, not %d",
                self._worker_id,
                self.model,
                info.slots,
                self.info.slots,
            )
        self.info = info
