"""Attention of one query per line over a static cache, for NVIDIA GPUs: each line reads only what it has.

``scaled_dot_product_attention`` with a mask reads every line's cache up to the furthest line's position, and cannot read one
in fp8. Here a line's position is read on the device, so that a recorded CUDA graph serves all positions.

Shapes: N lines, H heads of size D, T positions, S splits of the cache.
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import torch
from torch import Tensor

from dgx_music.inference.trouble import first_line

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
    """True where the device, or else the current CUDA device, can run ``attend_cached`` over a cache in that format.

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
    """Launch the kernels once, on next to nothing, and return whether that works; says in the log why it does not."""
    cache = torch.zeros(1, 1, 1, 32, device=device).to(cache_dtype)
    position = torch.zeros(1, dtype=torch.long, device=device)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            attend_cached(torch.zeros(1, 1, 32, device=device), cache, cache, position, 1)
    except Exception as error:  # a compiler's complaints are of many kinds
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
    from dgx_music.inference.split_kv import attend_split, merge_splits

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
        padded_count=1 << (split_count - 1).bit_length(),
        num_warps=1,  # 24 splits of 64 numbers are few enough; more warps would wait for each other
        **_OPTIONS,
    )
    return out


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


def _ceil_div(number: int, step: int) -> int:
    return -(-number // step)
