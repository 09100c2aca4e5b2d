"""What an application shows of finished audio, as it is stored with its row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class AudioFacts:
    """The facts of a generation's audio, as it is in its file."""

    duration_seconds: float
    sample_rate: int
    """In Hz."""
    channels: int
    format: str
    """``wav``, ``flac``, ``mp3`` or ``ogg``."""
    peak: float
    """The highest amplitude; full scale is 1."""
    loudness_lufs: float | None
    """Integrated loudness by ITU-R BS.1770-4; ``None`` for silence and for less than 0.4 s."""
    waveform: Sequence[float]
    """The peak of each of at most 1,000 equal parts, first to last; full scale is 1."""
    bpm: float | None = None
    """Beats per minute, or half or twice as many; ``None`` if there is no clear beat."""
    bpm_confidence: float | None = None
    """How like itself the rhythm is from beat to beat, up to 1."""
    key: str | None = None
    """``C`` is C major, ``F#m`` is F sharp minor; ``None`` if there is no clear key."""
    key_confidence: float | None = None
    """How far the key is ahead of the others, up to 1."""

    @classmethod
    def read(cls, stored: object) -> AudioFacts | None:
        """Return the facts from what ``to_dict`` gave, or ``None`` if one of them is missing.

        Tempo and key may be missing: older versions did not measure them.
        """
        needed = {each.name for each in fields(cls) if each.default is MISSING}
        if not isinstance(stored, Mapping) or not stored.keys() >= needed:
            return None
        names = [each.name for each in fields(cls) if each.name in stored]
        return cls(**{name: stored[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain JSON values."""
        return {**vars(self), "waveform": list(self.waveform)}
