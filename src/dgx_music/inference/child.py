"""The engine's process: loads one engine, serves generations, obeys only its parent and dies with it.

Started by ``process.py`` as ``python -m dgx_music.inference.child FD SETTINGS``, with the channel's file descriptor and
the engine's settings as JSON. The main thread reads messages; each generation runs in a thread of a pool of as many as
the engine has slots.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from dgx_music.errors import EngineError, EngineUnavailableError, GenerationCancelledError, GenerationRejectedError
from dgx_music.inference.channel import Decoder, Message, encode
from dgx_music.inference.engine import Audio, Engine, EngineSettings, GenerationRequest, LoadEngine

ENGINES = {"musicgen": "dgx_music.inference.musicgen", "tone": "dgx_music.inference.tone"}
PROGRESS_SECONDS = 0.5

_READ_BYTES = 65_536
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

logger = logging.getLogger(__name__)


class Channel:
    """The child's end of the channel: blocking, ``send`` is safe from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._decoder = Decoder()

    def send(self, message: bytes) -> None:
        """Send one encoded message whole. Raises ``ConnectionError`` where the parent is gone."""
        with self._sending:
            self._connection.sendall(message)

    def messages(self) -> Iterator[Message]:
        """Yield what the parent sends until it hangs up."""
        while data := self._connection.recv(_READ_BYTES):
            yield from self._decoder.feed(data)


class ChannelRun:
    """One generation's line back to the parent: a ``Run`` that can be cancelled."""

    def __init__(self, key: int, channel: Channel) -> None:
        self.key = key
        self._channel = channel
        self._cancelled = threading.Event()
        self._next_progress_at = 0.0

    def report_progress(self, progress: float) -> None:
        """Send the progress, unless some was sent less than ``PROGRESS_SECONDS`` ago."""
        now = time.monotonic()
        if now >= self._next_progress_at:
            self._next_progress_at = now + PROGRESS_SECONDS
            self._channel.send(encode({"kind": "progress", "key": self.key, "progress": progress}))

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` once ``cancel`` was called."""
        if self._cancelled.is_set():
            raise GenerationCancelledError("The generation was cancelled.")

    def cancel(self) -> None:
        """Ask the engine to stop this generation, and only this one."""
        self._cancelled.set()


def main() -> None:
    """Load the engine and serve generations; ends with the process, at once, when the parent hangs up."""
    faulthandler.enable()
    _obey_only_the_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)  # a process that an engine starts must not hold the channel open
    with suppress(ConnectionError):
        load_and_serve(EngineSettings(**json.loads(sys.argv[2])), Channel(connection))
    os._exit(0)  # a generation may still run in its thread; nobody waits for it any more


def load_and_serve(settings: EngineSettings, channel: Channel) -> None:
    """Say ``ready`` or ``unavailable``; an engine that is ready serves until the parent hangs up."""
    try:
        engine = load_engine(settings)
    except EngineUnavailableError as error:
        channel.send(_unavailable(str(error)))
    except Exception as error:
        logger.exception("engine %s did not load", settings.engine)
        channel.send(_unavailable(f"{type(error).__name__}: {error}"))
    else:
        channel.send(_ready(engine))
        serve(engine, channel)


def load_engine(settings: EngineSettings) -> Engine:
    """Import the engine's module and build it. Raises ``EngineUnavailableError`` for a name that is not known."""
    if settings.engine not in ENGINES:
        raise EngineUnavailableError(f"The engine {settings.engine!r} is not known; use {' or '.join(ENGINES)}.")
    load: LoadEngine = importlib.import_module(ENGINES[settings.engine]).load
    return load(settings)


def serve(engine: Engine, channel: Channel) -> None:
    """Start and cancel generations as the parent asks, until it hangs up."""
    runs: dict[int, ChannelRun] = {}
    pool = ThreadPoolExecutor(engine.slots, "generation")
    for header, _ in channel.messages():
        key = header["key"]
        if header["kind"] == "generate":
            runs[key] = ChannelRun(key, channel)
            pool.submit(_perform, engine, header["request"], runs, key, channel)
        elif run := runs.get(key):  # else it has just ended: its reply is on the way
            run.cancel()


def _perform(engine: Engine, fields: dict[str, Any], runs: dict[int, ChannelRun], key: int, channel: Channel) -> None:
    reply = _reply(engine, fields, runs[key])
    del runs[key]
    channel.send(reply)


def _reply(engine: Engine, fields: dict[str, Any], run: ChannelRun) -> bytes:
    """Return the reply to one ``generate``; no exception leaves it, since a slot without a reply is lost for ever."""
    try:
        run.check_cancelled()
        return _audio(run.key, engine.generate(GenerationRequest(**fields), run))
    except (GenerationCancelledError, GenerationRejectedError) as error:
        return _failed(run.key, type(error).__name__, str(error))
    except EngineError as error:
        return _failed(run.key, EngineError.__name__, str(error))
    except BaseException as error:
        logger.exception("generation %s failed", fields.get("generation_id"))
        return _failed(run.key, EngineError.__name__, f"{type(error).__name__}: {error}")


def _ready(engine: Engine) -> bytes:
    info = {
        "slots": engine.slots,
        "device": engine.device,
        "model_version": engine.model_version,
        "notice": engine.notice,
        "pid": os.getpid(),
    }
    return encode({"kind": "ready", "info": info})


def _unavailable(message: str) -> bytes:
    return encode({"kind": "unavailable", "message": message})


def _audio(key: int, audio: Audio) -> bytes:
    samples = np.asarray(audio.samples, dtype=np.float32)  # [channel, frame]
    header = {"shape": samples.shape, "sample_rate": audio.sample_rate, "facts": dict(audio.facts)}
    return encode({"kind": "audio", "key": key, **header}, samples.tobytes())


def _failed(key: int, error: str, message: str) -> bytes:
    return encode({"kind": "failed", "key": key, "error": error, "message": message})


def _obey_only_the_parent() -> None:
    """Ignore the signals that a terminal or a supervisor sends to everybody; on Linux die when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
