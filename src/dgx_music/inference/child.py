"""The engines' process: loads engines, serves generations, obeys only its parent and dies with it.

Started by ``process.py`` as ``python -m dgx_music.inference.child FD SETTINGS``, with the channel's file descriptor and
the engines' settings as JSON. The main thread reads messages, one thread loads engines, and each generation has a thread
of its own. ``early`` has it ignore the signals that a terminal or a supervisor sends to everybody. Its exit code is 0
where the parent hung up, and ``LOST_THE_DEVICE`` where it gave up by itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from dgx_music.audio.samples import Audio
from dgx_music.errors import (
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationCancelledError,
    GenerationRejectedError,
)
from dgx_music.inference.channel import Decoder, Message, decode_request, encode
from dgx_music.inference.engine import Engine, EngineSettings, GenerationRequest, Run
from dgx_music.inference.residents import Residents, estimate_bytes, free_bytes, load_engine
from dgx_music.inference.trouble import (
    MEMORY_REMEDY,
    first_line,
    give_back_memory,
    has_lost_the_device,
    is_out_of_memory,
)
from dgx_music.logs import configure_logging

PROGRESS_SECONDS = 0.5
LOST_THE_DEVICE = 70
"""The exit code after an error of CUDA that every later call would only meet again; BSD's for an internal error."""

_MOST_THREADS = 512
"""Twice the most slots: a generation whose slot is free already has its thread until its audio is made."""
_MOST_GIVEN_BACK = 64
"""Generations in a row that find no memory beside each other; then they pay for it, or they might go on for ever."""
_READ_BYTES = 65_536
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger(__name__)


class Channel:
    """The child's end of the channel: blocking, but for ``offer``; both ways to send are safe from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._writable = select.poll()  # select.select() knows no descriptor above 1023
        self._writable.register(connection, select.POLLOUT)
        self._decoder = Decoder()

    def send(self, message: bytes) -> None:
        """Send one encoded message whole. Raises ``ConnectionError`` where the parent is gone."""
        with self._sending:
            self._connection.sendall(message)

    def offer(self, message: bytes) -> bool:
        """Send a short message where that waits for nobody, no other sender and no busy parent; return whether it was sent.

        Raises ``ConnectionError`` where the parent is gone.
        """
        if not self._sending.acquire(blocking=False):
            return False
        try:
            is_writable = bool(self._writable.poll(0))
            if is_writable:
                self._connection.sendall(message)
            return is_writable
        finally:
            self._sending.release()

    def messages(self) -> Iterator[Message]:
        """Yield what the parent sends until it hangs up."""
        while data := self._connection.recv(_READ_BYTES):
            yield from self._decoder.feed(data)


class ChannelRun:
    """One generation's line back to the parent: a ``Run`` that can be cancelled."""

    def __init__(self, key: int, channel: Channel, make_room: Callable[[], bool]) -> None:
        self.key = key
        self.make_room = make_room
        self._channel = channel
        self.has_slot = True
        """Until the tokens are there; what remains is to make the audio of them."""
        self._cancelled = threading.Event()
        self._next_progress_at = 0.0

    def report_progress(self, progress: float) -> None:
        """Send the progress, unless some was sent less than ``PROGRESS_SECONDS`` ago.

        It never waits, since one thread reports for all rows: where the channel is busy, the next call tries again.
        """
        now = time.monotonic()
        if now >= self._next_progress_at:
            message = encode({"kind": "progress", "key": self.key, "progress": progress})
            if self._channel.offer(message):
                self._next_progress_at = now + PROGRESS_SECONDS

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` once ``cancel`` was called."""
        if self._cancelled.is_set():
            raise GenerationCancelledError("The generation was cancelled.")

    def free_slot(self) -> None:
        """Tell the parent, once, that another generation may have the slot."""
        if self.has_slot:
            self.has_slot = False
            self._channel.send(encode({"kind": "freed", "key": self.key}))

    def cancel(self) -> None:
        """Ask the engine to stop this generation, and only this one."""
        self._cancelled.set()


def main() -> None:
    """Serve until the parent hangs up; ends with the process, at once."""
    faulthandler.enable()
    configure_logging("warning")
    _die_with_the_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # a process that an engine starts must not hold the channel open
    with suppress(ConnectionError):
        Server(EngineSettings(**json.loads(sys.argv[2])), Channel(connection)).serve()
    os._exit(0)  # a generation may still run in its thread; nobody waits for it any more


class Server:
    """Does what the parent asks: loads engines, starts and cancels generations. Every request has its answer."""

    def __init__(self, settings: EngineSettings, channel: Channel) -> None:
        self._settings = settings
        self._channel = channel
        self._residents = Residents(
            load_engine,
            estimate_bytes,
            lambda: free_bytes(settings.device),
            lambda model: channel.send(_unloaded(model)),
        )
        self._runs: dict[int, ChannelRun] = {}
        self._to_load: set[str] = set()
        self._slots: dict[str, int] = {}  # of each model, as the parent knows it
        self._telling = threading.Lock()  # for the one above
        self._given_back = 0

    def serve(self) -> None:
        """Obey until the parent hangs up."""
        loading = ThreadPoolExecutor(1, "loading")  # so that a cancel is heard meanwhile
        performing = ThreadPoolExecutor(_MOST_THREADS, "generation")
        for message in self._channel.messages():
            header = message.header
            match header["kind"]:
                case "load":
                    self._begin_load(loading, header["model"], header["slots"])
                case "generate":
                    self._begin_generation(performing, message)
                case "cancel":
                    if cancelled := self._runs.get(header["key"]):  # else it has just ended: its reply is on the way
                        cancelled.cancel()

    def _begin_load(self, threads: ThreadPoolExecutor, model: str, slots: int | None) -> None:
        self._to_load.add(model)
        try:
            threads.submit(self._load, model, slots)
        except RuntimeError as error:  # no thread can be started; what was submitted may still run in a later one
            self._to_load.discard(model)
            self._channel.send(_unavailable(model, f"There is no memory to load it ({first_line(error)})."))

    def _begin_generation(self, threads: ThreadPoolExecutor, message: Message) -> None:
        run = ChannelRun(message.header["key"], self._channel, self._residents.unload_idle)
        self._runs[run.key] = run
        try:
            threads.submit(self._perform, message, run)
        except RuntimeError as error:  # as above
            reply = self._failure(error, message.header["request"], run)
            del self._runs[run.key]
            self._channel.send(reply)

    def _load(self, model: str, slots: int | None) -> None:
        """Answer one ``load``, unless it is answered; the engine cannot be unloaded again before ``ready`` is said."""
        if model not in self._to_load:
            return
        self._to_load.discard(model)
        try:
            with self._residents.load(replace(self._settings, model=model, slots=slots)) as engine, self._telling:
                self._slots[model] = engine.slots
                self._channel.send(_ready(model, engine))
        except BaseException as error:
            self._end_where_the_device_is_lost(error)
            if not isinstance(error, EngineUnavailableError):
                logger.exception("engine %s did not load %s", self._settings.engine, model)
            message = str(error) if isinstance(error, EngineUnavailableError) else f"{type(error).__name__}: {error}"
            self._channel.send(_unavailable(model, message))

    def _perform(self, message: Message, run: ChannelRun) -> None:
        """Answer one ``generate``, unless it is answered."""
        if run.key not in self._runs:
            return
        reply = self._reply(message, run)
        del self._runs[run.key]
        self._channel.send(reply)

    def _reply(self, message: Message, run: ChannelRun) -> bytes:
        """Return the reply to one ``generate``; no exception leaves it, since a slot without a reply is lost for ever."""
        try:
            run.check_cancelled()
            reply = _audio(run.key, self._generate(decode_request(message), run))
        except BaseException as error:
            self._end_where_the_device_is_lost(error)
            return self._failure(error, message.header["request"], run)
        self._given_back = 0
        return reply

    def _generate(self, request: GenerationRequest, run: ChannelRun) -> Audio:
        with self._residents.use(request.model) as engine:
            try:
                return _generate_where_it_fits(engine, request, run)
            finally:
                self._tell_slots(request.model, engine)

    def _tell_slots(self, model: str, engine: Engine) -> None:
        """Tell the parent where the engine has fewer slots than it knows, before it hears of whom that has cost one."""
        with self._telling:
            if engine.slots < self._slots[model]:
                self._slots[model] = engine.slots
                self._channel.send(encode({"kind": "slots", "model": model, "slots": engine.slots}))

    def _failure(self, error: BaseException, fields: dict[str, Any], run: ChannelRun) -> bytes:
        if isinstance(error, GenerationCancelledError | GenerationRejectedError | EngineReplacedError):
            return _failed(run.key, type(error).__name__, str(error))
        if is_out_of_memory(error):
            return self._found_no_room(error, fields, run)
        if isinstance(error, EngineError):
            return _failed(run.key, EngineError.__name__, str(error))
        logger.error("generation %s failed", fields.get("generation_id"), exc_info=error)
        return _failed(run.key, EngineError.__name__, f"{type(error).__name__}: {error}")

    def _found_no_room(self, error: BaseException, fields: dict[str, Any], run: ChannelRun) -> bytes:
        """Give the generation back where the others had the room; else it pays: it would find no more the next time.

        It pays for its audio's room too: what that needs, the clip's length alone decides, and other clips that fit would
        have it given back for ever.
        """
        logger.warning("generation %s found no memory: %s", fields.get("generation_id"), first_line(error))
        give_back_memory(error)
        if run.has_slot and len(self._runs) > 1 and self._given_back < _MOST_GIVEN_BACK:
            self._given_back += 1
            message = f"There is no memory for this generation beside the others ({first_line(error)})."
            return _failed(run.key, EngineReplacedError.__name__, message)
        message = f"There is no memory for this generation ({first_line(error)}); {MEMORY_REMEDY}."
        return _failed(run.key, EngineError.__name__, message)

    def _end_where_the_device_is_lost(self, error: BaseException) -> None:
        if has_lost_the_device(error):
            logger.error("the device is lost", exc_info=error)
            with suppress(ConnectionError):
                self._channel.send(encode({"kind": "broken", "message": first_line(error)}))
            _exit(LOST_THE_DEVICE)


def _generate_where_it_fits(engine: Engine, request: GenerationRequest, run: Run) -> Audio:
    """Return the audio; where memory does not suffice, idle engines are unloaded and it is tried once more."""
    try:
        return engine.generate(request, run)
    except Exception as error:
        if isinstance(error, EngineReplacedError) or not is_out_of_memory(error):
            raise
        give_back_memory(error)
        if not run.make_room():
            raise
    return engine.generate(request, run)


def _exit(code: int) -> NoReturn:
    os._exit(code)  # nobody waits for the other threads, and the device's own clean-up would hang


def _ready(model: str, engine: Engine) -> bytes:
    info = {
        "slots": engine.slots,
        "device": engine.device,
        "model_version": engine.model_version,
        "notice": engine.notice,
        "pid": os.getpid(),
    }
    return encode({"kind": "ready", "model": model, "info": info})


def _unavailable(model: str, message: str) -> bytes:
    return encode({"kind": "unavailable", "model": model, "message": message})


def _unloaded(model: str) -> bytes:
    return encode({"kind": "unloaded", "model": model})


def _audio(key: int, audio: Audio) -> bytes:
    samples = np.asarray(audio.samples, dtype=np.float32)  # [channel, frame]
    header = {"shape": samples.shape, "sample_rate": audio.sample_rate, "facts": dict(audio.facts)}
    return encode({"kind": "audio", "key": key, **header}, samples.tobytes())


def _failed(key: int, error: str, message: str) -> bytes:
    return encode({"kind": "failed", "key": key, "error": error, "message": message})


def _die_with_the_parent() -> None:
    """Die when the parent dies, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
