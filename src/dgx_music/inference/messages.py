"""The messages between a worker and its engines' process. Each kind of message is one dataclass.

The parent sends ``Load``, ``Generate`` and ``Cancel``. The child answers:

- each ``Load`` with one ``Ready`` or one ``Unavailable``;
- each ``Generate`` with any number of ``Progress`` and ``Part``, with at most one ``SlotFreed``
  among them, and at the end exactly one ``Finished`` or ``Failed``.

The child sends ``SlotsReduced``, ``Unloaded`` and ``DeviceLost`` unasked.

``model`` is the name of an engine's model. ``key`` identifies a generation: a number that one child
never gets twice. ``samples`` are raw float32 values, channel after channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from dgx_music.audio.samples import Audio
from dgx_music.errors import (
    EngineError,
    EngineReplacedError,
    GenerationCancelledError,
    GenerationRejectedError,
)
from dgx_music.inference.engine import GenerationRequest

_FAILURES: dict[str, type[EngineError]] = {
    error.__name__: error
    for error in (
        EngineError,
        EngineReplacedError,
        GenerationCancelledError,
        GenerationRejectedError,
    )
}


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself; ``pid`` is its process."""

    slots: int
    device: str
    model_version: str
    notice: str | None
    pid: int


@dataclass(frozen=True)
class Load:
    """Load the engine of ``model``. ``slots`` is ``None`` for as many as fit into memory."""

    model: str
    slots: int | None


@dataclass(frozen=True)
class Ready:
    """The engine of ``model`` is loaded."""

    model: str
    info: EngineInfo


@dataclass(frozen=True)
class Unavailable:
    """The engine of ``model`` cannot be loaded; ``message`` says why. Other engines go on."""

    model: str
    message: str


@dataclass(frozen=True)
class Generate:
    """Begin a generation. The engine of the request's model is loaded.

    ``fields`` are the fields of the request except its clips. ``clips`` maps each clip's name to
    ``[channels, frames, sample_rate]``; ``samples`` are those of all clips, in the same order.
    """

    key: int
    fields: dict[str, Any]
    clips: dict[str, list[int]]
    samples: bytes | bytearray | memoryview

    @classmethod
    def of(cls, key: int, request: GenerationRequest) -> Self:
        """Return the message for a request."""
        clips = {name: clip for name, clip in vars(request).items() if isinstance(clip, Audio)}
        return cls(
            key,
            {name: value for name, value in vars(request).items() if name not in clips},
            {name: [*clip.samples.shape, clip.sample_rate] for name, clip in clips.items()},
            _joined([_bytes_of(clip) for clip in clips.values()]),
        )

    def request(self) -> GenerationRequest:
        """Return the request. Raises ``InvalidRequestError`` if a field is unacceptable."""
        clips, start = {}, 0
        for name, (channels, frames, sample_rate) in self.clips.items():
            samples = np.frombuffer(self.samples, np.float32, channels * frames, start)
            clips[name] = Audio(samples.reshape(channels, frames), sample_rate)
            start += samples.nbytes
        return GenerationRequest(**self.fields | clips)


@dataclass(frozen=True)
class Cancel:
    """Stop a generation. It is answered by the ``Finished`` or ``Failed`` of its ``Generate``."""

    key: int


@dataclass(frozen=True)
class Progress:
    """So much of a generation is done, from 0 to 1."""

    key: int
    progress: float


@dataclass(frozen=True)
class Part:
    """A part of a generation's audio, ahead of the whole; its first sample is number ``start``."""

    key: int
    start: int
    shape: list[int]
    sample_rate: int
    samples: bytes | bytearray | memoryview

    @classmethod
    def of(cls, key: int, audio: Audio, start: int) -> Self:
        """Return the message for a part of a generation's audio."""
        return cls(key, start, list(audio.samples.shape), audio.sample_rate, _bytes_of(audio))

    def audio(self) -> Audio:
        """Return the audio, without copying the samples."""
        return Audio(np.frombuffer(self.samples, np.float32).reshape(self.shape), self.sample_rate)


@dataclass(frozen=True)
class SlotFreed:
    """Another generation may have the slot: the tokens are there, only the audio is missing."""

    key: int


@dataclass(frozen=True)
class Finished:
    """A generation is done and its slot is free. ``shape`` is ``[channels, frames]``."""

    key: int
    shape: list[int]
    sample_rate: int
    facts: dict[str, Any]
    samples: bytes | bytearray | memoryview

    @classmethod
    def of(cls, key: int, audio: Audio) -> Self:
        """Return the message for a generation's audio."""
        shape = list(audio.samples.shape)
        return cls(key, shape, audio.sample_rate, dict(audio.facts), _bytes_of(audio))

    def audio(self) -> Audio:
        """Return the audio, without copying the samples; after the channel they are writable."""
        samples = np.frombuffer(self.samples, np.float32).reshape(self.shape)  # [channel, frame]
        return Audio(samples, self.sample_rate, self.facts)


@dataclass(frozen=True)
class Failed:
    """A generation ended without audio and its slot is free. ``error`` names an exception class."""

    key: int
    error: str
    message: str

    @classmethod
    def of(cls, key: int, error: type[EngineError], message: str) -> Self:
        """Return the message for one of the classes that ``exception`` knows."""
        return cls(key, error.__name__, message)

    def exception(self) -> EngineError:
        """Return the exception for the caller who asked for the generation."""
        return _FAILURES[self.error](self.message)


@dataclass(frozen=True)
class SlotsReduced:
    """The engine of ``model`` has fewer slots from now on.

    The child sends it before the failures of the generations that lost their slots.
    """

    model: str
    slots: int


@dataclass(frozen=True)
class Unloaded:
    """The engine of ``model`` was unloaded to make room: generations fail until the next load."""

    model: str


@dataclass(frozen=True)
class DeviceLost:
    """This process cannot use its device any more and ends now; ``message`` is the error."""

    message: str


FromParent = Load | Generate | Cancel
Answer = Ready | Unavailable | Progress | Part | SlotFreed | Finished | Failed
FromChild = Answer | SlotsReduced | Unloaded | DeviceLost
Message = FromParent | FromChild


def _joined(parts: list[memoryview]) -> bytes | memoryview:
    """Return the parts one after another; a single one is not copied."""
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _bytes_of(audio: Audio) -> memoryview:
    """Return the samples as bytes, without copying them if they lie one after another."""
    samples = np.ascontiguousarray(audio.samples, dtype=np.float32)
    return samples.reshape(-1).view(np.uint8).data
