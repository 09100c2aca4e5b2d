"""Weights of 8 bits: half the bytes to read in each step, and integer sums that do not depend on who shares the batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgx_music.inference.musicgen.native import Native

_LEVELS = 127  # of int8 on either side of 0
_LEVEL = 1 / 126
"""Of a line's largest number: one less than there are, for bfloat16 may round the quotient up by one in 256."""


class Int8(NamedTuple):
    """A matrix ``[out, in]``: its rows are ``values`` times ``scales`` ``[out]``."""

    values: Tensor
    scales: Tensor
    packed: Tensor | None
    """The values in the order in which this processor multiplies them, instead of ``values``; where oneDNN is there."""
    zeros: Tensor  # [out], what oneDNN wants to know as well: 0 is 0
    native: Native | None

    @classmethod
    def of(cls, weight: Tensor, native: Native | None = None, *, may_pack: bool = True) -> Int8:
        """Return the matrix with each of its rows rounded to 255 levels, so that its largest value is kept."""
        exact = weight.float()
        scales = exact.abs().amax(1, keepdim=True).clamp_(min=1e-12) / _LEVELS  # [out, 1]
        values = (exact / scales).round_().to(torch.int8)
        zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        if not (may_pack and _can_pack(weight)):
            return cls(values, scales[:, 0], None, zeros, native)
        return cls(values.new_empty(0), scales[:, 0], torch.ops.onednn.qlinear_prepack(values, None), zeros, native)

    @property
    def nbytes(self) -> int:
        """How much memory the matrix takes."""
        values = self.values.numel() if self.packed is None else self.packed.numel()
        return values + self.scales.nbytes + self.zeros.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[N, out]`` in the format of ``x``, which is rounded line by line as well.

        A line of zeros has levels of size 0: what it is rounded to is anything, and becomes 0 again. A line with a number
        that is not finite has levels that are not, and so will be its product.
        """
        lines, levels = _round(x) if self.native is None else self.native.round_lines(x)
        if self.packed is None:
            return (self._sums(lines) * levels).to(x.dtype)
        weight, bias, out, then = (self.packed, self.scales, self.zeros), None, (1.0, 0, x.dtype), ("none", (), "")
        product: Tensor = torch.ops.onednn.qlinear_pointwise.default(lines, 1.0, 0, *weight, bias, *out, *then)
        return product.mul_(levels)

    def _sums(self, lines: Tensor) -> Tensor:
        """Return the scaled sums ``[N, out]`` in float32; the weight stands on the left as in ``layers.linear``."""
        return (torch._int_mm(self.values, lines.t()) * self.scales[:, None]).t()


def _round(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[N, in]`` in whole levels, and how large a level of each line is ``[N, 1]``."""
    levels = x.abs().amax(1, keepdim=True) * _LEVEL
    return (x / levels).round_().to(torch.int8), levels


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and hasattr(torch.ops.onednn, "qlinear_pointwise")
