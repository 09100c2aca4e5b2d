"""Messages between a worker and its engine's process: a JSON header, then raw bytes, both prefixed by their lengths.

From the parent:

``load``         have the engine of ``model`` loaded, with ``slots`` of them (``null``: as many as it thinks fit)
``generate``     begin the ``request``, of a model that is loaded; the payload is the samples of its ``clips``, float32, of
                 each that ``shape``
``cancel``       stop that generation

From the child, for each ``load`` one of these:

``ready``        the engine of ``model`` is loaded; ``info`` is what it says of itself
``unavailable``  it cannot be, and ``message`` says why; the engines of other models are not concerned

for each ``generate`` any number of ``progress``, then at most one ``freed``, and exactly one of the last two:

``progress``     ``progress`` of it is done, from 0 to 1
``freed``        its slot is free for another one; only its audio is still to be made
``audio``        it is done, and its slot free; the payload is the samples, float32, of that ``shape``
``failed``       it is not, and its slot free; ``error`` is the kind of error, ``message`` what it says

and of its own accord:

``slots``        the engine of ``model`` has only so many ``slots`` from now on; said before the failures that it has caused
``unloaded``     the engine of ``model`` was unloaded to make room: a ``generate`` for it fails until another ``load``
``broken``       the device is lost to this process, which ends now; ``message`` is the error

A generation is known by its ``key``, a number that one child never sees twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dgx_music.audio.samples import Audio
from dgx_music.inference.engine import GenerationRequest

_LENGTHS = struct.Struct("!II")  # of the header and of the payload, in bytes


class Message(NamedTuple):
    """What travels: ``header`` is plain JSON with a ``kind``, ``payload`` the samples of those kinds that have some."""

    header: dict[str, Any]
    payload: bytearray


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Return the message as the bytes that ``Decoder`` understands."""
    text = json.dumps(header).encode()
    return b"".join((_LENGTHS.pack(len(text), len(payload)), text, payload))


def encode_request(key: int, request: GenerationRequest) -> bytes:
    """Return the ``generate`` message of a request."""
    clips = {name: clip for name, clip in vars(request).items() if isinstance(clip, Audio)}
    fields = {name: value for name, value in vars(request).items() if name not in clips}
    header: dict[str, Any] = {"kind": "generate", "key": key, "request": fields}
    if clips:
        header["clips"] = {
            name: {"shape": clip.samples.shape, "sample_rate": clip.sample_rate} for name, clip in clips.items()
        }
    samples = (np.asarray(clip.samples, dtype=np.float32).tobytes() for clip in clips.values())
    return encode(header, b"".join(samples))


def decode_request(message: Message) -> GenerationRequest:
    """Return the request of a ``generate`` message; raises ``InvalidRequestError`` where it is none that is acceptable."""
    clips, start = {}, 0
    for name, clip in message.header.get("clips", {}).items():
        channels, frames = clip["shape"]
        samples = np.frombuffer(message.payload, np.float32, channels * frames, start)
        clips[name] = Audio(samples.reshape(channels, frames), clip["sample_rate"])
        start += samples.nbytes
    return GenerationRequest(**message.header["request"] | clips)


class Decoder:
    """Puts messages together from a stream that is cut anywhere."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that ``data`` completes, in order."""
        self._buffer += data
        while (message := self._take()) is not None:
            yield message

    def _take(self) -> Message | None:
        buffer = self._buffer
        if len(buffer) < _LENGTHS.size:
            return None
        header_bytes, payload_bytes = _LENGTHS.unpack_from(buffer)
        middle = _LENGTHS.size + header_bytes
        end = middle + payload_bytes
        if len(buffer) < end:
            return None
        message = Message(json.loads(buffer[_LENGTHS.size : middle]), buffer[middle:end])
        del buffer[:end]  # moves no bytes: a bytearray gives up its front for nothing
        return message
