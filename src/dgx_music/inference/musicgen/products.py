"""Products of few sequences with a weight, and the work around them: the host's part of ``skinny``.

Shapes: N sequences; I numbers of each go in, O come out; H heads of size D, hidden = H * D; T
positions.
"""

from __future__ import annotations

import math
from functools import cache as remember
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgx_music.inference.musicgen.cached_attention import launch_options, power_of_two
from dgx_music.inference.musicgen.layers import EPSILON, Norm

STORE, GELU, ADD, CACHE = range(4)
"""What to do with the results; see ``skinny``."""
MOST = 16
"""So many sequences at most."""
_NARROW = 1024
"""Up to this width, weights are so small that launches count for much: an H100 then takes two
thirds of torch's time for 2 sequences of a layer, and nine tenths for 16."""
_MOST_OF_WIDE = 2
"""Of wider layers; from there on torch's own products are as fast or faster."""
_FEW = 4
"""Up to so many, a GPU's ordinary lanes are faster than its units for matrices."""
_PROGRAMS = 96
"""So many at least keep a large GPU's memory busy."""
_MANY = 8192
"""From so many results on, as for all codebooks, even large blocks are enough for all of a GPU."""
_LEAST_BLOCK = 16
"""A weight must have a multiple of so many rows and columns."""
_LEAST_WIDTH = 64
"""A weight must have so many columns."""


class _Cache(NamedTuple):
    """Where the keys and values of a product go."""

    cache: Tensor  # [slot, pass, 2, H, T, D]
    positions: Tensor  # [slot]
    passes: int


def most_sequences(width: int) -> int:
    """Return for how many sequences of that width these products are faster than torch's own."""
    return MOST if width <= _NARROW else _MOST_OF_WIDE


def fits(weight: Tensor) -> bool:
    """Return whether the weight ``[O, I]`` can be multiplied here."""
    outer, inner = weight.shape
    is_in_blocks = inner % _LEAST_BLOCK == 0 and outer % _LEAST_BLOCK == 0
    return weight.is_contiguous() and is_in_blocks and inner >= _LEAST_WIDTH


def read_normed(
    x: Tensor, norm: Norm, weight: Tensor, dtype: torch.dtype | None = None, *, gelu: bool = False
) -> Tensor:
    """Return the product ``[N, O]`` of x ``[N, I]``, normed, with the weight ``[O, I]``.

    x may be a view of every so many rows. ``gelu`` applies the exact GELU to the result. The result
    is in x's number format or in ``dtype``.
    """
    out = torch.empty(len(x), len(weight), dtype=dtype or x.dtype, device=x.device)
    _multiply(x, weight, out, GELU if gelu else STORE, norm)
    return out


def add_product(to: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add the product of x ``[N, I]`` with the weight ``[O, I]`` to ``[N, O]``, in place.

    What is added to may be a view of every so many rows.
    """
    _multiply(x, weight, to, ADD)


def read_queries(
    x: Tensor, norm: Norm, weight: Tensor, cache: Tensor, positions: Tensor, passes: int
) -> Tensor:
    """Return the queries ``[N, hidden]`` of x, normed; put keys and values into the cache.

    The weight is ``[3 * hidden, hidden]``. The cache is ``[slot, pass, 2, H, T, D]``; row r is slot
    r, its passes lie side by side among the N sequences, and its position ``[R]`` is read on the
    device. A number too large for a cache of fewer bits becomes the largest that it holds.
    """
    out = torch.empty(len(x), x.shape[1], dtype=x.dtype, device=x.device)
    _multiply(x, weight, out, CACHE, norm, _Cache(cache, positions, passes))
    return out


def _multiply(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    ending: int,
    norm: Norm | None = None,
    cache: _Cache | None = None,
) -> None:
    count, (outer, inner) = len(x), weight.shape
    if x.shape[1] != inner or x.stride(1) != 1 or len(out) != count:
        raise ValueError("The sequences, the weight and what is written do not fit together.")
    from dgx_music.inference.musicgen import skinny

    written, positions, passes = cache or _Cache(out[None, None, None, None], out, 1)
    scale, shift = norm or (weight, weight)
    is_same = written.dtype == x.dtype
    kernel = skinny.multiply_few if count <= _FEW else skinny.multiply_more
    sizes = _few_sizes(outer, inner, count) if count <= _FEW else _more_sizes(outer, inner)
    kernel[(outer // sizes["block_out"],)](
        x,
        weight,
        scale,
        shift,
        out,
        written,
        positions,
        x.stride(0),
        out.stride(0),
        *written.stride()[:4],
        EPSILON,
        math.inf if is_same or cache is None else torch.finfo(written.dtype).max,
        count=count,
        padded=power_of_two(count) if count <= _FEW else _tile(count),
        inner=inner,
        outer=outer,
        has_norm=norm is not None,
        ending=ending,
        passes=passes,
        head_size=written.shape[-1],
        **sizes,
        **launch_options(x.device, overlaps=True),
    )


def _tile(count: int) -> int:
    return max(16, power_of_two(count))


@remember
def _few_sizes(outer: int, inner: int, count: int) -> dict[str, Any]:
    """Return the block sizes; the best of seven for each product of the small model on an H100."""
    if outer < _MANY:
        return {"block_out": 4, "block_in": _divisor(inner, _block(count, 1024)), "num_warps": 2}
    return {"block_out": 16, "block_in": _divisor(inner, _block(count, 512)), "num_warps": 4}


def _block(count: int, most: int) -> int:
    """Return how many numbers of each weight to read at a time: so many that registers suffice."""
    return most if count <= _FEW // 2 else most // 2


@remember
def _more_sizes(outer: int, inner: int) -> dict[str, Any]:
    """Return the block sizes; the best of seven for each product of the small model on an H100."""
    fitting = (size for size in (32, 16) if outer % size == 0 and outer // size >= _PROGRAMS)
    block_out = next(fitting, 8)
    at_once = _divisor(inner, 256 if block_out > 8 else 512)
    parts = min(4, at_once // _LEAST_BLOCK)
    return {
        "block_out": block_out,
        "block_in": at_once // parts,
        "parts": parts,
        "num_warps": 4,
        "num_stages": 3,
    }


def _divisor(number: int, most: int) -> int:
    """Return the largest power of two that divides the number, ``most`` at most."""
    return min(most, number & -number)
