"""The request that goes into an engine, the audio that comes out, and the engine's interface."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from dgx_music import validation
from dgx_music.audio.samples import Audio
from dgx_music.catalog import DEFAULT_MODEL
from dgx_music.errors import InvalidRequestError
from dgx_music.sampling import CHOSEN_SEED_BITS, Sampling


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Sampling):
    """One validated request; building it raises ``InvalidRequestError`` on the first bad field.

    An empty ``prompt`` asks for unconditional music. ``channels`` and ``sample_rate`` are those of
    the file, whatever the model produces. The music starts with ``continuation``, at most 30 s of 1
    or 2 channels, and ``duration`` counts from its start. The music follows the tune of ``melody``,
    at most 300 s of 1 channel. Each clip has its own sample rate.
    """

    generation_id: str
    prompt: str
    duration: float
    model: str = DEFAULT_MODEL
    attempt: int = 0
    channels: int = 1
    sample_rate: int = 32_000
    continuation: Audio | None = field(default=None, repr=False)
    melody: Audio | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        model = validation.check_model(self.model)
        self._set("prompt", validation.check_prompt(self.prompt))
        self._set("duration", validation.check_duration(self.duration, model.max_duration_seconds))
        self._set("channels", validation.check_integer("channels", self.channels, 1, 2))
        self._set(
            "sample_rate", validation.check_integer("sample_rate", self.sample_rate, 8_000, 192_000)
        )
        super().__post_init__()
        if self.continuation is not None:
            _check_samples("continuation", self.continuation, channels=2)
            validation.check_continuation(self.continuation.duration, self.duration)
        if self.melody is not None:
            validation.check_hears_melody(model)
            _check_samples("melody", self.melody, channels=1)
            validation.check_clip("melody", self.melody.duration, validation.MELODY_SECONDS)

    @property
    def effective_seed(self) -> int:
        """The seed asked for, or one made from the id: each attempt makes the same audio."""
        return seed_of(self.generation_id) if self.seed is None else self.seed


def seed_of(generation_id: str) -> int:
    """Return the seed of a generation that was given none: always the same, below 2**53."""
    digest = hashlib.sha256(generation_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - CHOSEN_SEED_BITS)


def _check_samples(name: str, clip: Audio, channels: int) -> None:
    """Refuse samples with more channels than this, without frames, or with NaN or infinity."""
    samples = clip.samples
    if samples.ndim != 2 or not 1 <= samples.shape[0] <= channels or not samples.shape[1]:
        remedy = f"use [1 to {channels} channels, frames]"
        raise InvalidRequestError(name, f"has the shape {samples.shape}", remedy)
    if not (-math.inf < samples.min() and samples.max() < math.inf):  # false for NaN too
        raise InvalidRequestError(name, "holds NaN or infinite samples", "use another clip")


class Run(Protocol):
    """How an engine talks to the worker about one generation; safe to call from any thread."""

    def report_progress(self, progress: float) -> None:
        """Publish how much is done, 0 to 1; cheap: call it at each step."""

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` after a cancel; call it at each step."""

    def free_slot(self) -> None:
        """Free the slot for another generation: all tokens are there, only the audio is to be made.

        The end of the generation does this too; a second call changes nothing.
        """

    def hand_out(self, audio: Audio, start: int) -> None:
        """Hand out a part of the audio that is made already, for those who listen meanwhile.

        ``start`` is the place of its first sample in the whole. The parts follow each other without
        gaps, in the channels and at the rate of the whole. An engine that makes all its audio at
        once does not call it.
        """

    def make_room(self) -> bool:
        """Unload idle engines after running out of memory; ``True`` if it is worth a retry."""


class Engine(Protocol):
    """Loads once, generates many; runs in a process of its own, beside engines of other models.

    Each generation has a thread. ``slots`` of them run at a time, and as many more that have called
    ``Run.free_slot``.

    Optional: ``memory_bytes``, the device memory that it holds, and ``close()``, which frees it.
    Its module has ``load``, and may have ``estimate_bytes(settings)``: how much an engine would
    hold, or ``None`` if that is not known.
    """

    device: str
    model_version: str
    notice: str | None
    """One sentence that a user must read (untrained weights, a licence), or ``None``."""

    @property
    def slots(self) -> int:
        """How many generations run at a time; may fall if memory runs out, never rise."""

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the audio of one request, ``request.duration`` seconds long to within one sample.

        Raises ``GenerationCancelledError`` soon after a cancel, ``GenerationRejectedError`` if no
        retry can help, and any other exception for a failure that another attempt may avoid.
        """


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How to build an engine: plain values, so that they travel to its process."""

    engine: str
    model: str
    device: str = "auto"
    dtype: str = "auto"
    slots: int | None = None
    """``None`` for as many as there is memory for."""
    revision: str | None = None
    weights: str = "full"
    """``int8`` and ``int4`` round the language model's weights to 8 or 4 bits."""
    kv_cache: str = "full"
    """``fp8`` keeps attention's keys and values in 8 bits."""
    kernels: str = "auto"
    """``auto`` builds kernels in C for a CPU, ``off`` leaves all work to torch."""
    model_count: int = 1
    """How many models one process may load; they share the device's memory."""


LoadEngine = Callable[[EngineSettings], Engine]
EstimateBytes = Callable[[EngineSettings], int | None]
