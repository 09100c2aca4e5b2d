"""The device's half of ``kernels.attend_cached``, in Triton; imported only where that is called.

Two kernels, after "Flash-Decoding for long-context inference" (Dao, Haziza, Massa and Sizov, 2023): the cache is cut along T
into splits that are read side by side, and what they give is merged by the running softmax's own rule.

Shapes: N lines, H heads of size D, T positions, S splits. ``x_line`` is how far apart the lines of x are, in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def attend_split(
    q: tl.tensor,  # [N, H, D]
    keys: tl.tensor,  # [N, H, T, D]
    values: tl.tensor,  # [N, H, T, D]
    positions: tl.tensor,  # [N]
    sums: tl.tensor,  # [N, H, S, D], of values times weights: to be written, as are the next two
    peaks: tl.tensor,  # [N, H, S], the largest score
    totals: tl.tensor,  # [N, H, S], of the weights
    q_line: tl.tensor,
    q_head: tl.tensor,
    keys_line: tl.tensor,
    keys_head: tl.tensor,
    keys_position: tl.tensor,
    values_line: tl.tensor,
    values_head: tl.tensor,
    values_position: tl.tensor,
    scale: tl.tensor,
    filled: tl.tensor,
    split_size: tl.tensor,
    head_size: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Attend with one head to one split of one line, unless it lies beyond the line's position; the grid is [H, N, S]."""
    head, line, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seen = tl.minimum(tl.load(positions + line) + 1, filled).to(tl.int32)  # how many positions the line attends to
    start = split * split_size
    if start >= seen:
        return
    end = tl.minimum(start + split_size, seen)

    head, line = head.to(tl.int64), line.to(tl.int64)  # a cache may have more elements than 32 bits can count
    d = tl.arange(0, head_size)
    keys += line * keys_line + head * keys_head
    values += line * values_line + head * values_head
    query = tl.load(q + line * q_line + head * q_head + d).to(tl.float32) * scale  # [D]

    # Summed over the block after the loop: within it, threads exchanging sums would take almost as long as reading fp8.
    total = tl.zeros([block], dtype=tl.float32)
    acc = tl.zeros([block, head_size], dtype=tl.float32)
    peak = float("-inf")
    for first in range(start, end, block):
        t = first + tl.arange(0, block)
        is_seen = t < end
        # What is not seen is not read: it may be NaN, and 0 * NaN is NaN.
        k = tl.load(keys + t[:, None] * keys_position + d[None, :], mask=is_seen[:, None], other=0.0)  # [block, D]
        v = tl.load(values + t[:, None] * values_position + d[None, :], mask=is_seen[:, None], other=0.0)
        scores = tl.where(is_seen, tl.sum(k.to(tl.float32) * query[None, :], axis=1), float("-inf"))  # [block]
        higher = tl.maximum(peak, tl.max(scores, axis=0))
        weights = tl.exp2(scores - higher)
        rescale = tl.exp2(peak - higher)  # 0 in the first block
        total = total * rescale + weights
        acc = acc * rescale + weights[:, None] * v.to(tl.float32)
        peak = higher

    place = (line * tl.num_programs(0) + head) * tl.num_programs(2) + split
    tl.store(sums + place * head_size + d, tl.sum(acc, axis=0))
    tl.store(peaks + place, peak)
    tl.store(totals + place, tl.sum(total, axis=0))


@triton.jit  # type: ignore[untyped-decorator]
def merge_splits(
    sums: tl.tensor,  # [N, H, S, D]
    peaks: tl.tensor,  # [N, H, S]
    totals: tl.tensor,  # [N, H, S]
    positions: tl.tensor,  # [N]
    out: tl.tensor,  # [N, H, D], to be written
    filled: tl.tensor,
    split_size: tl.tensor,
    split_count: tl.tensor,
    head_size: tl.constexpr,
    padded_count: tl.constexpr,  # S rounded up to a power of two
) -> None:
    """Merge the splits that a line has, each weighted by how its largest score compares; the grid is [H, N]."""
    head, line = tl.program_id(0), tl.program_id(1)
    seen = tl.minimum(tl.load(positions + line) + 1, filled).to(tl.int32)
    place = line.to(tl.int64) * tl.num_programs(0) + head
    split = tl.arange(0, padded_count)
    is_written = split * split_size < seen
    d = tl.arange(0, head_size)

    peak = tl.load(peaks + place * split_count + split, mask=is_written, other=float("-inf"))  # [S]
    total = tl.load(totals + place * split_count + split, mask=is_written, other=0.0)
    acc = tl.load(
        sums + (place * split_count + split[:, None]) * head_size + d[None, :], mask=is_written[:, None], other=0.0
    )  # [S, D]
    share = tl.exp2(peak - tl.max(peak, axis=0))
    merged = tl.sum(share[:, None] * acc, axis=0) / tl.sum(share * total, axis=0)
    tl.store(out + place * head_size + d, merged.to(out.dtype.element_ty))
