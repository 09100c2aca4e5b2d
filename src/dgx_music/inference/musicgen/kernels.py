"""A decode step's kernels for NVIDIA GPUs: cached attention, writing to the cache, add and norm.

``scaled_dot_product_attention`` with a mask reads every sequence's cache up to the longest context,
and cannot read one in fp8. Here each sequence reads only its own context. Positions are read on the
device, so that one recorded CUDA graph serves all of them.

Shapes: N sequences, H heads of size D, T positions, S splits of the cache.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import torch
from torch import Tensor

from dgx_music.inference.trouble import first_line, has_lost_the_device, is_out_of_memory

logger = logging.getLogger(__name__)

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
_OPTIONS = {"enable_fp_fusion": True}
"""Multiply and add as one: the default until Triton 3.9, which warns that it will change."""
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_CAPABILITY = (8, 0)  # Ampere: what Triton supports, and the first with bfloat16


def cut(pairs: int, context_length: int) -> tuple[int, int]:
    """Return how many splits to make of the context, and the positions in each (n * BLOCK).

    Without any cut every pair of a sequence and a head is one program; the cuts bring the number of
    programs up to _TARGET_PROGRAMS. Of 1,500 positions, 32 pairs (one guided clip of the small
    model) get 24 splits of one block each: 768 programs. 512 pairs get two splits, and 2,048 get
    one: with more programs than the GPU holds, there would only be more results to merge.
    """
    blocks = _ceil_div(context_length, BLOCK)
    blocks_each = _ceil_div(blocks, min(blocks, _ceil_div(_TARGET_PROGRAMS, pairs)))
    return _ceil_div(blocks, blocks_each), blocks_each * BLOCK


def is_available(
    device: torch.device | None = None, cache_dtype: torch.dtype = torch.bfloat16
) -> bool:
    """True if the device, or else the current CUDA device, can run these kernels with such a cache.

    Triton must be installed. It also needs a C compiler (gcc, clang or CC) at its first launch: see
    ``can_launch``.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    if device is not None and device.type != "cuda":
        return False
    needed = _FP8_CAPABILITY if cache_dtype == torch.float8_e4m3fn else _CAPABILITY
    if torch.cuda.get_device_capability(device) < needed:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def can_launch(device: torch.device, cache_dtype: torch.dtype) -> bool:
    """Launch each kernel once, on tiny tensors, and return whether that works; if not, log why.

    Raises the error itself if there is no memory or the device is lost: torch's own attention would
    not work either.
    """
    cache = torch.zeros(1, 1, 2, 1, 1, 32, device=device).to(cache_dtype)
    position = torch.zeros(1, dtype=torch.long, device=device)
    row = torch.zeros(1, 32, device=device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            store_newest(torch.zeros(1, 2, 1, 32, device=device), cache, position, 1)
            attend_cached(row[:, None], cache[:, 0, 0], cache[:, 0, 1], position, 1)
            add_norm(row, row, row[0], row[0])
            if device.type == "cuda":
                torch.cuda.synchronize()  # a failure on the device is not reported before
    except Exception as error:  # compilers raise errors of many kinds
        if is_out_of_memory(error) or has_lost_the_device(error):
            raise
        logger.warning("no Triton kernels, torch's attention instead: %s", first_line(error))
        return False
    return True


def attend_cached(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    context_length: int,
) -> Tensor:
    """Return what a query ``[N, H, D]`` reads from ``[N, H, T, D]``: ``[N, H * D]`` in q's dtype.

    Sequence n attends to positions 0 to ``positions[n]``, and to none from ``context_length`` on;
    what is stored beyond is not read, so it may be anything. Positions are on the device and stay
    there: nothing here waits for it, and the launches depend on shapes alone. Scores, softmax and
    sums are in float32 whatever the cache is, fp8 (``torch.float8_e4m3fn``, without a scale)
    included. The tensors may be views with any strides, their last dimension contiguous and a power
    of two. Their device must be the current one. Raises ``ValueError`` if they do not fit together.
    """
    _check(q, keys, values, positions, context_length)
    n, heads, head_size = q.shape
    splits = cut(n * heads, context_length)
    sums = torch.empty(n, heads, splits[0], head_size, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, n, heads, splits[0], dtype=torch.float32, device=q.device)
    out = torch.empty(n, heads * head_size, dtype=q.dtype, device=q.device)
    _attend_splits(q, keys, values, positions, (sums, peaks, totals), context_length, splits)
    _merge_splits((sums, peaks, totals), positions, out, context_length, splits)
    return out


def _attend_splits(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    context_length: int,
    splits: tuple[int, int],
) -> None:
    """Attend to each split of each sequence, and write the results: sums, peaks and totals."""
    from dgx_music.inference.musicgen.split_kv import attend_split

    n, heads, head_size = q.shape
    split_count, split_size = splits
    attend_split[heads, n, split_count](
        q,
        keys,
        values,
        positions,
        *results,
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        scale=math.log2(math.e) / math.sqrt(head_size),  # a GPU computes powers of 2
        context_length=context_length,
        split_size=split_size,
        head_size=head_size,
        block=BLOCK,
        num_warps=4,
        **_OPTIONS,
    )


def _merge_splits(
    results: tuple[Tensor, Tensor, Tensor],
    positions: Tensor,
    out: Tensor,
    context_length: int,
    splits: tuple[int, int],
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
        padded_count=_power_of_two(split_count),
        num_warps=1,  # enough for 24 splits of 64 numbers; more warps would wait for each other
        **_OPTIONS,
    )


def add_norm(
    x: Tensor,
    more: Tensor,
    weight: Tensor,
    bias: Tensor,
    added_every: int = 1,
    read_every: int = 1,
    *,
    epsilon: float = 1e-5,
) -> Tensor:
    """Add ``more`` to some rows of x ``[N, hidden]``, in place; return some of them, normed.

    Added to are rows 0, ``added_every`` and so on; returned are rows 0, ``read_every`` and so on.
    The layer norm is computed in float32 from the sums as x holds them. Raises ``ValueError`` if
    the shapes do not fit together.
    """
    from dgx_music.inference.musicgen import fused

    rows, hidden = x.shape
    if not x.is_contiguous() or more.shape != (_ceil_div(rows, added_every), hidden):
        raise ValueError("What is added does not fit what it is added to.")
    out = torch.empty(_ceil_div(rows, read_every), hidden, dtype=x.dtype, device=x.device)
    fused.add_norm[(rows,)](
        x,
        more.contiguous(),
        weight,
        bias,
        out,
        hidden,
        epsilon,
        added_every=added_every,
        read_every=read_every,
        block=_power_of_two(hidden),
        num_warps=_warps(hidden),
        **_OPTIONS,
    )
    return out


def store_newest(fresh: Tensor, cache: Tensor, positions: Tensor, passes: int) -> None:
    """Put a step's keys and values ``[N, 2, H, D]`` into a cache ``[slot, pass, 2, H, T, D]``.

    Row r is slot r; its passes lie side by side among the N sequences, and its position ``[R]`` is
    read on the device. A number too large for a cache of fewer bits becomes the largest that it
    holds; infinity in the step's own format stays. Raises ``ValueError`` if the shapes do not fit.
    """
    from dgx_music.inference.musicgen import fused

    n, _, heads, head_size = fresh.shape
    hidden = heads * head_size
    is_whole = fresh.stride()[1:] == (hidden, head_size, 1) and cache.stride()[-2:] == (
        head_size,
        1,
    )
    has_same_heads = cache.shape[3] == heads and cache.shape[5] == head_size
    if not (is_whole and has_same_heads and n == len(positions) * passes):
        raise ValueError("The keys, values, positions and the cache do not fit together.")
    fused.store_newest[(n, 2)](
        fresh,
        cache,
        positions,
        fresh.stride(0),
        *cache.stride()[:4],
        hidden,
        math.inf if cache.dtype == fresh.dtype else torch.finfo(cache.dtype).max,
        passes=passes,
        head_size=head_size,
        block=_power_of_two(hidden),
        num_warps=_warps(hidden),
        **_OPTIONS,
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


def _warps(hidden: int) -> int:
    """Return how many groups of 32 threads share a row: about eight numbers for each thread."""
    return min(8, max(1, _power_of_two(hidden) // 256))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil_div(number: int, step: int) -> int:
    return -(-number // step)
