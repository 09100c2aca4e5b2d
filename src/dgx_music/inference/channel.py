"""Messages between a worker and its engine's process: a JSON header, then raw bytes, both prefixed by their lengths.

From the parent: ``generate`` and ``cancel``. From the child: ``ready`` or ``unavailable`` (once, first), then for each
generation any number of ``progress`` and exactly one of ``audio`` and ``failed``, which frees its slot. A generation is
known by its ``key``, a number that one child never sees twice.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

_LENGTHS = struct.Struct("!II")  # of the header and of the payload, in bytes


class Message(NamedTuple):
    """What travels: ``header`` is plain JSON with a ``kind``, ``payload`` is empty for all kinds but ``audio``."""

    header: dict[str, Any]
    payload: bytearray


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """Return the message as the bytes that ``Decoder`` understands."""
    text = json.dumps(header).encode()
    return b"".join((_LENGTHS.pack(len(text), len(payload)), text, payload))


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
