"""From a container to samples, block by block, with no length believed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from dgx_music.audio.containers.interface import READABLE, DamagedError
from dgx_music.audio.samples import Audio

BLOCK_FRAMES = 65_536

_PROGRAM = Path(__file__).with_name("quiet.py")
_PATIENCE_SECONDS = 60
_HEADER_BYTES = 8
_ENVIRONMENT = (
    "PATH",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "SYSTEMROOT",
)
"""What Python and libsndfile need to be found; the rest may hold secrets."""


class Stream(soundfile.SoundFile):  # type: ignore[misc]  # it has no types
    """A file that is only read on: to seek, libFLAC must know how long it is."""

    def seekable(self) -> bool:
        """Return ``False``, even if the container can seek."""
        return False

    def audio_blocks(self) -> Iterator[Audio]:
        """Yield the audio to its true end; raises ``DamagedError`` if it stops before."""
        try:
            while len(block := self.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
                yield Audio(block.T, self.samplerate)  # [channel, frame]
        except soundfile.SoundFileError:
            raise DamagedError("is damaged, or ends in the middle") from None


def open_stream(content: bytes) -> Stream:
    """Return the file; raises ``DamagedError`` if it is not audio."""
    try:
        return Stream(io.BytesIO(content))
    except soundfile.SoundFileError:
        raise DamagedError("is not audio that can be read", READABLE) from None


def decode_quietly(content: bytes) -> Audio:
    """Return the audio of an MP3, decoded in a process of its own, without a stderr.

    libmpg123 writes its complaints to file descriptor 2, which belongs to the caller. Raises
    ``DamagedError``.
    """
    command = [sys.executable, "-P", str(_PROGRAM)]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        done = subprocess.run(  # noqa: S603 - our own program; no argument comes from the request
            command,
            input=content,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DamagedError("takes too long to decode", "use a shorter clip") from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise DamagedError(f"cannot be decoded here ({why})", "use WAV, FLAC or OGG") from error
    # The length counts too: a program that ignores SIGCHLD gets no exit code.
    if done.returncode != 0 or len(done.stdout) < _HEADER_BYTES:
        raise DamagedError("cannot be decoded")
    rate, channels = np.frombuffer(done.stdout[:_HEADER_BYTES], np.uint32).tolist()
    return Audio(
        np.frombuffer(done.stdout[_HEADER_BYTES:], np.float32).reshape(-1, channels).T, rate
    )
