"""How messages travel between a worker and its engines' process: as bytes on a stream socket.

Each message is a JSON header and then raw samples. The lengths of both come first, in 4 bytes each.
A long array of samples is sent from where it lies, and the ``Decoder`` of the parent and the child
reads it to where it stays: nowhere are there two copies of it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TypeAlias, get_args

from dgx_music.inference.messages import EngineInfo, Message

Bytes: TypeAlias = bytes | bytearray | memoryview

_LENGTHS = struct.Struct("!II")  # of the header and of the samples, in bytes
_PART_COUNT = 3
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    """Return the message as the bytes that ``Decoder`` reads; raises as ``encode_in_parts``."""
    return b"".join(encode_in_parts(message))


def encode_in_parts(message: Message) -> tuple[bytes, Bytes]:
    """Return the message as two pieces of bytes, the second of which are its samples, not copied.

    Raises ``TypeError`` if a field holds a value that JSON cannot express.
    """
    fields = dict(vars(message))
    samples: Bytes = fields.pop("samples", b"")
    if "info" in fields:
        fields["info"] = asdict(fields["info"])
    header = json.dumps([type(message).__name__, fields]).encode()
    return _LENGTHS.pack(len(header), len(samples)) + header, samples


class Decoder:
    """Puts messages together from a stream that arrives in pieces of any length.

    A message has three parts: its lengths, its header and its samples. Each is filled in place.
    """

    def __init__(self) -> None:
        self._whole: list[bytearray] = []
        self._part = bytearray(_LENGTHS.size)
        """The one that follows the whole ones."""
        self._filled = 0

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """Yield the messages that ``data`` completes, in order."""
        rest = memoryview(data)
        while True:
            taken = rest[: len(self._part) - self._filled]
            memoryview(self._part)[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rest = rest[len(taken) :]
            if self._filled < len(self._part):
                return
            yield from self._advance()

    def _advance(self) -> Iterator[Message]:
        """Go on to the next part; yield the message if there is none."""
        self._whole.append(self._part)
        self._filled = 0
        if len(self._whole) < _PART_COUNT:
            lengths = _LENGTHS.unpack(self._whole[0])
            self._part = bytearray(lengths[len(self._whole) - 1])
            return
        _, header, samples = self._whole
        self._whole, self._part = [], bytearray(_LENGTHS.size)
        yield _decode(json.loads(header), samples)


def _decode(header: tuple[str, dict[str, Any]], samples: bytearray) -> Message:
    name, fields = header
    kind = _KINDS[name]
    if "info" in fields:
        fields["info"] = EngineInfo(**fields["info"])
    if "samples" in kind.__dataclass_fields__:
        fields["samples"] = samples
    return kind(**fields)
