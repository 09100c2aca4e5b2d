"""The parent's side of the engines: starts their process, sends it generations, cancels them, and survives its death.

A segfault, a sticky CUDA error, an out-of-memory kill, a hang or a held GIL costs one child and the generations in it;
the event loop here never waits for it. asyncio only, as SQLAlchemy's asyncio is.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import anyio
import numpy as np

from dgx_music.audio.samples import Audio
from dgx_music.errors import (
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationCancelledError,
    GenerationRejectedError,
)
from dgx_music.inference.channel import Decoder, encode, encode_request
from dgx_music.inference.engine import EngineSettings, GenerationRequest

logger = logging.getLogger(__name__)

ReportProgress = Callable[[float], None]
FreeSlot = Callable[[], None]

_NOT_RUNNING = "The engine's process is not running."
_STDERR = 2
_LAST_WORDS_SECONDS = 10.0  # between the end of the channel and that of the process: freeing a GPU takes a while
_CLOSE_SECONDS = 15.0
"""How long a close waits for the end: a killed process may stay for long in a driver that does not return."""
_NEEDED = re.compile(
    r"(PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TMP|TEMP|TERM|VIRTUAL_ENV|CONDA_PREFIX"  # any program
    r"|PYTHON\w*|LD_\w+|MALLOC_\w+|GLIBC_TUNABLES|XDG_\w+"  # its libraries
    r"|CC|CXX|CFLAGS|CPPFLAGS|CXXFLAGS|LDFLAGS|CPATH|C_INCLUDE_PATH|CPLUS_INCLUDE_PATH|LIBRARY_PATH"  # compilers
    r"|(OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|SAFETENSORS)_\w+"  # arithmetic
    r"|(CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|NVTX|ROCM|HIP|HSA|ROCR|GPU|AMD)_\w+"  # devices
    r"|(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|TQDM)_\w+|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"  # weights
    r"|(HTTPS?|ALL|NO|FTP|https?|all|no|ftp)_(PROXY|proxy)"
    r"|DGX_MUSIC_TONE_\w+)"  # the engine that is scripted from outside; every other setting comes by the channel
)
"""The variables that the engine's process gets. A list of what it may have, not of what it must not: nobody can name all
secrets that a worker's environment may hold, and a library's variable that is missing here is missed, not leaked."""
_SECRET = re.compile(r"(?!HF_TOKEN|HUGGING_?FACE_)\w*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)\w*", re.IGNORECASE)
"""Named like something needed and yet a secret, such as ``NVIDIA_API_KEY``; the hub's own is for downloads."""
_FAILURES: dict[str, type[EngineError]] = {
    error.__name__: error
    for error in (EngineError, EngineReplacedError, GenerationCancelledError, GenerationRejectedError)
}


def _may_have(name: str) -> bool:
    return _NEEDED.fullmatch(name) is not None and _SECRET.fullmatch(name) is None


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself; ``pid`` is its process."""

    slots: int
    device: str
    model_version: str
    notice: str | None
    pid: int


class EngineProcess:
    """Engines of one or several models in a process of their own, replaced by ``start`` whenever it has died.

    A model for which there was too little memory keeps the fewer slots that it then had, whatever becomes of the process.
    Use it as an async context manager, or call ``close``: either ends the process for good.
    """

    def __init__(
        self, settings: EngineSettings, *, start_timeout_seconds: float = 900, cancel_grace_seconds: float = 5
    ) -> None:
        self._settings = settings
        self._start_timeout_seconds = start_timeout_seconds
        self._cancel_grace_seconds = cancel_grace_seconds
        self._child: _Child | None = None
        self._model = settings.model
        self._fewer_slots: dict[str, int] = {}
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
        """Return what the engine of the model (of the last one, where none is named) says of itself, after loading it.

        A process that is alive loads it beside the models that it has, and unloads idle ones where memory is short.
        Concurrent calls share one process; cancelling a call leaves it loading. Raises ``EngineUnavailableError`` where
        the engine cannot load, its process dies meanwhile, or it takes too long, which ends the process.
        """
        model = self._model = model or self._model
        child = await self._living_child()
        slots = self._fewer_slots.get(model, self._settings.slots)
        return await child.load(model, slots, self._start_timeout_seconds)

    async def generate(
        self, request: GenerationRequest, on_progress: ReportProgress, on_slot_free: FreeSlot = lambda: None
    ) -> Audio:
        """Return the audio of one request; calls beyond the slots of its model's engine wait for a free one.

        A cancelled call leaves only when its generation has ended, which takes at most the cancel grace: one that does
        not stop by then costs the process. ``on_progress`` is called on the event loop, and so is ``on_slot_free``, at
        most once, where the slot is free before the audio is made.

        Raises ``EngineCrashedError`` where the process died while this ran, ``EngineReplacedError`` where it was ended
        for another reason or is not running, where the model is not loaded, or memory does not suffice for so many;
        ``GenerationRejectedError`` and ``EngineError`` as the engine says.
        """
        if self._child is None:
            raise EngineReplacedError(_NOT_RUNNING)
        return await self._child.generate(request, on_progress, on_slot_free, self._cancel_grace_seconds)

    async def close(self) -> None:
        """End the process for good; what still runs in it raises ``EngineReplacedError``.

        It is killed at once; its end is waited for, but not longer than ``_CLOSE_SECONDS``.
        """
        self._is_closed = True
        with anyio.move_on_after(_CLOSE_SECONDS, shield=True) as patience:
            async with self._spawning:
                if self._child is not None:
                    await self._child.end("was closed")
        if patience.cancelled_caught:
            logger.warning("the engine's process was killed and has not ended after %g s", _CLOSE_SECONDS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _living_child(self) -> _Child:
        async with self._spawning:
            if self._is_closed:
                raise EngineUnavailableError("The engine's process was closed.")
            if self._child is not None and self._child.is_alive:
                return self._child
            if self._child is not None:
                await self._child.wait_until_buried()  # a fresh one may need the memory that the old one holds
            self._child = await _Child.spawn(self._settings, self._fewer_slots)
            return self._child


class _Slots:
    """Lets in as many as there are slots, in the order they came. There may come to be fewer than are in use."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> None:
        """Wait for a free slot; who is cancelled has none."""
        if self._taken < self.count:
            self._taken += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it came at the same moment
                self.free()
            raise

    def free(self) -> None:
        """Give a slot back."""
        self._taken -= 1
        while self._waiting and self._taken < self.count:
            turn = self._waiting.popleft()
            if not turn.done():  # else it was cancelled
                self._taken += 1
                turn.set_result(None)


@dataclass
class _Model:
    """One model in the child: how its loading ended, and once it is loaded what it says of itself and its slots."""

    loading: asyncio.Future[EngineUnavailableError | None]
    info: EngineInfo | None = None
    slots: _Slots = field(default_factory=lambda: _Slots(0))


class _Running:
    """One generation in the child; ``outcome`` is a value, never an exception, so that nobody has to fetch it."""

    def __init__(
        self,
        key: int,
        slots: _Slots,
        on_progress: ReportProgress,
        on_slot_free: FreeSlot,
        outcome: asyncio.Future[Audio | EngineError],
    ) -> None:
        self.key = key
        self.on_progress = on_progress
        self.on_slot_free = on_slot_free
        self.outcome = outcome
        self.patience: asyncio.TimerHandle | None = None
        """Ends the process when the cancelled generation does not stop; ``None`` until it is cancelled."""
        self._slots: _Slots | None = slots

    def free_slot(self) -> bool:
        """Give the slot back, the first time; return whether this was it."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.free()
        return slots is not None


class _Child(asyncio.Protocol):
    """One life of the engine's process, and the parent's end of its channel."""

    _channel: asyncio.Transport
    _process: asyncio.subprocess.Process
    _burial: asyncio.Task[None]

    def __init__(self, fewer_slots: dict[str, int]) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._decoder = Decoder()
        self._keys = itertools.count()
        self._running: dict[int, _Running] = {}
        self._models: dict[str, _Model] = {}  # that are loading or loaded
        self._fewer_slots = fewer_slots
        self._hung_up: asyncio.Future[None] = loop.create_future()
        self._verdict: tuple[type[EngineError], str] | None = None

    @classmethod
    async def spawn(cls, settings: EngineSettings, fewer_slots: dict[str, int]) -> _Child:
        """Start the process, which loads nothing by itself; ``fewer_slots`` is to remember what it says of them."""
        ours, theirs = socket.socketpair()
        with theirs:
            channel, child = await asyncio.get_running_loop().create_unix_connection(
                lambda: cls(fewer_slots), sock=ours
            )
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

    async def load(self, model_name: str, slots: int | None, timeout_seconds: float) -> EngineInfo:
        model = self._models.get(model_name)
        if model is None:
            model = self._models[model_name] = _Model(self._loop.create_future())
            self._send({"kind": "load", "model": model_name, "slots": slots})
        await asyncio.wait((model.loading,), timeout=timeout_seconds)
        if not model.loading.done():
            await self.end(f"was ended after {timeout_seconds:g} s")
        unavailable = model.loading.result()
        if unavailable is None and model.info is not None:
            return model.info
        if not self._models:
            await self.end("could not load")
        raise unavailable or EngineUnavailableError(f"The engine of {model_name} was unloaded at once.")

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

    async def generate(
        self, request: GenerationRequest, on_progress: ReportProgress, on_slot_free: FreeSlot, grace_seconds: float
    ) -> Audio:
        model = self._models.get(request.model)
        if model is None or model.info is None:
            raise EngineReplacedError(_NOT_RUNNING)
        await model.slots.take()
        running = _Running(next(self._keys), model.slots, on_progress, on_slot_free, self._loop.create_future())
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
        if not self.is_alive:
            raise EngineReplacedError(_NOT_RUNNING)
        self._channel.write(encode_request(running.key, request))
        self._running[running.key] = running
        try:
            await asyncio.wait((running.outcome,))
        except asyncio.CancelledError:
            with anyio.CancelScope(shield=True):
                await self._cancel(running, grace_seconds)
            raise
        return running.outcome.result()

    async def _cancel(self, running: _Running, grace_seconds: float) -> None:
        """Stop one generation and wait until it has ended: its own reply says so, or the end of the process.

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
            case "freed":
                self._free_slot(header["key"])
            case "ready":
                self._note_ready(self._models[header["model"]], EngineInfo(**header["info"]))
            case "unavailable":
                self._models.pop(header["model"]).loading.set_result(EngineUnavailableError(header["message"]))
            case "slots":
                self._shrink(header["model"], header["slots"])
            case "unloaded":
                self._models.pop(header["model"])
            case "broken":
                self.kill(EngineCrashedError, f"has lost its device ({header['message']})")

    def _note_ready(self, model: _Model, info: EngineInfo) -> None:
        model.info, model.slots = info, _Slots(info.slots)
        model.loading.set_result(None)

    def _shrink(self, model_name: str, slot_count: int) -> None:
        """Let in no more than so many from now on, and remember it for every later process."""
        self._fewer_slots[model_name] = slot_count
        model = self._models[model_name]
        if model.info is not None:
            model.info, model.slots.count = replace(model.info, slots=slot_count), slot_count

    def _free_slot(self, key: int) -> None:
        running = self._running.get(key)
        if running is not None and running.free_slot():
            self._loop.call_soon(running.on_slot_free)

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
        for model in self._models.values():
            if not model.loading.done():
                model.loading.set_result(EngineUnavailableError(f"The engine did not load: its process {why}."))
        for key in list(self._running):
            self._finish(key, error(f"The engine's process {why}."))


async def _start_python(channel: socket.socket, settings: EngineSettings) -> asyncio.subprocess.Process:
    arguments = str(channel.fileno()), json.dumps(asdict(settings))
    try:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "dgx_music.inference.child", *arguments),
            env={name: value for name, value in os.environ.items() if _may_have(name)},
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
