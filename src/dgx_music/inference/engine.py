"""What goes into an engine (a request), what comes out (audio), and what an engine is."""

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
from dgx_music.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Sampling):
    """One validated request; building it raises ``InvalidRequestError`` on the first unacceptable field.

    An empty ``prompt`` asks for unconditional music. ``channels`` and ``sample_rate`` are those of the file, whatever
    the model produces. The music starts with ``continuation``, at most 30 s of 1 or 2 channels, and ``duration``
    counts from its start. The music follows the tune of ``melody``, at most 30 s of 1 channel. Each clip has its own
    sample rate.
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
        self._set("sample_rate", validation.check_integer("sample_rate", self.sample_rate, 8_000, 192_000))
        super().__post_init__()
        if self.continuation is not None:
            _check_samples("continuation", self.continuation, channels=2)
            validation.check_continuation(self.continuation.duration, self.duration)
        if self.melody is not None:
            validation.check_hears_melody(model)
            _check_samples("melody", self.melody, channels=1)
            validation.check_clip("melody", self.melody.duration)

    @property
    def effective_seed(self) -> int:
        """The seed that was asked for, or one that follows from the id: each attempt makes the same audio."""
        if self.seed is not None:
            return self.seed
        return int.from_bytes(hashlib.sha256(self.generation_id.encode()).digest()[:8], "big") >> 1


def _check_samples(name: str, clip: Audio, channels: int) -> None:
    """Refuse what is no audio of 1 to so many channels, or holds numbers that are not finite."""
    samples = clip.samples
    if samples.ndim != 2 or not 1 <= samples.shape[0] <= channels or not samples.shape[1]:
        raise InvalidRequestError(name, f"has the shape {samples.shape}", f"use [1 to {channels} channels, frames]")
    if not (-math.inf < samples.min() and samples.max() < math.inf):  # false for NaN too
        raise InvalidRequestError(name, "holds NaN or infinite samples", "use another clip")


class Run(Protocol):
    """One generation's line back to who asked for it; safe to call from any thread."""

    def report_progress(self, progress: float) -> None:
        """Publish how much is done, 0 to 1; cheap, call it at every step."""

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` once the generation was cancelled; call it at every step."""

    def free_slot(self) -> None:
        """Say that the slot is free for another generation: the tokens are there, and only the audio is to be made.

        The end of the generation says so as well; calling it again changes nothing.
        """

    def make_room(self) -> bool:
        """Unload idle engines after running out of memory; return whether there were any, and another try is worth it."""


class Engine(Protocol):
    """Loads once, generates many. Runs in a process of its own, beside the engines of other models.

    Each generation has a thread. ``slots`` of them run at a time, and as many again after ``Run.free_slot``.

    What an engine may have besides: ``memory_bytes``, how much it holds of the device's memory, and ``close()``, which drops
    it all. What its module may have beside ``load``: ``estimate_bytes(settings)``, how much an engine would hold, or
    ``None`` where that is not known.
    """

    device: str
    model_version: str
    notice: str | None
    """One sentence that a user must read (untrained weights, a licence), or ``None``."""

    @property
    def slots(self) -> int:
        """How many generations run at a time; may come to be fewer, where memory does not suffice, and never more."""

    def generate(self, request: GenerationRequest, run: Run) -> Audio:
        """Return the audio of one request, ``request.duration`` seconds of it to within one sample.

        Raises ``GenerationCancelledError`` soon after a cancel, ``GenerationRejectedError`` where no retry can help, and
        anything else for a failure that another attempt may not meet.
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
    """``int8`` rounds the language model's weights to 8 bits."""
    kv_cache: str = "full"
    """``fp8`` keeps attention's keys and values in 8 bits."""
    compile: str = "auto"
    """``auto`` builds kernels in C for a CPU, ``on`` has torch compile the step instead, ``off`` does neither."""
    model_count: int = 1
    """How many models one process may be asked for; they share the device's memory."""


LoadEngine = Callable[[EngineSettings], Engine]
EstimateBytes = Callable[[EngineSettings], int | None]
