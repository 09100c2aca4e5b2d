"""The waveform of finished audio, kept as one short text."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from functools import cached_property
from typing import overload

STEPS = 10_000
"""A peak is stored as a whole number of steps; full scale, 1, has so many."""
PREFIX = "u16:"
"""Begins each text, so that no other text is taken for a waveform."""


class Waveform(Sequence[float]):
    """The peaks of equal parts of the audio, first to last; full scale is 1.

    ``text`` is ``u16:`` and the base64 of two bytes for each peak, the lower byte first. A database
    stores it in a tenth of the time that it needs for a list of 1,000 numbers.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def of_steps(cls, data: bytes) -> Waveform:
        """Return the waveform whose peaks are these whole numbers of steps, two bytes each."""
        return cls(PREFIX + base64.b64encode(data).decode("ascii"))

    @cached_property
    def _peaks(self) -> list[float]:
        data = base64.b64decode(self.text.removeprefix(PREFIX))
        return [step / STEPS for step in struct.unpack(f"<{len(data) // 2}H", data)]

    def __len__(self) -> int:
        return len(self._peaks)

    @overload
    def __getitem__(self, place: int) -> float: ...
    @overload
    def __getitem__(self, place: slice) -> list[float]: ...
    def __getitem__(self, place: int | slice) -> float | list[float]:
        return self._peaks[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._peaks == [*other]

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<Waveform of {len(self)} peaks>"
