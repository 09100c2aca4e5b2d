"""What a worker asks of one child process: to load engines, and to generate.

Each call waits for the child's answer or for its end, and for nothing else.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import anyio

from dgx_music.audio.samples import Audio
from dgx_music.errors import (
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
)
from dgx_music.inference.child_process import ChildProcess
from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.messages import (
    Cancel,
    DeviceLost,
    EngineInfo,
    Failed,
    Finished,
    FromChild,
    Generate,
    Load,
    Part,
    Progress,
    Ready,
    SlotFreed,
    SlotsReduced,
    Unavailable,
    Unloaded,
)

ReportProgress = Callable[[float], None]
FreeSlot = Callable[[], None]
HearPart = Callable[[Audio, int], None]
"""Gets a part of the audio while the rest is being made, and the place of its first sample."""

NOT_RUNNING = "The engine's process is not running."


@dataclass
class _Model:
    """One model in the child: how its loading ended, and its engine's info and slots after that.

    ``slots`` may become fewer than are in use; then it lets nobody in until enough are free.
    """

    loading: asyncio.Future[EngineUnavailableError | None]
    info: EngineInfo | None = None
    slots: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(0))

    def note_ready(self, info: EngineInfo) -> None:
        """Let generations in, and wake those who wait for the loading."""
        self.info, self.slots.total_tokens = info, info.slots
        self.loading.set_result(None)

    def note_unavailable(self, reason: str) -> None:
        """Wake those who wait for the loading, with why it failed."""
        self.loading.set_result(EngineUnavailableError(reason))

    def reduce_slots(self, slot_count: int) -> None:
        """Let in only so many from now on, if it is loaded."""
        if self.info is not None:
            self.info = replace(self.info, slots=slot_count)
            self.slots.total_tokens = slot_count


class _Running:
    """One generation in the child, and the slot that it borrows.

    ``outcome`` is a value, never an exception: asyncio complains of exceptions that nobody reads.
    """

    def __init__(
        self,
        key: int,
        slots: anyio.CapacityLimiter,
        on_progress: ReportProgress,
        on_slot_free: FreeSlot,
        on_part: HearPart,
    ) -> None:
        self.key = key
        self.on_progress = on_progress
        self.on_slot_free = on_slot_free
        self.on_part = on_part
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[Audio | EngineError] = self._loop.create_future()
        self._kill_timer: asyncio.TimerHandle | None = None
        self._slots: anyio.CapacityLimiter | None = slots

    def free_slot(self) -> bool:
        """Give the slot back if that has not happened yet; return whether it happened now."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release_on_behalf_of(self)
        return slots is not None

    def kill_after(self, grace_seconds: float, kill: Callable[[], None]) -> None:
        """Call ``kill`` after the grace, unless the generation has finished by then."""
        self._kill_timer = self._loop.call_later(grace_seconds, kill)

    def finish(self, outcome: Audio | EngineError) -> None:
        """Wake the caller with the outcome."""
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        self.outcome.set_result(outcome)


class ChildCalls:
    """The calls to one child process; ``child`` is that process, and all calls end with it."""

    child: ChildProcess

    def __init__(self, fewer_slots: dict[str, int]) -> None:
        self._loop = asyncio.get_running_loop()
        self._keys = itertools.count()
        self._models: dict[str, _Model] = {}  # that are loading or loaded
        self._running: dict[int, _Running] = {}
        self._fewer_slots = fewer_slots

    @classmethod
    async def spawn(cls, settings: EngineSettings, fewer_slots: dict[str, int]) -> ChildCalls:
        """Start a process. ``fewer_slots`` gets the slots of each model whose engine shrinks.

        Raises ``EngineUnavailableError`` if the process cannot be started.
        """
        calls = cls(fewer_slots)
        await calls._spawn_child(settings)
        return calls

    async def _spawn_child(self, settings: EngineSettings) -> None:
        self.child = await ChildProcess.spawn(settings, self.receive, self.on_child_death)

    async def load(self, model_name: str, slots: int | None, timeout_seconds: float) -> EngineInfo:
        """Return the info of the model's engine, after loading it unless it is loaded already.

        Raises ``EngineUnavailableError`` if it cannot be loaded or the process dies meanwhile. If
        it takes longer than the timeout, or if no other model is left, the process is ended.
        """
        model = self._models.get(model_name)
        if model is None:
            model = self._models[model_name] = _Model(self._loop.create_future())
            self.child.send(Load(model_name, slots))
        await asyncio.wait((model.loading,), timeout=timeout_seconds)
        if not model.loading.done():
            await self.child.end(f"was ended after {timeout_seconds:g} s")
        unavailable = model.loading.result()
        if unavailable is None and model.info is not None:
            return model.info
        if not self._models:
            await self.child.end("could not load")
        reason = f"The engine of {model_name} was unloaded at once."
        raise unavailable or EngineUnavailableError(reason)

    async def generate(
        self,
        request: GenerationRequest,
        on_progress: ReportProgress,
        on_slot_free: FreeSlot,
        on_part: HearPart,
        grace_seconds: float,
    ) -> Audio:
        """Return the audio of one request; see ``EngineProcess.generate``."""
        model = self._models.get(request.model)
        if model is None or model.info is None:
            raise EngineReplacedError(NOT_RUNNING)
        running = _Running(next(self._keys), model.slots, on_progress, on_slot_free, on_part)
        await model.slots.acquire_on_behalf_of(running)
        try:
            outcome = await self._perform(running, request, grace_seconds)
        finally:
            running.free_slot()
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    async def _perform(
        self, running: _Running, request: GenerationRequest, grace_seconds: float
    ) -> Audio | EngineError:
        if not self.child.is_alive:
            raise EngineReplacedError(NOT_RUNNING)
        self.child.send(Generate.of(running.key, request))
        self._running[running.key] = running
        try:
            await asyncio.wait((running.outcome,))
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self._cancel(running, grace_seconds)
            raise
        return running.outcome.result()

    async def _cancel(self, running: _Running, grace_seconds: float) -> None:
        """Stop one generation and wait until it has ended, or the process with it.

        The timer ends the process even if this wait is cancelled too.
        """
        if running.outcome.done():
            return
        reason = "was ended because a cancelled generation in it did not stop"
        running.kill_after(grace_seconds, partial(self.child.kill, EngineReplacedError, reason))
        self.child.send(Cancel(running.key))
        await asyncio.wait((running.outcome,))

    def receive(self, message: FromChild) -> None:
        """Handle one message of the child."""
        match message:
            case Progress(key, progress):
                self._report(key, progress)
            case Part(key, start):
                self._hear(key, message.audio(), start)
            case Finished(key):
                self._finish(key, message.audio())
            case Failed(key):
                self._finish(key, message.exception())
            case SlotFreed(key):
                self._free_slot(key)
            case Ready(model, info):
                self._models[model].note_ready(info)
            case Unavailable(model, reason):
                self._models.pop(model).note_unavailable(reason)
            case SlotsReduced(model, slots):
                self._reduce_slots(model, slots)
            case Unloaded(model):
                self._models.pop(model)
            case DeviceLost(reason):
                self.child.kill(EngineCrashedError, f"has lost its device ({reason})")

    def _finish(self, key: int, outcome: Audio | EngineError) -> None:
        self._running.pop(key).finish(outcome)

    def _report(self, key: int, progress: float) -> None:
        running = self._running.get(key)
        if running is not None:  # an engine's own thread may report just after the end
            # not at once: an error in it must reach the loop's handler, and not break the channel
            self._loop.call_soon(running.on_progress, progress)

    def _hear(self, key: int, audio: Audio, start: int) -> None:
        running = self._running.get(key)
        if running is not None:
            self._loop.call_soon(running.on_part, audio, start)

    def _free_slot(self, key: int) -> None:
        running = self._running.get(key)
        if running is not None and running.free_slot():
            self._loop.call_soon(running.on_slot_free)

    def _reduce_slots(self, model_name: str, slot_count: int) -> None:
        """Let in only so many from now on, and remember the number for every later process."""
        self._fewer_slots[model_name] = slot_count
        self._models[model_name].reduce_slots(slot_count)

    def on_child_death(self, error: type[EngineError], reason: str) -> None:
        """Fail all calls, since the child is dead: it crashed, or was ended."""
        for model in self._models.values():
            if not model.loading.done():
                model.note_unavailable(f"The engine did not load: its process {reason}.")
        for running in self._running.values():
            running.finish(error(f"The engine's process {reason}."))
        self._running.clear()
