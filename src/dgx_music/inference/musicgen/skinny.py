"""Products of few sequences with a weight, in Triton; imported only by ``products``.

Such a product takes as long as reading its weight, and the work around it takes longer to launch
than to do. So a layer norm comes before the product in the same kernel, and what follows is done
to the results before they are stored. A kernel begins while the one before still runs: it asks for
its weight, and then waits for its numbers.

Shapes: N sequences; I numbers of each go in, O come out; H heads of size D, hidden = H * D; T
positions. ``stride_xn`` is the distance between the sequences of x, in elements; likewise for the
output and for the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

_GELU, _ADD, _CACHE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""What to do with the results: 0 keeps them. With 1 what the GELU makes of them is kept; with 2 they
are added to what is there; with 3 the first third, queries, is kept, and the others, keys and
values, go to the cache. ``products`` has the same numbers."""


@triton.jit  # type: ignore[untyped-decorator]
def multiply_few(
    x: tl.tensor,  # [N, I], all but N contiguous
    weight: tl.tensor,  # [O, I], contiguous
    scale: tl.tensor,  # [I], of the norm
    shift: tl.tensor,  # [I]
    out: tl.tensor,  # [N, O], or [N, hidden] with a cache; all but N contiguous; to be written
    cache: tl.tensor,  # [slot, pass, 2, H, T, D], to be written
    positions: tl.tensor,  # [slot]
    stride_xn: tl.tensor,
    stride_on: tl.tensor,
    stride_slot: tl.tensor,
    stride_pass: tl.tensor,
    stride_kind: tl.tensor,
    stride_head: tl.tensor,
    epsilon: tl.tensor,
    limit: tl.tensor,  # the largest number that the cache can hold
    count: tl.constexpr,  # N
    padded: tl.constexpr,  # N rounded up to a power of two
    inner: tl.constexpr,  # I
    outer: tl.constexpr,  # O
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    has_norm: tl.constexpr,
    ending: tl.constexpr,
    passes: tl.constexpr,
    head_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Multiply on the processor's ordinary lanes; the grid is [O / block_out]."""
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    n, i = tl.arange(0, padded), tl.arange(0, block_in)
    weights = weight + o[None, :, None] * inner + i[None, None, :]
    w = tl.load(weights)  # [1, block_out, block_in], before the numbers are there
    _begin(weight, o, inner, overlaps)
    mean, factor = _moments(x, stride_xn, epsilon, count, padded, inner, has_norm)
    own = x + n[:, None, None] * stride_xn
    is_own = n[:, None, None] < count
    mean, factor = mean[:, None, None], factor[:, None, None]
    # Summed over the block only at the end: threads that exchange sums would take longer.
    acc = tl.zeros([padded, block_out, block_in], dtype=tl.float32)
    for start in range(0, inner, block_in):
        k = start + i[None, None, :]
        numbers = tl.load(own + k, mask=is_own, other=0.0)
        if has_norm:
            numbers = _normed(numbers, mean, factor, scale + k, shift + k)
        acc += w.to(tl.float32) * numbers.to(tl.float32)
        following = start + block_in
        w = tl.load(weights + following, mask=i[None, None, :] < inner - following, other=0.0)
    _finish(
        tl.sum(acc, axis=2), n, o, out, cache, positions, stride_on, stride_slot, stride_pass,
        stride_kind, stride_head, limit, count, outer, ending, passes, head_size,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def multiply_more(
    x: tl.tensor,  # as in multiply_few, all of them
    weight: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    out: tl.tensor,
    cache: tl.tensor,
    positions: tl.tensor,
    stride_xn: tl.tensor,
    stride_on: tl.tensor,
    stride_slot: tl.tensor,
    stride_pass: tl.tensor,
    stride_kind: tl.tensor,
    stride_head: tl.tensor,
    epsilon: tl.tensor,
    limit: tl.tensor,
    count: tl.constexpr,
    padded: tl.constexpr,  # N rounded up to a power of two, 16 at least: a tile's height
    inner: tl.constexpr,
    outer: tl.constexpr,
    block_out: tl.constexpr,
    block_in: tl.constexpr,
    parts: tl.constexpr,  # of the sum over I, which are summed up side by side
    has_norm: tl.constexpr,
    ending: tl.constexpr,
    passes: tl.constexpr,
    head_size: tl.constexpr,
    overlaps: tl.constexpr,
) -> None:
    """Multiply on the units for matrices; the grid is [O / block_out]."""
    o = tl.program_id(0) * block_out + tl.arange(0, block_out)
    n, i, part = tl.arange(0, padded), tl.arange(0, block_in), tl.arange(0, parts)
    _begin(weight, o, inner, overlaps)
    mean, factor = _moments(x, stride_xn, epsilon, count, padded, inner, has_norm)
    acc = tl.zeros([parts, padded, block_out], dtype=tl.float32)
    for start in range(0, inner, block_in * parts):
        k = start + part[:, None] * block_in + i[None, :]  # [part, block_in]
        w = tl.load(weight + o[None, None, :] * inner + k[:, :, None])
        is_own = n[None, :, None] < count
        own = x + n[None, :, None] * stride_xn + k[:, None, :]
        numbers = tl.load(own, mask=is_own, other=0.0)  # [part, N, block_in]
        if has_norm:
            numbers = _normed(
                numbers, mean[None, :, None], factor[None, :, None],
                scale + k[:, None, :], shift + k[:, None, :],
            )  # fmt: skip
        acc = tl.dot(numbers, w, acc, input_precision="ieee")
    _finish(
        tl.sum(acc, axis=0), n, o, out, cache, positions, stride_on, stride_slot, stride_pass,
        stride_kind, stride_head, limit, count, outer, ending, passes, head_size,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _begin(weight: tl.tensor, o: tl.tensor, inner: tl.constexpr, overlaps: tl.constexpr) -> None:
    """Bring the weights nearer, wait for the kernel before, and let the next one begin."""
    if overlaps:
        # Memory is read in lines of 128 bytes.
        length: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth
        line = tl.arange(0, triton.next_power_of_2(inner) // length)
        place = tl.minimum(line * length, inner - 1)
        there = (weight + o[:, None] * inner + place[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l", [there], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def _moments(
    x: tl.tensor,
    stride_xn: tl.tensor,
    epsilon: tl.tensor,
    count: tl.constexpr,
    padded: tl.constexpr,
    inner: tl.constexpr,
    has_norm: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return each sequence's mean, and what brings its deviation to 1; zeros without a norm."""
    n = tl.arange(0, padded)
    mean = tl.zeros([padded], dtype=tl.float32)
    factor = tl.zeros([padded], dtype=tl.float32)
    if has_norm:
        i = tl.arange(0, triton.next_power_of_2(inner))
        is_inside = (n[:, None] < count) & (i[None, :] < inner)
        own = x + n[:, None] * stride_xn + i[None, :]
        numbers = tl.load(own, mask=is_inside, other=0.0).to(tl.float32)
        mean = tl.sum(numbers, axis=1) / inner
        centred = tl.where(is_inside, numbers - mean[:, None], 0.0)
        factor = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / inner + epsilon)
    return mean, factor


@triton.jit  # type: ignore[untyped-decorator]
def _normed(
    numbers: tl.tensor, mean: tl.tensor, factor: tl.tensor, scale: tl.tensor, shift: tl.tensor
) -> tl.tensor:
    """Return the layer norm of some numbers, in their own format, as torch hands it on."""
    exact = (numbers.to(tl.float32) - mean) * factor
    exact = exact * tl.load(scale).to(tl.float32) + tl.load(shift).to(tl.float32)
    return exact.to(numbers.dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _finish(
    result: tl.tensor,  # [N, block_out], float32
    n: tl.tensor,
    o: tl.tensor,
    out: tl.tensor,
    cache: tl.tensor,
    positions: tl.tensor,
    stride_on: tl.tensor,
    stride_slot: tl.tensor,
    stride_pass: tl.tensor,
    stride_kind: tl.tensor,
    stride_head: tl.tensor,
    limit: tl.tensor,
    count: tl.constexpr,
    outer: tl.constexpr,
    ending: tl.constexpr,
    passes: tl.constexpr,
    head_size: tl.constexpr,
) -> None:
    """Do with the results what is to be done at the end."""
    there = out + n[:, None] * stride_on + o[None, :]
    is_own = n[:, None] < count
    if ending == _CACHE:
        hidden = outer // 3
        tl.store(there, result.to(out.dtype.element_ty), mask=is_own & (o[None, :] < hidden))
        # NaN stays NaN.
        result = tl.where(result > limit, limit, tl.where(result < -limit, -limit, result))
        slot = n // passes
        # In 64 bits: a cache may have more than 2**31 elements.
        place = slot.to(tl.int64) * stride_slot + n % passes * stride_pass
        place += tl.load(positions + slot, mask=n < count, other=0) * head_size
        fresh = o - hidden
        column = fresh // hidden * stride_kind + fresh % hidden // head_size * stride_head
        column += fresh % head_size
        is_fresh = is_own & (fresh[None, :] >= 0)
        written = result.to(cache.dtype.element_ty)
        tl.store(cache + place[:, None] + column[None, :], written, mask=is_fresh)
    else:
        if ending == _GELU:
            result = 0.5 * result * (1.0 + tl.erf(result * 0.7071067811865476))
        if ending == _ADD:
            result += tl.load(there, mask=is_own, other=0.0).to(tl.float32)
        tl.store(there, result.to(out.dtype.element_ty), mask=is_own)
