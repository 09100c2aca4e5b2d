"""The engines' process as a worker uses it: start it, generate, cancel, and survive its death.

A segfault, a CUDA error that stays, an out-of-memory kill, a hang or a held GIL costs one child
process and the generations in it; the event loop here never waits for any of them. This side uses
asyncio only, as SQLAlchemy's asyncio does.
"""

from __future__ import annotations

import asyncio
import logging
from types import TracebackType
from typing import Self

import anyio

from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineReplacedError, EngineUnavailableError
from dgx_music.inference.child_calls import (
    NOT_RUNNING,
    ChildCalls,
    FreeSlot,
    HearPart,
    ReportProgress,
)
from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.messages import EngineInfo

logger = logging.getLogger(__name__)

_CLOSE_SECONDS = 15.0
"""How long ``close`` waits: a killed process may stay for long in a driver that does not return."""


class EngineProcess:
    """Engines of one or several models in a child process; ``start`` replaces a child that died.

    If memory sufficed only for fewer slots of a model, the next child loads it with as few.
    Use it as an async context manager, or call ``close``: either ends the process for good.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        start_timeout_seconds: float = 900,
        cancel_grace_seconds: float = 5,
    ) -> None:
        self._settings = settings
        self._start_timeout_seconds = start_timeout_seconds
        self._cancel_grace_seconds = cancel_grace_seconds
        self._calls: ChildCalls | None = None
        self._model = settings.model
        self._fewer_slots: dict[str, int] = {}
        self._spawning = asyncio.Lock()
        self._is_closed = False

    @property
    def is_alive(self) -> bool:
        """True while there is a process, loading or loaded."""
        return self._calls is not None and self._calls.child.is_alive

    @property
    def pid(self) -> int | None:
        """The id of the process; ``None`` while there is none."""
        return self._calls.child.pid if self._calls is not None and self.is_alive else None

    async def start(self, model: str | None = None) -> EngineInfo:
        """Return the info of the model's engine, after loading it; by default of the last model.

        A process that is alive loads it beside the engines that it has, and unloads idle ones if
        memory is short. Concurrent calls share one process; a cancelled call leaves it loading.
        Raises ``EngineUnavailableError`` if the engine cannot load, if its process dies meanwhile,
        or if it takes longer than the start timeout, which ends the process.
        """
        model = self._model = model or self._model
        calls = await self._calls_of_a_living_child()
        slots = self._fewer_slots.get(model, self._settings.slots)
        return await calls.load(model, slots, self._start_timeout_seconds)

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: ReportProgress,
        on_slot_free: FreeSlot = lambda: None,
        on_part: HearPart = lambda _audio, _start: None,
    ) -> Audio:
        """Return the audio of one request; a call waits until its model's engine has a free slot.

        A cancelled call returns when its generation has ended, at the latest after the cancel
        grace: a generation that has not stopped by then costs the process. The event loop calls
        ``on_progress`` often, ``on_slot_free`` at most once, if the slot is free before the audio
        is made, and ``on_part`` with each part of the audio that is made before the end.

        Raises ``EngineCrashedError`` if the process died while this ran; ``EngineReplacedError``
        if it was ended for another reason or is not running, if the model is not loaded, or if
        memory does not suffice for so many; ``GenerationRejectedError`` and ``EngineError`` if the
        engine raises them.
        """
        if self._calls is None:
            raise EngineReplacedError(NOT_RUNNING)
        return await self._calls.generate(
            request, on_progress, on_slot_free, on_part, self._cancel_grace_seconds
        )

    async def close(self) -> None:
        """Kill the process for good; what still runs in it raises ``EngineReplacedError``.

        Waits for its end, but not longer than ``_CLOSE_SECONDS``.
        """
        self._is_closed = True
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True) as timeout:
            async with self._spawning:
                if self._calls is not None:
                    await self._calls.child.end("was closed")
        if timeout.cancelled_caught:
            logger.warning(
                "the engine's process was killed and has not ended after %g s", _CLOSE_SECONDS
            )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _calls_of_a_living_child(self) -> ChildCalls:
        async with self._spawning:
            if self._is_closed:
                raise EngineUnavailableError("The engine's process was closed.")
            if self._calls is not None and self._calls.child.is_alive:
                return self._calls
            if self._calls is not None:  # the next one may need the memory that this one holds
                await self._calls.child.wait_until_reaped()
            self._calls = await ChildCalls.spawn(self._settings, self._fewer_slots)
            return self._calls
