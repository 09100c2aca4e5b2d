"""The floor: what a good engineer would write with the raw driver, the same statements with the same durability."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from dgx_music.audio import files as audio
from dgx_music.audio.samples import Audio

MODEL = "musicgen-small"
SLOTS = 16
SILENCE = Audio(np.zeros((1, 2_560), dtype=np.float32), 32_000)


class Floor(Protocol):
    """The raw driver at work on a migrated database; each coroutine is what one measurement times."""

    async def enqueue(self, prompts: Sequence[str]) -> None:
        """Enqueue them, one transaction each."""

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        """Enqueue them, all in one transaction."""

    async def claim(self) -> bool:
        """Claim one row; return False where there is none."""

    async def drain(self) -> None:
        """Claim and complete one row at a time until there is none."""

    async def add_finished(self, count: int) -> None:
        """Add completed generations, a year of them; not timed."""

    async def close(self) -> None:
        """Close every connection."""


def audio_facts() -> str:
    """Return what completion stores of the silence, as JSON: made once, so that it costs the floor nothing."""
    finished = audio.finish(SILENCE, sample_rate=32_000, channels=1, audio_format="wav", loudness="lufs")
    return json.dumps(finished.facts)
