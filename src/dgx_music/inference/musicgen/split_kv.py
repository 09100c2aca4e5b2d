"""The device's part of ``cached_attention``, in Triton; imported only by its caller.

Two kernels, after "Flash-Decoding for long-context inference" (Dao, Haziza, Massa and Sizov, 2023):
the cache is cut along T into splits that are read in parallel, and their results are merged by the
running softmax's own rule.

Shapes: N sequences, H heads of size D, T positions, S splits. ``stride_qn`` is the distance between
the sequences of q, in elements; likewise for h (heads) and t (positions), k (keys) and v (values).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit  # type: ignore[untyped-decorator]
def attend_split(
    q: tl.tensor,  # [N, H, D]
    keys: tl.tensor,  # [N, H, T, D]
    values: tl.tensor,  # [N, H, T, D]
    positions: tl.tensor,  # [N]
    sums: tl.tensor,  # [N, H, S, D], of values times weights: to be written, as are the next two
    peaks: tl.tensor,  # [N, H, S], the largest score
    totals: tl.tensor,  # [N, H, S], of the weights
    out: tl.tensor,  # [N, H, D], to be written instead of these three if there is one split
    stride_qn: tl.tensor,
    stride_qh: tl.tensor,
    stride_kn: tl.tensor,
    stride_kh: tl.tensor,
    stride_kt: tl.tensor,
    stride_vn: tl.tensor,
    stride_vh: tl.tensor,
    stride_vt: tl.tensor,
    scale: tl.tensor,
    context_length: tl.tensor,
    split_size: tl.tensor,
    head_size: tl.constexpr,
    block: tl.constexpr,
    is_whole: tl.constexpr,  # true if there is one split
    overlaps: tl.constexpr,  # true if the kernels before and after may run at the same time
) -> None:
    """Attend with one head to one split of one sequence; the grid is [H, N, S].

    Returns at once if the split lies past the sequence's position.
    """
    if overlaps:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    visible = tl.minimum(tl.load(positions + sequence) + 1, context_length).to(tl.int32)
    start = split * split_size
    if start >= visible:
        return
    end = tl.minimum(start + split_size, visible)

    # In 64 bits: a cache may have more than 2**31 elements.
    head, sequence = head.to(tl.int64), sequence.to(tl.int64)
    d = tl.arange(0, head_size)
    keys += sequence * stride_kn + head * stride_kh
    values += sequence * stride_vn + head * stride_vh
    query = tl.load(q + sequence * stride_qn + head * stride_qh + d).to(tl.float32) * scale  # [D]
    peak, total, acc = _attend_positions(
        query, keys, values, start, end, stride_kt, stride_vt, head_size, block
    )

    total, acc = tl.sum(total, axis=0), tl.sum(acc, axis=0)
    place = (sequence * tl.num_programs(0) + head) * tl.num_programs(2) + split
    if is_whole:
        tl.store(out + place * head_size + d, (acc / total).to(out.dtype.element_ty))
    else:
        tl.store(sums + place * head_size + d, acc)
        tl.store(peaks + place, peak)
        tl.store(totals + place, total)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_positions(
    query: tl.tensor,  # [D]
    keys: tl.tensor,  # [T, D]
    values: tl.tensor,  # [T, D]
    start: tl.tensor,
    end: tl.tensor,
    stride_kt: tl.tensor,
    stride_vt: tl.tensor,
    head_size: tl.constexpr,
    block: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the peak, the weights [block] and the weighted values [block, D], not summed yet."""
    # Summed over the block only at the end: inside the loop, threads that exchange sums would take
    # almost as long as reading fp8.
    d = tl.arange(0, head_size)
    total = tl.zeros([block], dtype=tl.float32)
    acc = tl.zeros([block, head_size], dtype=tl.float32)
    peak = float("-inf")
    for first in range(start, end, block):
        t = first + tl.arange(0, block)
        is_visible = t < end
        # What is not visible is not read: it may be NaN, and 0 * NaN is NaN.
        mask = is_visible[:, None]
        k = tl.load(keys + t[:, None] * stride_kt + d[None, :], mask=mask, other=0.0)  # [block, D]
        v = tl.load(values + t[:, None] * stride_vt + d[None, :], mask=mask, other=0.0)
        products = tl.sum(k.to(tl.float32) * query[None, :], axis=1)  # [block]
        scores = tl.where(is_visible, products, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        rescale = tl.exp2(peak - higher)  # 0 in the first block
        total = total * rescale + weights
        acc = acc * rescale + weights[:, None] * v.to(tl.float32)
        peak = higher
    return peak, total, acc


@triton.jit  # type: ignore[untyped-decorator]
def merge_splits(
    sums: tl.tensor,  # [N, H, S, D]
    peaks: tl.tensor,  # [N, H, S]
    totals: tl.tensor,  # [N, H, S]
    positions: tl.tensor,  # [N]
    out: tl.tensor,  # [N, H, D], to be written
    context_length: tl.tensor,
    split_size: tl.tensor,
    split_count: tl.tensor,
    head_size: tl.constexpr,
    padded_count: tl.constexpr,  # S rounded up to a power of two
    overlaps: tl.constexpr,
) -> None:
    """Merge a sequence's splits, each weighted by its largest score; the grid is [H, N]."""
    if overlaps:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    head, sequence = tl.program_id(0), tl.program_id(1)
    visible = tl.minimum(tl.load(positions + sequence) + 1, context_length).to(tl.int32)
    place = sequence.to(tl.int64) * tl.num_programs(0) + head
    split = tl.arange(0, padded_count)
    is_written = split * split_size < visible
    d = tl.arange(0, head_size)

    peak = tl.load(peaks + place * split_count + split, mask=is_written, other=float("-inf"))  # [S]
    total = tl.load(totals + place * split_count + split, mask=is_written, other=0.0)
    acc = tl.load(
        sums + (place * split_count + split[:, None]) * head_size + d[None, :],
        mask=is_written[:, None],
        other=0.0,
    )  # [S, D]
    share = tl.exp2(peak - tl.max(peak, axis=0))
    merged = tl.sum(share[:, None] * acc, axis=0) / tl.sum(share * total, axis=0)
    tl.store(out + place * head_size + d, merged.to(out.dtype.element_ty))
