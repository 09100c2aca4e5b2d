"""The floor: what a good engineer would write with the raw driver.

It runs the same statements with the same durability.
"""

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
    """The raw driver on a migrated database; each measurement times one coroutine."""

    async def enqueue(self, prompts: Sequence[str]) -> None:
        """Enqueue them, one transaction each."""

    async def enqueue_many(self, prompts: Sequence[str]) -> None:
        """Enqueue them, all in one transaction."""

    async def claim(self) -> bool:
        """Claim one row; return False if there is none."""

    async def drain(self) -> None:
        """Claim and complete one row at a time until there is none."""

    async def add_finished(self, count: int) -> None:
        """Add completed generations, spread over a year; not timed."""

    async def close(self) -> None:
        """Close every connection."""


def audio_facts() -> str:
    """Return the facts that a completion stores of the silence, as JSON.

    They are made once, so that they cost the floor nothing.
    """
    finished = audio.finish(
        SILENCE, sample_rate=32_000, channels=1, audio_format="wav", loudness="lufs"
    )
    return json.dumps(finished.facts)
