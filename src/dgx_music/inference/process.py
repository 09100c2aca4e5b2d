"""The parent's side of an engine: starts its process, sends it generations, cancels them, and survives its death.

A segfault, a sticky CUDA error, an out-of-memory kill, a hang or a held GIL costs one child and the generations in it;
the event loop here never waits for it. asyncio only, as SQLAlchemy's asyncio is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Self

import anyio
import numpy as np

from dgx_music.errors import (
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationCancelledError,
    GenerationRejectedError,
)
from dgx_music.inference.channel import Decoder, encode
from dgx_music.inference.engine import Audio, EngineSettings, GenerationRequest

ReportProgress = Callable[[float], None]

_NOT_RUNNING = "The engine's process is not running."
_STDERR = 2
_LAST_WORDS_SECONDS = 10.0  # between the end of the channel and that of the process: freeing a GPU takes a while
_FAILURES: dict[str, type[EngineError]] = {
    error.__name__: error for error in (EngineError, GenerationCancelledError, GenerationRejectedError)
}


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself; ``pid`` is its process."""

    slots: int
    device: str
    model_version: str
    notice: str | None
    pid: int


class EngineProcess:
    """An engine in a process of its own, replaced by ``start`` whenever it has died.

    Use it as an async context manager, or call ``close``: either ends the process for good.
    """

    def __init__(
        self, settings: EngineSettings, *, start_timeout_seconds: float = 900, cancel_grace_seconds: float = 5
    ) -> None:
        self._settings = settings
        self._start_timeout_seconds = start_timeout_seconds
        self._cancel_grace_seconds = cancel_grace_seconds
        self._child: _Child | None = None
        self._spawning = asyncio.Lock()
        self._is_closed = False

    @property
    def is_alive(self) -> bool:
        """True while there is a process, loading or loaded."""
        return self._child is not None and self._child.is_alive

    @property
    def pid(self) -> int | None:
        """The id of the process, ``None`` while there is none."""
        return self._child.pid if self._child is not None and self._child.is_alive else None

    async def start(self, model: str | None = None) -> EngineInfo:
        """Return what the loaded engine says of itself, after starting its process where none is alive.

        With a ``model`` that is not the one loaded, the process is replaced by one that loads it; what still runs raises
        ``EngineReplacedError``. Concurrent calls share one process; cancelling a call leaves the process loading. Raises
        ``EngineUnavailableError`` where the engine cannot load, dies while it loads or takes too long.
        """
        child = await self._living_child(model or self._settings.model)
        return await child.wait_until_loaded(self._start_timeout_seconds)

    async def generate(self, request: GenerationRequest, on_progress: ReportProgress) -> Audio:
        """Return the audio of one request; calls beyond the engine's slots wait for a free one.

        A cancelled call leaves only when its slot is free again, which takes at most the cancel grace: a generation
        that does not stop by then costs the process. ``on_progress`` is called on the event loop.

        Raises ``EngineCrashedError`` where the process died while this ran, ``EngineReplacedError`` where it was ended
        for another reason or is not running, ``GenerationRejectedError`` and ``EngineError`` as the engine says.
        """
        if self._child is None:
            raise EngineReplacedError(_NOT_RUNNING)
        return await self._child.generate(request, on_progress, self._cancel_grace_seconds)

    async def close(self) -> None:
        """End the process for good; what still runs in it raises ``EngineReplacedError``."""
        self._is_closed = True
        with anyio.CancelScope(shield=True):
            async with self._spawning:
                if self._child is not None:
                    await self._child.end("was closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _living_child(self, model: str) -> _Child:
        async with self._spawning:
            if self._is_closed:
                raise EngineUnavailableError("The engine's process was closed.")
            if model != self._settings.model:
                self._settings = replace(self._settings, model=model)
                if self._child is not None:
                    await self._child.end(f"was ended to load {model}")
            if self._child is not None and self._child.is_alive:
                return self._child
            if self._child is not None:
                await self._child.wait_until_buried()  # a fresh one may need the memory that the old one holds
            self._child = await _Child.spawn(self._settings)
            return self._child


class _Running:
    """One generation in the child; ``outcome`` is a value, never an exception, so that nobody has to fetch it."""

    def __init__(self, key: int, on_progress: ReportProgress, outcome: asyncio.Future[Audio | EngineError]) -> None:
        self.key = key
        self.on_progress = on_progress
        self.outcome = outcome
        self.patience: asyncio.TimerHandle | None = None
        """Ends the process when the cancelled generation does not stop; ``None`` until it is cancelled."""


class _Child(asyncio.Protocol):
    """One life of the engine's process, and the parent's end of its channel."""

    _channel: asyncio.Transport
    _process: asyncio.subprocess.Process
    _burial: asyncio.Task[None]

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._decoder = Decoder()
        self._keys = itertools.count()
        self._running: dict[int, _Running] = {}
        self._slots: asyncio.Semaphore | None = None  # until the engine is loaded and says how many
        self._loaded: asyncio.Future[EngineInfo | EngineUnavailableError] = loop.create_future()
        self._hung_up: asyncio.Future[None] = loop.create_future()
        self._verdict: tuple[type[EngineError], str] | None = None

    @classmethod
    async def spawn(cls, settings: EngineSettings) -> _Child:
        """Start the process; its engine loads from now on."""
        ours, theirs = socket.socketpair()
        with theirs:
            channel, child = await asyncio.get_running_loop().create_unix_connection(cls, sock=ours)
            try:
                child._process = await _start_python(theirs, settings)
            except BaseException:
                channel.abort()
                raise
        child._channel = channel
        child._burial = asyncio.create_task(child._bury(), name=f"engine process {child.pid}")
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None and self._verdict is None and not self._channel.is_closing()

    async def wait_until_loaded(self, timeout_seconds: float) -> EngineInfo:
        await asyncio.wait((self._loaded,), timeout=timeout_seconds)
        if not self._loaded.done():
            await self.end(f"was ended after {timeout_seconds:g} s")
        loaded = self._loaded.result()
        if isinstance(loaded, EngineUnavailableError):
            await self.end("could not load")
            raise loaded
        return loaded

    async def wait_until_buried(self) -> None:
        await asyncio.wait((self._burial,))

    async def end(self, why: str) -> None:
        self.kill(EngineReplacedError, why)
        await self.wait_until_buried()

    def kill(self, error: type[EngineError], why: str) -> None:
        """End the process at once, unless it is dead; what still runs in it raises ``error``, which says ``why``."""
        if self._process.returncode is None and self._verdict is None:
            self._verdict = error, why
            self._channel.abort()
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # it leads a session: what its engine started dies as well

    async def generate(self, request: GenerationRequest, on_progress: ReportProgress, grace_seconds: float) -> Audio:
        if self._slots is None:
            raise EngineReplacedError(_NOT_RUNNING)
        async with self._slots:
            if not self.is_alive:
                raise EngineReplacedError(_NOT_RUNNING)
            running = self._begin(request, on_progress)
            try:
                await asyncio.wait((running.outcome,))
            except asyncio.CancelledError:
                with anyio.CancelScope(shield=True):
                    await self._cancel(running, grace_seconds)
                raise
        outcome = running.outcome.result()
        if isinstance(outcome, EngineError):
            raise outcome
        return outcome

    def _begin(self, request: GenerationRequest, on_progress: ReportProgress) -> _Running:
        running = _Running(next(self._keys), on_progress, self._loop.create_future())
        self._send({"kind": "generate", "key": running.key, "request": vars(request)})
        self._running[running.key] = running
        return running

    async def _cancel(self, running: _Running, grace_seconds: float) -> None:
        """Stop one generation and wait until its slot is free: its own reply says so, or the end of the process.

        The timer does its work even where this wait is cancelled too.
        """
        if running.outcome.done():
            return
        why = "was ended because a cancelled generation in it did not stop"
        running.patience = self._loop.call_later(grace_seconds, self.kill, EngineReplacedError, why)
        self._send({"kind": "cancel", "key": running.key})
        await asyncio.wait((running.outcome,))

    def _finish(self, key: int, outcome: Audio | EngineError) -> None:
        running = self._running.pop(key)
        if running.patience is not None:
            running.patience.cancel()
        running.outcome.set_result(outcome)

    def _send(self, header: dict[str, Any]) -> None:
        self._channel.write(encode(header))

    def data_received(self, data: bytes) -> None:
        for header, payload in self._decoder.feed(data):
            self._receive(header, payload)

    def _receive(self, header: dict[str, Any], payload: bytearray) -> None:
        match header["kind"]:
            case "progress":
                self._report(header["key"], header["progress"])
            case "audio":
                samples = np.frombuffer(payload, dtype=np.float32).reshape(header["shape"])  # [channel, frame]
                self._finish(header["key"], Audio(samples, header["sample_rate"], header["facts"]))
            case "failed":
                self._finish(header["key"], _FAILURES[header["error"]](header["message"]))
            case "ready":
                info = EngineInfo(**header["info"])
                self._slots = asyncio.Semaphore(info.slots)
                self._loaded.set_result(info)
            case "unavailable":
                self._loaded.set_result(EngineUnavailableError(header["message"]))

    def _report(self, key: int, progress: float) -> None:
        running = self._running.get(key)
        if running is not None:  # an engine's own thread may speak up just after the end
            self._loop.call_soon(running.on_progress, progress)  # the loop's handler gets its errors, not this channel

    def connection_lost(self, exc: Exception | None) -> None:
        self._hung_up.set_result(None)

    async def _bury(self) -> None:
        """Wait for the end of the process, hear its last words, and tell everybody who still waits for it."""
        exited = asyncio.ensure_future(self._process.wait())
        await asyncio.wait((self._hung_up, exited), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((self._hung_up, exited), timeout=_LAST_WORDS_SECONDS)
        self.kill(EngineCrashedError, "closed its channel and lived on")
        self._channel.abort()
        self._tell_everybody(*(self._verdict or (EngineCrashedError, _how_it_ended(await exited))))
        await asyncio.wait((self._hung_up, exited))

    def _tell_everybody(self, error: type[EngineError], why: str) -> None:
        if not self._loaded.done():
            self._loaded.set_result(EngineUnavailableError(f"The engine did not load: its process {why}."))
        for key in list(self._running):
            self._finish(key, error(f"The engine's process {why}."))


async def _start_python(channel: socket.socket, settings: EngineSettings) -> asyncio.subprocess.Process:
    arguments = str(channel.fileno()), json.dumps(asdict(settings))
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "dgx_music.inference.child", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=_STDERR,  # what libraries print belongs in the worker's log
            pass_fds=(channel.fileno(),),
            start_new_session=True,  # Ctrl-C in the worker's terminal must not reach it
        )
    except OSError as error:
        raise EngineUnavailableError(f"The engine's process cannot be started: {error}.") from error


def _how_it_ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
