"""Weights of 8 and of 4 bits: a step reads fewer bytes, and a row is the same in any batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dgx_music.inference.musicgen.native import Native

_LEVELS = 127  # of int8 on either side of 0
_ROW_LEVELS = 126
"""Of a row of x: one less, as bfloat16 may round the quotient up by one in 256."""
_GROUP = 32
"""Groups of 64 and 128 were no faster."""
_LEVELS_OF_4_BITS, _MIDDLE = 16, 8


class Int8(NamedTuple):
    """A matrix ``[out, in]``: its rows are ``values`` times ``scales`` ``[out]``."""

    values: Tensor
    scales: Tensor
    packed: Tensor | None
    """If oneDNN is there: the values in this processor's order, instead of ``values``."""
    zeros: Tensor  # [out], the zero points that oneDNN wants: 0 is 0
    native: Native | None

    @classmethod
    def of(cls, weight: Tensor, native: Native | None = None, *, may_pack: bool = True) -> Int8:
        """Return the matrix, each row rounded to 255 levels, so that its largest value is kept."""
        exact = weight.float()
        scales = exact.abs().amax(1, keepdim=True).clamp_(min=1e-12) / _LEVELS  # [out, 1]
        values = (exact / scales).round_().to(torch.int8)
        zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        if not (may_pack and _can_pack(weight)):
            return cls(values, scales[:, 0], None, zeros, native)
        packed = torch.ops.onednn.qlinear_prepack(values, None)
        return cls(values.new_empty(0), scales[:, 0], packed, zeros, native)

    @property
    def nbytes(self) -> int:
        """How much memory the matrix takes."""
        values = self.values.numel() if self.packed is None else self.packed.numel()
        return values + self.scales.nbytes + self.zeros.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[N, out]`` in x's format; x is rounded as well, row by row.

        A row of zeros has scale 0: whatever it is rounded to becomes 0 again. If a row has a number
        that is not finite, neither is its scale, and so neither is its product.
        """
        rounded, scales = _quantise_rows(x) if self.native is None else self.native.quantise_rows(x)
        if self.packed is None:
            return (self._sums(rounded) * scales).to(x.dtype)
        multiply = torch.ops.onednn.qlinear_pointwise.default
        weight, bias = (self.packed, self.scales, self.zeros), None
        out, then = (1.0, 0, x.dtype), ("none", (), "")
        product: Tensor = multiply(rounded, 1.0, 0, *weight, bias, *out, *then)
        return product.mul_(scales)

    def _sums(self, rounded: Tensor) -> Tensor:
        """Return the scaled sums ``[N, out]`` in float32; the weight is on the left as in ``linear``."""
        return (torch._int_mm(self.values, rounded.t()) * self.scales[:, None]).t()


class Int4(NamedTuple):
    """A matrix ``[out, in]`` in groups of 32 neighbours of a row, of 16 levels each."""

    packed: Tensor
    """The levels' numbers, two in a byte, in this processor's order."""
    levels: Tensor  # [group, out, 2], how far apart the levels of a group are, and its level 8

    @classmethod
    def of(cls, weight: Tensor) -> Int4:
        """Return the matrix; the levels of a group reach from its least to its largest number."""
        groups = weight.float().view(len(weight), -1, _GROUP)  # [out, group, 32]
        least, largest = groups.amin(-1), groups.amax(-1)
        steps = _round_to((largest - least) / (_LEVELS_OF_4_BITS - 1), weight.dtype)
        steps = steps.masked_fill(steps == 0, 1.0)  # equal numbers
        middles = _round_to(least + _MIDDLE * steps, weight.dtype)
        numbers = ((groups - middles[..., None]) / steps[..., None]).round_() + _MIDDLE
        numbers = numbers.clamp_(0, _LEVELS_OF_4_BITS - 1).flatten(1).to(torch.int32)
        levels = torch.stack([steps.t(), middles.t()], dim=-1).to(weight.dtype)
        return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1), levels)

    @property
    def nbytes(self) -> int:
        """How much memory the matrix takes."""
        return self.packed.nbytes + self.levels.nbytes

    def apply(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T``, ``[N, out]``; torch sums each row up by itself."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), self.packed, _GROUP, self.levels
        )
        return product


def _round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers as they will be kept, in float32."""
    return x.to(dtype).float()


def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[N, in]`` rounded to int8, and each row's scale ``[N, 1]``."""
    scales = x.abs().amax(1, keepdim=True) * (1 / _ROW_LEVELS)
    return (x / scales).round_().to(torch.int8), scales


def _can_pack(weight: Tensor) -> bool:
    """Return whether a packed product is the faster one: on a CPU that multiplies matrices (AMX).

    On an AMD EPYC with AVX-512 VNNI, which has none, it took 1,000 times as long as a plain one.
    """
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch before 2.13 has none
    capabilities: dict[str, object] = get_capabilities()
    has_amx = bool(capabilities.get("amx_int8"))
    has_packed = hasattr(torch.ops.onednn, "qlinear_pointwise")
    return has_amx and has_packed and weight.device.type == "cpu"
