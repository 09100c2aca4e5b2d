"""A decode step's kernels for NVIDIA GPUs, beside attention: input, cache, add and norm, sampling.

Each replaces several of torch's: on a GPU the number of kernels bounds a step of few rows. Their
Triton is in ``fused`` and ``draw``, which are imported by a first call.

Shapes: R rows, each with one pass or two, so N sequences; H heads of size D, hidden = H * D; T
positions; K codebooks of V tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dgx_music.inference.musicgen.batch import BatchState
from dgx_music.inference.musicgen.cached_attention import OPTIONS, ceil_div, power_of_two
from dgx_music.inference.musicgen.embedding import Embedding
from dgx_music.inference.musicgen.sampling import TIE_BREAK, SamplerState


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
    rows, hidden = x.shape
    if not x.is_contiguous() or more.shape != (ceil_div(rows, added_every), hidden):
        raise ValueError("What is added does not fit what it is added to.")
    out = torch.empty(ceil_div(rows, read_every), hidden, dtype=x.dtype, device=x.device)
    from dgx_music.inference.musicgen import fused

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
        block=power_of_two(hidden),
        num_warps=_warps(hidden),
        **OPTIONS,
    )
    return out


def embed(
    tokens: Tensor,
    positions: Tensor,
    embedding: Embedding,
    weight: Tensor,
    bias: Tensor,
    passes: int,
    *,
    epsilon: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Return what goes into the first layer ``[N, hidden]``, and the same normed.

    That is the sum of the embeddings of a row's tokens ``[R, K]`` and of its position ``[R]``, once
    for each pass.
    """
    from dgx_music.inference.musicgen import fused

    rows, codebooks = tokens.shape
    hidden = embedding.positions.shape[1]
    x = torch.empty(rows * passes, hidden, dtype=embedding.dtype, device=embedding.device)
    normed = torch.empty_like(x)
    fused.embed[(rows,)](
        tokens.contiguous(),
        embedding.offsets,
        positions.contiguous(),
        embedding.tokens,
        embedding.positions,
        weight,
        bias,
        x,
        normed,
        hidden,
        epsilon,
        codebooks=codebooks,
        passes=passes,
        block=power_of_two(hidden),
        num_warps=_warps(hidden),
        **OPTIONS,
    )
    return x, normed


def store_newest(fresh: Tensor, cache: Tensor, positions: Tensor, passes: int) -> None:
    """Put a step's keys and values ``[N, 2, H, D]`` into a cache ``[slot, pass, 2, H, T, D]``.

    Row r is slot r; its passes lie side by side among the N sequences, and its position ``[R]`` is
    read on the device. A number too large for a cache of fewer bits becomes the largest that it
    holds; infinity in the step's own format stays. Raises ``ValueError`` if the shapes do not fit.
    """
    n, _, heads, head_size = fresh.shape
    hidden = heads * head_size
    is_whole = fresh.stride()[1:] == (hidden, head_size, 1) and cache.stride()[-2:] == (
        head_size,
        1,
    )
    has_same_heads = cache.shape[3] == heads and cache.shape[5] == head_size
    if not (is_whole and has_same_heads and n == len(positions) * passes):
        raise ValueError("The keys, values, positions and the cache do not fit together.")
    from dgx_music.inference.musicgen import fused

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
        block=power_of_two(hidden),
        num_warps=_warps(hidden),
        **OPTIONS,
    )


def draw_next(
    logits: Tensor, sampling: SamplerState, state: BatchState, delay: Tensor, pad_token: int
) -> None:
    """Draw each row's next tokens from the logits ``[R, pass, K, V]`` and put them into the state.

    The tokens are those of ``sample``, at the state's own uniforms, and are placed as by
    ``BatchState.place``. ``delay`` ``[K]`` says how many steps late each codebook is. Raises
    ``ValueError`` if the shapes do not fit together.
    """
    rows, passes, codebooks, vocabulary = logits.shape
    tokens, uniforms = state.tokens, state.uniforms
    is_whole = tokens.stride(2) == uniforms.stride(2) == 1
    if not (is_whole and len(tokens) == rows and tokens.shape[2] == len(delay) == codebooks):
        raise ValueError("The logits and the state of the batch do not fit together.")
    from dgx_music.inference.musicgen import draw

    draw.draw_next[(rows, codebooks)](
        logits.contiguous(),
        *sampling,
        tokens,
        uniforms,
        state.position,
        state.frame_count,
        state.given_count,
        state.is_finite,
        delay,
        *tokens.stride()[:2],
        *uniforms.stride()[:2],
        pad_token,
        TIE_BREAK,
        passes=passes,
        vocabulary=vocabulary,
        block=power_of_two(max(2, vocabulary)),
        num_warps=_warps(vocabulary),
        **OPTIONS,
    )


def _warps(hidden: int) -> int:
    """Return how many groups of 32 threads share a row: about eight numbers for each thread."""
    return min(8, max(1, power_of_two(hidden) // 256))
