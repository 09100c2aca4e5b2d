"""Attention of one query to a cache, for NVIDIA GPUs: the host's part of ``split_kv``.

``scaled_dot_product_attention`` with a mask reads every sequence's cache up to the longest context,
and cannot read one in fp8. Here each sequence reads only its own context. Positions are read on the
device, so that one recorded CUDA graph serves all of them.

Shapes: N sequences, H heads of size D, T positions, S splits of the cache.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

BLOCK = 64
"""Positions read at a time.

For D = 64 in 16 bits that is 8 KB of keys and 8 KB of values, by 128 threads of 96 registers
(Triton 3.9 for Hopper): five such programs share a multiprocessor and have its 25 to 30 KB in
flight. More positions would leave room for three programs, fewer would read less at a time.
"""
_TARGET_PROGRAMS = 1024
"""About 8 for each of the 132 multiprocessors of an H100 or H200.

Those that end early then find more to do. An estimate from registers and bandwidth; not measured.
"""
_UNCUT_BLOCKS = 2
OPTIONS = {"enable_fp_fusion": True}
"""Multiply and add as one: the default until Triton 3.9, which warns that it will change."""


_OVERLAP_CAPABILITY = (9, 0)  # Hopper


@cache
def can_overlap(device: torch.device) -> bool:
    """Return whether a kernel can begin there while the one before still runs.

    It then does what does not depend on that one, and waits for it (programmatic dependent launch).
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _OVERLAP_CAPABILITY:
        return False
    from triton.language.extra import cuda

    return hasattr(cuda, "gdc_wait")  # not in Triton before 3.4


def launch_options(device: torch.device, *, overlaps: bool) -> dict[str, bool]:
    """Return how to launch a kernel on the device, and its constant ``overlaps``.

    It pays only among kernels that all do so: beside torch's own, attention takes longer with it.
    """
    if not (overlaps and can_overlap(device)):
        return {"overlaps": False, **OPTIONS}
    return {"overlaps": True, "launch_pdl": True, **OPTIONS}


def cut(pairs: int, context_length: int) -> tuple[int, int]:
    """Return how many splits to make of the context, and the positions in each (n * BLOCK).

    Without any cut every pair of a sequence and a head is one program; the cuts bring the number of
    programs up to _TARGET_PROGRAMS. Of 1,500 positions, 32 pairs (one guided clip of the small
    model) get 24 splits of one block each: 768 programs. 512 pairs get two splits, and 2,048 get
    one: with more programs than the GPU holds, there would only be more results to merge. Nor is a
    text of two blocks cut: to read one block more takes no longer than to launch a merge.
    """
    blocks = ceil_div(context_length, BLOCK)
    if blocks <= _UNCUT_BLOCKS:
        return 1, blocks * BLOCK
    blocks_each = ceil_div(blocks, min(blocks, ceil_div(_TARGET_PROGRAMS, pairs)))
    return ceil_div(blocks, blocks_each), blocks_each * BLOCK


def attend_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    context_length: int,
    *,
    overlaps: bool = False,
) -> Tensor:
    """Return what a query ``[N, H, D]`` reads from ``[N, H, T, D]``: ``[N, H * D]`` in q's dtype.

    Sequence n attends to positions 0 to ``positions[n]``, and to none from ``context_length`` on;
    what is stored beyond is not read, so it may be anything. Positions are on the device and stay
    there: nothing here waits for it, and the launches depend on shapes alone. Scores, softmax and
    sums are in float32 whatever the cache is, fp8 (``torch.float8_e4m3fn``, without a scale)
    included. The tensors may be views with any strides, their last dimension contiguous and a power
    of two. Their device must be the current one. ``overlaps`` lets the kernels run at the same time
    as their neighbours, where the device can. Raises ``ValueError`` if they do not fit together.
    """
    _check(q, keys, values, positions, context_length)
    n, heads, head_size = q.shape
    splits = cut(n * heads, context_length)
    out = torch.empty(n, heads * head_size, dtype=q.dtype, device=q.device)
    if splits[0] == 1:
        whole = (out, out, out)
        _attend_splits(q, keys, values, positions, whole, out, context_length, splits, overlaps)
        return out
    sums = torch.empty(n, heads, splits[0], head_size, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, n, heads, splits[0], dtype=torch.float32, device=q.device)
    results = (sums, peaks, totals)
    _attend_splits(q, keys, values, positions, results, out, context_length, splits, overlaps)
    _merge_splits(results, positions, out, context_length, splits, overlaps)
    return out


def _attend_splits(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    context_length: int,
    splits: tuple[int, int],
    overlaps: bool,
) -> None:
    """Attend to each split of each sequence, and write the results: sums, peaks and totals.

    A single split needs no merge: it is written to ``out``.
    """
    from dgx_music.inference.musicgen.split_kv import attend_split

    n, heads, head_size = q.shape
    split_count, split_size = splits
    attend_split[heads, n, split_count](
        q,
        keys,
        values,
        positions,
        *results,
        out,
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        scale=math.log2(math.e) / math.sqrt(head_size),  # a GPU computes powers of 2
        context_length=context_length,
        split_size=split_size,
        head_size=head_size,
        block=BLOCK,
        is_whole=split_count == 1,
        num_warps=4,
        **launch_options(q.device, overlaps=overlaps),
    )


def _merge_splits(
    results: tuple[Tensor, Tensor, Tensor],
    positions: Tensor,
    out: Tensor,
    context_length: int,
    splits: tuple[int, int],
    overlaps: bool,
) -> None:
    """Merge the results of all splits into ``out``, ``[N, H * D]``."""
    from dgx_music.inference.musicgen.split_kv import merge_splits

    n, heads, split_count, head_size = results[0].shape
    merge_splits[heads, n](
        *results,
        positions,
        out,
        context_length=context_length,
        split_size=splits[1],
        split_count=split_count,
        head_size=head_size,
        padded_count=power_of_two(split_count),
        num_warps=1,  # enough for 24 splits of 64 numbers; more warps would wait for each other
        **launch_options(out.device, overlaps=overlaps),
    )


def _check(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, context_length: int) -> None:
    """Raise ``ValueError`` if a kernel would read past a tensor or between its numbers."""
    n, heads, head_size = q.shape
    length = keys.shape[2]
    if (
        keys.shape != (n, heads, length, head_size)
        or values.shape != keys.shape
        or positions.shape != (n,)
    ):
        raise ValueError("The query, keys, values and positions do not fit together.")
    if not 0 < context_length <= length:
        raise ValueError(f"context_length is {context_length}; the cache has {length} positions.")
    if any(tensor.stride(-1) != 1 for tensor in (q, keys, values)) or not positions.is_contiguous():
        raise ValueError(
            "The last dimension of the query, keys, values and positions must be contiguous."
        )


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least the number."""
    return 1 << (number - 1).bit_length()


def ceil_div(number: int, step: int) -> int:
    """Return how many steps it takes to reach the number."""
    return -(-number // step)
