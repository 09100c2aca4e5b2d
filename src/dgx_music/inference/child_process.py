"""One life of the engines' process, seen from the worker: its start, its channel and its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Self, cast

from dgx_music.errors import (
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
)
from dgx_music.inference.channel import Decoder, encode_in_parts
from dgx_music.inference.engine import EngineSettings
from dgx_music.inference.messages import FromChild, FromParent

ReceiveMessage = Callable[[FromChild], None]
OnDeath = Callable[[type[EngineError], str], None]
"""Hears once that the process is dead: with which error its calls fail, and how it ended."""

_STDERR = 2
_REMAINING_MESSAGES_SECONDS = 10.0
"""How long the channel may end before the process, or after it: freeing a GPU takes a while."""
_NEEDED = re.compile(
    # any program
    r"(PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|LC_\w+|TZ|TMPDIR|TMP|TEMP|TERM"
    r"|VIRTUAL_ENV|CONDA_PREFIX"
    # its libraries
    r"|PYTHON\w*|LD_\w+|MALLOC_\w+|GLIBC_TUNABLES|XDG_\w+"
    # compilers
    r"|CC|CXX|CFLAGS|CPPFLAGS|CXXFLAGS|LDFLAGS|CPATH|C_INCLUDE_PATH|CPLUS_INCLUDE_PATH"
    r"|LIBRARY_PATH"
    # arithmetic
    r"|(OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|SAFETENSORS)_\w+"
    # devices
    r"|(CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|NVTX|ROCM|HIP|HSA|ROCR|GPU|AMD)_\w+"
    # weights
    r"|(HF|HUGGINGFACE|HUGGING_FACE|TRANSFORMERS|TQDM)_\w+"
    r"|SSL_CERT_\w+|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE"
    r"|(HTTPS?|ALL|NO|FTP|https?|all|no|ftp)_(PROXY|proxy)"
    # the tone engine's script; all other settings come as arguments
    r"|DGX_MUSIC_TONE_\w+)"
)
"""The environment variables that the engines' process gets.

A list of what is allowed, because nobody can name every secret that a worker's environment may
hold: a variable that this list forgets is missing in the process, but does not leak.
"""
_SECRET = re.compile(
    r"(?!HF_TOKEN|HUGGING_?FACE_)\w*(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)\w*",
    re.IGNORECASE,
)
"""Names that match ``_NEEDED`` but are secrets, such as ``NVIDIA_API_KEY``.

The Hugging Face hub's own token is allowed: downloads need it.
"""


class ChildProcess:
    """A running process and the parent's end of its channel; it is started once and ends once."""

    def __init__(
        self, process: asyncio.subprocess.Process, channel: _Channel, on_death: OnDeath
    ) -> None:
        self._process = process
        self._channel = channel
        self._on_death = on_death
        self._end_reason: tuple[type[EngineError], str] | None = None
        self._reaping = asyncio.create_task(self._reap(), name=f"engine process {self.pid}")

    @classmethod
    async def spawn(
        cls, settings: EngineSettings, receive: ReceiveMessage, on_death: OnDeath
    ) -> Self:
        """Start the process, which loads nothing by itself; ``receive`` gets its messages.

        Raises ``EngineUnavailableError`` if it cannot be started.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            loop = asyncio.get_running_loop()
            _, channel = await loop.create_unix_connection(lambda: _Channel(receive), sock=ours)
            try:
                process = await _start_python(theirs, settings)
            except BaseException:
                channel.abort()
                raise
        return cls(process, channel, on_death)

    @property
    def pid(self) -> int:
        """The id of the process; it also leads a session and a process group of this id."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """True until the process or its channel has ended, or ``kill`` was called."""
        return self._may_run and not self._channel.is_closing()

    def send(self, message: FromParent) -> None:
        """Send a message, without waiting; it is lost if the process is dead."""
        self._channel.send(message)

    def kill(self, error: type[EngineError], reason: str) -> None:
        """Kill the process, unless it is dead; ``on_death`` gets this error and this reason."""
        if self._may_run:
            self._end_reason = error, reason
            self._channel.abort()
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # its session: the engine's own children too

    async def end(self, reason: str) -> None:
        """Kill the process and wait until it is gone; its calls raise ``EngineReplacedError``."""
        self.kill(EngineReplacedError, reason)
        await self.wait_until_reaped()

    async def wait_until_reaped(self) -> None:
        """Wait until the process is gone and ``on_death`` was called."""
        await asyncio.wait((self._reaping,))

    @property
    def _may_run(self) -> bool:
        return self._process.returncode is None and self._end_reason is None

    async def _reap(self) -> None:
        """Wait for the end of the process, receive its remaining messages, and call ``on_death``."""
        closed, exited = self._channel.closed, asyncio.ensure_future(self._process.wait())
        await asyncio.wait((closed, exited), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((closed, exited), timeout=_REMAINING_MESSAGES_SECONDS)
        self.kill(EngineCrashedError, "closed its channel but did not end")
        self._channel.abort()
        self._on_death(*(self._end_reason or (EngineCrashedError, _describe_exit(await exited))))
        await asyncio.wait((closed, exited))


class _Channel(asyncio.Protocol):
    """The parent's end of the channel. ``closed`` is done once no message can come any more."""

    _transport: asyncio.Transport

    def __init__(self, receive: ReceiveMessage) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receive = receive
        self._decoder = Decoder()

    def send(self, message: FromParent) -> None:
        for part in encode_in_parts(message):
            self._transport.write(part)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._decoder.feed(data):
            self._receive(cast(FromChild, message))

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)


async def _start_python(
    channel: socket.socket, settings: EngineSettings
) -> asyncio.subprocess.Process:
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
        message = f"The engine's process cannot be started: {error}."
        raise EngineUnavailableError(message) from error


def _may_have(name: str) -> bool:
    return _NEEDED.fullmatch(name) is not None and _SECRET.fullmatch(name) is None


def _describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = " (often the kernel's out-of-memory killer)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
