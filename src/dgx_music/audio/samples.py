"""Audio in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:  # producers build requests too, and need no NumPy for that
    import numpy as np
    from numpy.typing import NDArray

Samples: TypeAlias = "NDArray[np.float32]"
"""``[channel, frame]``, nominally within ±1."""


@dataclass(frozen=True, eq=False)  # arrays have no one answer to ==
class Audio:
    """Audio in memory: float32 ``[channel, frame]``, nominally within ±1, at a rate in Hz."""

    samples: Samples
    sample_rate: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """How it was made (``seed``, ``device_seconds``, ``is_untrained``), for the user; plain
    JSON."""

    @property
    def duration(self) -> float:
        """Seconds of audio."""
        return float(self.samples.shape[-1] / self.sample_rate)
