"""Codes on their way from the device to the host, while the device goes on with later steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgx_music.errors import EngineError


class Reading:
    """Codes of several rows that are being copied to the host.

    ``numbers`` are on the device: all codes, part after part, and then a mark for each slot, 0 if
    a number of its row was not finite. ``parts`` names for each part its slot and how many codes it
    has. On a GPU, make it on the stream of the steps.
    """

    def __init__(
        self, numbers: Tensor, parts: Sequence[tuple[int, int]], codebook_count: int
    ) -> None:
        self._parts = parts
        self._codebook_count = codebook_count
        self._copied: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(numbers.device))

    @property
    def is_there(self) -> bool:
        """True if ``codes`` would not wait."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def codes(self) -> list[Tensor | EngineError]:
        """Wait for the codes ``[K, frame]`` of each part.

        In place of the codes of a row whose numbers were not all finite is an error.
        """
        if self._copied is not None:
            self._copied.synchronize()
        count = sum(length for _, length in self._parts)
        marks = self._numbers[count:]
        codes = torch.split(self._numbers[:count], [length for _, length in self._parts])
        return [
            own.view(self._codebook_count, -1) if marks[slot] else _not_finite()
            for (slot, _), own in zip(self._parts, codes, strict=True)
        ]


def _not_finite() -> EngineError:
    return EngineError(
        "The model's numbers are not finite; try DGX_MUSIC_DTYPE=float32, or else other weights."
    )
