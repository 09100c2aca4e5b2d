"""What stands between a layer's products, as single kernels in Triton; imported only where ``kernels`` launches them.

On a GPU a decode step is bound by how many kernels it has, not by what they compute: each takes more than a microsecond
however little it does.

Shapes: N lines of ``hidden`` = H * D numbers; H heads of size D. ``x_line`` is how far apart the lines of x are, in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def add_norm(
    x: tl.tensor,  # [N, hidden], contiguous; is added to
    more: tl.tensor,  # [N / added_every, hidden], contiguous
    weight: tl.tensor,  # [hidden]
    bias: tl.tensor,  # [hidden]
    out: tl.tensor,  # [N / read_every, hidden], contiguous, to be written
    hidden: tl.tensor,
    epsilon: tl.tensor,
    added_every: tl.constexpr,
    read_every: tl.constexpr,
    block: tl.constexpr,  # hidden rounded up to a power of two
) -> None:
    """Add to a line of the residual, then normalise it (layer norm, in float32); the grid is [N]."""
    line = tl.program_id(0)
    i = tl.arange(0, block)
    is_inside = i < hidden
    numbers = tl.load(x + line * hidden + i, mask=is_inside, other=0.0)
    if line % added_every == 0:
        added = tl.load(more + (line // added_every) * hidden + i, mask=is_inside, other=0.0)
        numbers = (numbers.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + line * hidden + i, numbers, mask=is_inside)
    if line % read_every == 0:
        exact = numbers.to(tl.float32)
        centred = tl.where(is_inside, exact - tl.sum(exact, axis=0) / hidden, 0.0)
        spread = tl.sum(centred * centred, axis=0) / hidden
        scale = tl.load(weight + i, mask=is_inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + i, mask=is_inside, other=0.0).to(tl.float32)
        normed = centred * (1.0 / tl.sqrt(spread + epsilon)) * scale + shift
        tl.store(out + (line // read_every) * hidden + i, normed.to(out.dtype.element_ty), mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def store_newest(
    fresh: tl.tensor,  # [N, 2, H, D], keys and values of this step; all but the lines side by side
    cache: tl.tensor,  # [row, half, 2, H, T, D], to be written
    positions: tl.tensor,  # [row]
    fresh_line: tl.tensor,
    cache_row: tl.tensor,
    cache_half: tl.tensor,
    cache_kind: tl.tensor,
    cache_head: tl.tensor,
    hidden: tl.tensor,
    most: tl.tensor,  # the largest number that the cache can hold
    halves: tl.constexpr,
    head_size: tl.constexpr,
    block: tl.constexpr,  # hidden rounded up to a power of two
) -> None:
    """Put one line's keys, or its values, where its row's position says; the grid is [N, 2]."""
    line, kind = tl.program_id(0), tl.program_id(1)
    row, half = line // halves, line % halves
    i = tl.arange(0, block)
    is_inside = i < hidden
    numbers = tl.load(fresh + line * fresh_line + kind * hidden + i, mask=is_inside, other=0.0).to(tl.float32)
    numbers = tl.where(numbers > most, most, tl.where(numbers < -most, -most, numbers))  # NaN stays NaN
    place = row.to(tl.int64) * cache_row + half * cache_half + kind * cache_kind  # 32 bits would not do for all rows
    place += tl.load(positions + row) * head_size
    spots = place + (i // head_size) * cache_head + i % head_size
    tl.store(cache + spots, numbers.to(cache.dtype.element_ty), mask=is_inside)
