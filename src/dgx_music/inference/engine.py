"""What goes into an engine (a request), what comes out (audio), and what an engine is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from dgx_music import validation
from dgx_music.catalog import DEFAULT_MODEL, MODELS

if TYPE_CHECKING:  # producers build requests too, and need no NumPy for that
    import numpy as np
    from numpy.typing import NDArray

Samples: TypeAlias = "NDArray[np.float32]"


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One validated request; building it raises ``InvalidRequestError`` on the first unacceptable field.

    The sampling defaults are audiocraft's (``audiocraft/models/musicgen.py``, ``set_generation_params``): top_k 250,
    top_p off, temperature 1.0, guidance 3.0. ``temperature`` 0 decodes greedily. ``channels`` and ``sample_rate`` are
    what the file will have, whatever the model produces.
    """

    generation_id: str
    prompt: str
    duration: float
    model: str = DEFAULT_MODEL
    attempt: int = 0
    channels: int = 1
    sample_rate: int = 32_000
    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 250
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        model = validation.check_model(self.model)
        self._set("prompt", validation.check_prompt(self.prompt))
        self._set("duration", validation.check_duration(self.duration, model.max_duration_seconds))
        validation.check_integer("channels", self.channels, 1, 2)
        validation.check_integer("sample_rate", self.sample_rate, 8_000, 192_000)
        self._set("guidance_scale", validation.check_between("guidance_scale", self.guidance_scale, 1, 20))
        self._set("temperature", validation.check_between("temperature", self.temperature, 0, 5))
        validation.check_integer("top_k", self.top_k, 0, validation.MAX_TOP_K)
        if self.top_p is not None:
            self._set("top_p", validation.check_between("top_p", self.top_p, 0.01, 1))
        if self.seed is not None:
            validation.check_integer("seed", self.seed, 0, validation.MAX_SEED)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the documented way to normalise a field of a frozen dataclass

    @property
    def effective_seed(self) -> int:
        """The seed asked for, else one that follows from the id: every attempt of a generation makes the same audio."""
        if self.seed is not None:
            return self.seed
        return int.from_bytes(hashlib.sha256(self.generation_id.encode()).digest()[:8], "big") >> 1

    @property
    def sampling(self) -> dict[str, float | int | None]:
        """The sampling fields, in the form that is stored."""
        return {
            "guidance_scale": self.guidance_scale,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Audio:
    """What an engine made: ``samples`` float32 ``[channel, frame]``, nominally within ±1, at ``sample_rate`` Hz."""

    samples: Samples
    sample_rate: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a user should know of how it was made (``seed``, ``device_seconds``, ``is_untrained``); plain JSON."""

    @property
    def duration(self) -> float:
        """Seconds of audio."""
        return float(self.samples.shape[-1] / self.sample_rate)


class Run(Protocol):
    """One generation's line back to who asked for it; safe to call from any thread."""

    def report_progress(self, progress: float) -> None:
        """Publish how much is done, 0 to 1; cheap, call it at every step."""

    def check_cancelled(self) -> None:
        """Raise ``GenerationCancelledError`` once the generation was cancelled; call it at every step."""


class Engine(Protocol):
    """Loads once, generates many. Runs in a process of its own, ``slots`` generations at a time, each in a thread."""

    slots: int
    device: str
    model_version: str
    notice: str | None
    """One sentence that a user must read (untrained weights, a licence), or ``None``."""

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
    slots: int = 1
    revision: str | None = None


LoadEngine = Callable[[EngineSettings], Engine]


def is_untrained(model: str) -> bool:
    """True where the model has random weights, so that its audio is noise."""
    return model in MODELS and MODELS[model].is_untrained
