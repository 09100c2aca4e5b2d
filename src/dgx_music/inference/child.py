"""The engines' process: loads engines, serves generations, obeys only its parent and dies with it.

``child_process.py`` starts it as ``python -m dgx_music.inference.child FD SETTINGS``, with the file
descriptor of the channel and the engines' settings as JSON. The main thread reads messages, one
thread loads engines, and each generation has a thread of its own. ``early`` makes the process
ignore the signals that a terminal or a supervisor sends to everybody. Its exit code is 0 if the
parent hung up, and ``LOST_THE_DEVICE`` if the process gave up by itself.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import NoReturn

from dgx_music.audio.samples import Audio
from dgx_music.errors import (
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationCancelledError,
    GenerationRejectedError,
)
from dgx_music.inference.channel import Bytes, encode, encode_in_parts
from dgx_music.inference.child_channel import Channel, ChannelRun
from dgx_music.inference.engine import Engine, EngineSettings, GenerationRequest, Run
from dgx_music.inference.messages import (
    Cancel,
    DeviceLost,
    EngineInfo,
    Failed,
    Finished,
    Generate,
    Load,
    Ready,
    SlotsReduced,
    Unavailable,
    Unloaded,
)
from dgx_music.inference.residents import Residents, estimate_bytes, free_bytes, load_engine
from dgx_music.inference.trouble import (
    MEMORY_REMEDY,
    first_line,
    give_back_memory,
    has_lost_the_device,
    is_out_of_memory,
)
from dgx_music.logs import configure_logging

LOST_THE_DEVICE = 70
"""The exit code after a CUDA error that every later call would meet; BSD's for internal errors."""

_MAX_THREADS = 512
"""Twice the most slots: a generation that has freed its slot keeps its thread for its audio."""
_MAX_FREE_FAILURES = 64
"""How many out-of-memory failures in a row are free; later ones count, or they might never end."""
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger(__name__)


def main() -> None:
    """Serve until the parent hangs up, then end the process at once."""
    faulthandler.enable()
    configure_logging("warning")
    _die_with_the_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # what an engine starts must not hold the channel open
    with suppress(ConnectionError):
        Server(EngineSettings(**json.loads(sys.argv[2])), Channel(connection)).serve()
    os._exit(0)  # a generation may still run in its thread; nobody waits for it any more


class Server:
    """Does what the parent asks: loads engines, begins and cancels generations.

    Every ``Load`` and every ``Generate`` gets an answer.
    """

    def __init__(self, settings: EngineSettings, channel: Channel) -> None:
        self._settings = settings
        self._channel = channel
        self._residents = Residents(
            load_engine,
            estimate_bytes,
            lambda: free_bytes(settings.device),
            lambda model: channel.send(encode(Unloaded(model))),
        )
        self._runs: dict[int, ChannelRun] = {}
        self._to_load: set[str] = set()
        self._slots: dict[str, int] = {}  # of each model, as the parent knows it
        self._slots_lock = threading.Lock()  # also held while the parent is told
        self._free_failures = 0

    def serve(self) -> None:
        """Obey until the parent hangs up."""
        loading = ThreadPoolExecutor(1, "loading")  # so that a cancel is heard meanwhile
        performing = ThreadPoolExecutor(_MAX_THREADS, "generation")
        for message in self._channel.messages():
            match message:
                case Load(model, slots):
                    self._begin_load(loading, model, slots)
                case Generate():
                    self._begin_generation(performing, message)
                case Cancel(key):
                    # if there is no such run, it has just ended: its reply is on the way
                    if cancelled := self._runs.get(key):
                        cancelled.cancel()

    def _begin_load(self, threads: ThreadPoolExecutor, model: str, slots: int | None) -> None:
        self._to_load.add(model)
        try:
            threads.submit(self._load, model, slots)
        except RuntimeError as error:
            # No thread can be started. What was submitted may still run in a later thread.
            self._to_load.discard(model)
            reason = f"There is no memory to load it ({first_line(error)})."
            self._channel.send(encode(Unavailable(model, reason)))

    def _begin_generation(self, threads: ThreadPoolExecutor, message: Generate) -> None:
        run = ChannelRun(message.key, self._channel, self._residents.unload_idle)
        self._runs[run.key] = run
        try:
            threads.submit(self._perform, message, run)
        except RuntimeError as error:  # as above
            reply = self._failure(error, message, run)
            del self._runs[run.key]
            self._channel.send(encode(reply))

    def _load(self, model: str, slots: int | None) -> None:
        """Answer one ``Load``, unless that has happened.

        The engine cannot be unloaded again before the parent is told that it is ready.
        """
        if model not in self._to_load:
            return
        self._to_load.discard(model)
        settings = replace(self._settings, model=model, slots=slots)
        try:
            with self._residents.load(settings) as engine, self._slots_lock:
                self._slots[model] = engine.slots
                self._channel.send(encode(Ready(model, _info_of(engine))))
        except BaseException as error:
            self._exit_if_the_device_is_lost(error)
            self._channel.send(encode(Unavailable(model, self._why_unavailable(model, error))))

    def _why_unavailable(self, model: str, error: BaseException) -> str:
        if isinstance(error, EngineUnavailableError):
            return str(error)
        logger.error("engine %s did not load %s", self._settings.engine, model, exc_info=error)
        return f"{type(error).__name__}: {error}"

    def _perform(self, message: Generate, run: ChannelRun) -> None:
        """Answer one ``Generate``, unless that has happened."""
        if run.key not in self._runs:
            return
        reply = self._reply(message, run)
        del self._runs[run.key]
        self._channel.send(*reply)

    def _reply(self, message: Generate, run: ChannelRun) -> tuple[Bytes, ...]:
        """Return the parts of the encoded reply to one ``Generate``.

        No exception leaves it, because a slot without a reply would be lost for ever.
        """
        try:
            run.check_cancelled()
            reply = encode_in_parts(Finished.of(run.key, self._generate(message.request(), run)))
        except BaseException as error:
            self._exit_if_the_device_is_lost(error)
            return encode_in_parts(self._failure(error, message, run))
        self._free_failures = 0
        return reply

    def _generate(self, request: GenerationRequest, run: ChannelRun) -> Audio:
        with self._residents.use(request.model) as engine:
            try:
                return _generate_making_room(engine, request, run)
            finally:
                self._report_slots(request.model, engine)

    def _report_slots(self, model: str, engine: Engine) -> None:
        """Tell the parent if the engine has fewer slots; the failure of the generation follows."""
        with self._slots_lock:
            if engine.slots < self._slots[model]:
                self._slots[model] = engine.slots
                self._channel.send(encode(SlotsReduced(model, engine.slots)))

    def _failure(self, error: BaseException, message: Generate, run: ChannelRun) -> Failed:
        if isinstance(
            error, GenerationCancelledError | GenerationRejectedError | EngineReplacedError
        ):
            return Failed.of(run.key, type(error), str(error))
        generation_id = message.fields.get("generation_id")
        if is_out_of_memory(error):
            logger.warning("generation %s found no memory: %s", generation_id, first_line(error))
            return self._out_of_memory(error, run)
        if isinstance(error, EngineError):
            return Failed.of(run.key, EngineError, str(error))
        logger.error("generation %s failed", generation_id, exc_info=error)
        return Failed.of(run.key, EngineError, f"{type(error).__name__}: {error}")

    def _out_of_memory(self, error: BaseException, run: ChannelRun) -> Failed:
        """Return a free failure if others used the memory, else one that counts as an attempt.

        Alone, the generation would find no more memory the next time. If it has no slot any more,
        only its audio did not fit, and the failure counts too: that memory depends on the clip's
        length alone, and each success of a shorter clip would make the next failure free again.
        """
        give_back_memory(error)
        is_beside_others = run.has_slot and len(self._runs) > 1
        if is_beside_others and self._free_failures < _MAX_FREE_FAILURES:
            self._free_failures += 1
            reason = "There is no memory for this generation beside the others"
            return Failed.of(run.key, EngineReplacedError, f"{reason} ({first_line(error)}).")
        reason = f"There is no memory for this generation ({first_line(error)}); {MEMORY_REMEDY}."
        return Failed.of(run.key, EngineError, reason)

    def _exit_if_the_device_is_lost(self, error: BaseException) -> None:
        if has_lost_the_device(error):
            logger.error("the device is lost", exc_info=error)
            with suppress(ConnectionError):
                self._channel.send(encode(DeviceLost(first_line(error))))
            _exit(LOST_THE_DEVICE)


def _generate_making_room(engine: Engine, request: GenerationRequest, run: Run) -> Audio:
    """Return the audio; if memory does not suffice, unload idle engines and try once more."""
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
    os._exit(code)  # nobody waits for other threads, and the device's own clean-up would hang


def _info_of(engine: Engine) -> EngineInfo:
    return EngineInfo(
        slots=engine.slots,
        device=engine.device,
        model_version=engine.model_version,
        notice=engine.notice,
        pid=os.getpid(),
    )


def _die_with_the_parent() -> None:
    """Die when the parent dies, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
