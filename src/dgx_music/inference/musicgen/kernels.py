"""A decode step's kernels for NVIDIA GPUs: attention over a static cache, writing to it, and adding before a layer norm.

``scaled_dot_product_attention`` with a mask reads every line's cache up to the furthest line's position, and cannot read one
in fp8. Here each line reads only what it has. Positions are read on the device, so that a recorded CUDA graph serves all.

Shapes: N lines, H heads of size D, T positions, S splits of the cache.
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
"""Positions read at a time: for D = 64 in 16 bit 8 KB of keys and as many of values, by 128 threads of 96 registers (Triton
3.9 for Hopper), so that five such programs share a multiprocessor and have its 25 to 30 KB in flight. More positions
would leave room for three programs, fewer would read less at a time."""
_PROGRAMS = 1024
"""Programs to aim at: about 8 for each of the 132 multiprocessors of an H100 or H200, so that those which end early find more
to do. An estimate from registers and bandwidth; not measured."""
_OPTIONS = {"enable_fp_fusion": True}
"""Multiply and add as one: the default until Triton 3.9, which warns that it is about to change."""
_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_CAPABILITY = (8, 0)  # Ampere: what Triton supports, and the first with bfloat16


def cut(pairs: int, filled: int) -> tuple[int, int]:
    """Return how many splits to make of what is filled, and the positions in each: a multiple of BLOCK.

    Every pair of a line and a head is one program without any cut, so the cuts make up for what is missing to _PROGRAMS.
    Of 1,500 positions, 32 pairs (one guided clip of the small model) get 24 splits of one block each: 768 programs. 512
    pairs get two splits, and 2,048 get one: programs beyond what the GPU holds would only write more to be merged.
    """
    blocks = _ceil_div(filled, BLOCK)
    blocks_each = _ceil_div(blocks, min(blocks, _ceil_div(_PROGRAMS, pairs)))
    return _ceil_div(blocks, blocks_each), blocks_each * BLOCK


def is_available(device: torch.device | None = None, cache_dtype: torch.dtype = torch.bfloat16) -> bool:
    """True if the device, or else the current CUDA device, can run these kernels with a cache in that format.

    Triton must be there. It also wants a C compiler (gcc, clang or CC) at its first launch: see ``can_launch``.
    """
    if not torch.cuda.is_available() or torch.version.cuda is None or (device is not None and device.type != "cuda"):
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
    """Launch the kernels once, on next to nothing, and return whether that works; says in the log why it does not.

    Raises the error itself if there is no memory, or the device is lost: torch's own attention would not go on either.
    """
    cache = torch.zeros(1, 1, 2, 1, 1, 32, device=device).to(cache_dtype)
    position = torch.zeros(1, dtype=torch.long, device=device)
    line = torch.zeros(1, 32, device=device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            store_newest(torch.zeros(1, 2, 1, 32, device=device), cache, position, 1)
            attend_cached(line[:, None], cache[:, 0, 0], cache[:, 0, 1], position, 1)
            add_norm(line, line, line[0], line[0])
            if device.type == "cuda":
                torch.cuda.synchronize()  # what fails on the device is not told before
    except Exception as error:  # a compiler's complaints are of many kinds
        if is_out_of_memory(error) or has_lost_the_device(error):
            raise
        logger.warning("no Triton kernels, torch's attention instead: %s", first_line(error))
        return False
    return True


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, filled: int) -> Tensor:
    """Return what one query ``[N, H, D]`` of each line reads from keys and values ``[N, H, T, D]``: ``[N, H * D]``, as q's dtype.

    Line n attends to positions 0 to ``positions[n]``, and to none from ``filled`` on; what is stored beyond is not read, so
    it may be anything. Positions are on the device and stay there: nothing here waits for it, and the launches depend on
    shapes alone. Scores, softmax and sums are in float32 whatever the cache is, fp8 (``torch.float8_e4m3fn``, without a
    scale) included. The tensors may be views with any strides, their last dimension contiguous and a power of two. Their
    device must be the current one.
    """
    _check(q, keys, values, positions, filled)
    from dgx_music.inference.musicgen.split_kv import attend_split, merge_splits

    lines, heads, head_size = q.shape
    split_count, split_size = cut(lines * heads, filled)
    sums = torch.empty(lines, heads, split_count, head_size, dtype=torch.float32, device=q.device)
    peaks, totals = torch.empty(2, lines, heads, split_count, dtype=torch.float32, device=q.device)
    out = torch.empty(lines, heads * head_size, dtype=q.dtype, device=q.device)
    attend_split[heads, lines, split_count](
        q,
        keys,
        values,
        positions,
        sums,
        peaks,
        totals,
        *q.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        scale=math.log2(math.e) / math.sqrt(head_size),  # a GPU computes powers of 2
        filled=filled,
        split_size=split_size,
        head_size=head_size,
        block=BLOCK,
        num_warps=4,
        **_OPTIONS,
    )
    merge_splits[heads, lines](
        sums,
        peaks,
        totals,
        positions,
        out,
        filled=filled,
        split_size=split_size,
        split_count=split_count,
        head_size=head_size,
        padded_count=_power_of_two(split_count),
        num_warps=1,  # 24 splits of 64 numbers are few enough; more warps would wait for each other
        **_OPTIONS,
    )
    return out


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
    """Add ``more`` to every so many lines of x ``[N, hidden]``, in place; return every so many of them after a layer norm.

    That is lines 0, ``added_every`` and so on, and of what is returned lines 0, ``read_every`` and so on. The norm is computed
    in float32 from the sums as x holds them.
    """
    from dgx_music.inference.musicgen import fused

    lines, hidden = x.shape
    if not x.is_contiguous() or more.shape != (_ceil_div(lines, added_every), hidden):
        raise ValueError("What is added does not fit what it is added to.")
    out = torch.empty(_ceil_div(lines, read_every), hidden, dtype=x.dtype, device=x.device)
    fused.add_norm[(lines,)](
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


def store_newest(fresh: Tensor, cache: Tensor, positions: Tensor, halves: int) -> None:
    """Put the keys and values ``[N, 2, H, D]`` of a step into a layer's cache ``[slot, half, 2, H, T, D]``.

    Row r is slot r and has so many halves, side by side among the N lines; its position ``[R]`` is read on the device. What is
    too large for a cache of fewer bits becomes the largest number that it holds; infinity in the step's own format stays.
    """
    from dgx_music.inference.musicgen import fused

    lines, _, heads, head_size = fresh.shape
    is_whole = fresh.stride()[1:] == (heads * head_size, head_size, 1) and cache.stride()[-2:] == (head_size, 1)
    if not is_whole or lines != len(positions) * halves or cache.shape[3] != heads or cache.shape[5] != head_size:
        raise ValueError("The keys, values, positions and the cache do not fit together.")
    hidden = heads * head_size
    fused.store_newest[(lines, 2)](
        fresh,
        cache,
        positions,
        fresh.stride(0),
        *cache.stride()[:4],
        hidden,
        math.inf if cache.dtype == fresh.dtype else torch.finfo(cache.dtype).max,
        halves=halves,
        head_size=head_size,
        block=_power_of_two(hidden),
        num_warps=_warps(hidden),
        **_OPTIONS,
    )


def _check(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, filled: int) -> None:
    """Raise ``ValueError`` where a kernel would read past a tensor or between its numbers."""
    lines, heads, head_size = q.shape
    length = keys.shape[2]
    if keys.shape != (lines, heads, length, head_size) or values.shape != keys.shape or positions.shape != (lines,):
        raise ValueError("The query, keys, values and positions do not fit together.")
    if not 0 < filled <= length:
        raise ValueError(f"filled is {filled}; the cache has {length} positions.")
    if any(tensor.stride(-1) != 1 for tensor in (q, keys, values)) or not positions.is_contiguous():
        raise ValueError("The last dimension of the query, keys, values and positions must be contiguous.")


def _warps(hidden: int) -> int:
    """Return how many groups of 32 threads share a line: about eight numbers for each thread."""
    return min(8, max(1, _power_of_two(hidden) // 256))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _ceil_div(number: int, step: int) -> int:
    return -(-number // step)
