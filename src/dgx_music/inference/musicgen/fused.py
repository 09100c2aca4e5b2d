"""The work between a layer's products, as single kernels in Triton; imported only by ``kernels``.

On a GPU the number of kernels bounds a decode step, not what they compute: each takes more than a
microsecond however little it does.

Shapes: R rows; N sequences of ``hidden`` = H * D numbers; H heads of size D; T positions; K
codebooks of V tokens. ``stride_fn`` is
the distance between the sequences of ``fresh``, in elements; likewise for the cache.
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
    """Add to a row of the residual, then normalise it (layer norm, in float32); the grid is [N]."""
    row = tl.program_id(0)
    i = tl.arange(0, block)
    is_inside = i < hidden
    numbers = tl.load(x + row * hidden + i, mask=is_inside, other=0.0)
    if row % added_every == 0:
        added = tl.load(more + (row // added_every) * hidden + i, mask=is_inside, other=0.0)
        numbers = (numbers.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + row * hidden + i, numbers, mask=is_inside)
    if row % read_every == 0:
        normed = _norm(numbers, weight, bias, hidden, epsilon, block)
        there = out + (row // read_every) * hidden + i
        tl.store(there, normed.to(out.dtype.element_ty), mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def embed(
    tokens: tl.tensor,  # [R, K], contiguous
    offsets: tl.tensor,  # [K], where each codebook begins in the table
    positions: tl.tensor,  # [R]
    table: tl.tensor,  # [K * (V + 1), hidden], contiguous
    places: tl.tensor,  # [T, hidden], contiguous
    weight: tl.tensor,  # [hidden]
    bias: tl.tensor,  # [hidden]
    x: tl.tensor,  # [N, hidden], contiguous, to be written
    out: tl.tensor,  # [N, hidden], contiguous, to be written
    hidden: tl.tensor,
    epsilon: tl.tensor,
    codebooks: tl.constexpr,
    passes: tl.constexpr,
    block: tl.constexpr,  # hidden rounded up to a power of two
) -> None:
    """Add up a row's embeddings in torch's order, for all of its passes; the grid is [R]."""
    row = tl.program_id(0)
    i = tl.arange(0, block)
    is_inside = i < hidden
    first = tl.load(tokens + row * codebooks) + tl.load(offsets)
    numbers = tl.load(table + first * hidden + i, mask=is_inside, other=0.0)
    for codebook in tl.static_range(1, codebooks):
        token = tl.load(tokens + row * codebooks + codebook) + tl.load(offsets + codebook)
        added = tl.load(table + token * hidden + i, mask=is_inside, other=0.0)
        numbers = (numbers.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
    added = tl.load(places + tl.load(positions + row) * hidden + i, mask=is_inside, other=0.0)
    numbers = (numbers.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
    normed = _norm(numbers, weight, bias, hidden, epsilon, block).to(out.dtype.element_ty)
    for own_pass in tl.static_range(passes):
        there = (row * passes + own_pass) * hidden + i
        tl.store(x + there, numbers, mask=is_inside)
        tl.store(out + there, normed, mask=is_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _norm(
    numbers: tl.tensor,  # [block], 0 past hidden
    weight: tl.tensor,
    bias: tl.tensor,
    hidden: tl.tensor,
    epsilon: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """Return the layer norm of a sequence's numbers, in float32."""
    i = tl.arange(0, block)
    is_inside = i < hidden
    exact = numbers.to(tl.float32)
    centred = tl.where(is_inside, exact - tl.sum(exact, axis=0) / hidden, 0.0)
    variance = tl.sum(centred * centred, axis=0) / hidden
    scale = tl.load(weight + i, mask=is_inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + i, mask=is_inside, other=0.0).to(tl.float32)
    return centred * (1.0 / tl.sqrt(variance + epsilon)) * scale + shift


@triton.jit  # type: ignore[untyped-decorator]
def store_newest(
    fresh: tl.tensor,  # [N, 2, H, D], keys and values of this step; all but N contiguous
    cache: tl.tensor,  # [slot, pass, 2, H, T, D], to be written
    positions: tl.tensor,  # [slot]
    stride_fn: tl.tensor,
    stride_slot: tl.tensor,
    stride_pass: tl.tensor,
    stride_kind: tl.tensor,
    stride_head: tl.tensor,
    hidden: tl.tensor,
    limit: tl.tensor,  # the largest number that the cache can hold
    passes: tl.constexpr,
    head_size: tl.constexpr,
    block: tl.constexpr,  # hidden rounded up to a power of two
) -> None:
    """Put one sequence's keys, or its values, at its row's position; the grid is [N, 2]."""
    sequence, kind = tl.program_id(0), tl.program_id(1)
    slot, own_pass = sequence // passes, sequence % passes
    i = tl.arange(0, block)
    is_inside = i < hidden
    own = fresh + sequence * stride_fn + kind * hidden + i
    numbers = tl.load(own, mask=is_inside, other=0.0).to(tl.float32)
    # NaN stays NaN.
    numbers = tl.where(numbers > limit, limit, tl.where(numbers < -limit, -limit, numbers))
    # In 64 bits: a cache may have more than 2**31 elements.
    place = slot.to(tl.int64) * stride_slot + own_pass * stride_pass + kind * stride_kind
    place += tl.load(positions + slot) * head_size
    places = place + (i // head_size) * stride_head + i % head_size
    tl.store(cache + places, numbers.to(cache.dtype.element_ty), mask=is_inside)
