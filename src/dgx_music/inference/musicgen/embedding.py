"""What goes into the first layer: a token of each codebook, and the position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Embedding:
    """The tables of the K codebooks' tokens and of the positions."""

    def __init__(self, tables: Any, max_positions: int, device: torch.device | None = None) -> None:
        """Copy the codebooks' embedding modules, each of V tokens and a padding token."""
        self.tokens = torch.cat([table.weight for table in tables])  # [K * (V + 1), hidden]
        self.tokens = self.tokens.to(device or self.tokens.device)
        offsets = torch.arange(len(tables), device=self.tokens.device)
        self.offsets = offsets * len(tables[0].weight)  # [K]
        positions = sinusoids(max_positions, self.tokens.shape[1])
        self.positions = positions.to(self.tokens.device, self.tokens.dtype)  # [T, hidden]

    @property
    def device(self) -> torch.device:
        """Where the tables are."""
        return self.tokens.device

    @property
    def dtype(self) -> torch.dtype:
        """The number format of the tables."""
        return self.tokens.dtype

    @property
    def nbytes(self) -> int:
        """How much memory the tables take."""
        return self.tokens.nbytes + self.positions.nbytes

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings' sum ``[R, hidden]`` of ``[R, K]``, in transformers' order."""
        total, *others = functional.embedding(tokens + self.offsets, self.tokens).unbind(1)
        for embedded in others:
            total = total + embedded
        return total


def sinusoids(count: int, width: int) -> Tensor:
    """Return the position embeddings ``[count, width]``: cosines, then sines.

    This is audiocraft's ``create_sin_embedding``.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)
