"""The sampler as a single kernel in Triton; imported only by ``kernels``.

It draws what ``sampling.sample`` draws and puts it where ``BatchState.place`` puts it. Those take
about forty kernels, of which most have nothing to do but to wait for the one before.

Shapes: R rows; K codebooks of V tokens; P positions that a slot's tokens have room for.
``stride_tr`` is the distance between the rows of the tokens, in elements; likewise for p
(positions), and for u (uniforms).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def draw_next(
    logits: tl.tensor,  # [R, pass, K, V], contiguous
    guidance_scale: tl.tensor,  # [R], as are the next three
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    tokens: tl.tensor,  # [R, P, K], the last dimension contiguous; is written to
    uniforms: tl.tensor,  # [R, step, K], the last dimension contiguous
    position: tl.tensor,  # [R], as are the next three
    frame_count: tl.tensor,
    given_count: tl.tensor,
    is_finite: tl.tensor,  # to be set to false if a row's numbers are not
    delay: tl.tensor,  # [K]
    stride_tr: tl.tensor,
    stride_tp: tl.tensor,
    stride_ur: tl.tensor,
    stride_up: tl.tensor,
    pad_token: tl.tensor,
    tie_break: tl.tensor,
    passes: tl.constexpr,
    vocabulary: tl.constexpr,
    block: tl.constexpr,  # the vocabulary rounded up to a power of two, of at least 2
) -> None:
    """Draw a row's next token of one codebook and store it; the grid is [R, K]."""
    row, codebook, codebooks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    token = tl.arange(0, block)
    own = logits + (row * passes * codebooks + codebook) * vocabulary
    scores = _guide(own, tl.load(guidance_scale + row), codebooks, passes, vocabulary, block)
    is_broken = (tl.sum((scores != scores).to(tl.int32), axis=0) > 0) | (
        tl.abs(tl.max(scores, axis=0)) == float("inf")
    )
    tl.store(is_finite + row, False, mask=is_broken)

    scores -= token.to(tl.float64) * tie_break
    here = tl.load(position + row)
    uniform = tl.load(uniforms + row * stride_ur + here * stride_up + codebook).to(tl.float64)
    chosen = _choose(
        scores,
        uniform,
        tl.load(temperature + row).to(tl.float64),
        tl.load(top_k + row),
        tl.load(top_p + row).to(tl.float64),
        block,
    )
    drawn = tl.min(tl.where(scores == chosen, token, vocabulary - 1), axis=0).to(tl.int64)

    place = tokens + row.to(tl.int64) * stride_tr + (here + 1) * stride_tp + codebook
    frame = here - tl.load(delay + codebook)
    following = tl.where(frame < tl.load(given_count + row), tl.load(place), drawn)
    is_in_clip = (frame >= 0) & (frame < tl.load(frame_count + row))
    tl.store(place, tl.where(is_in_clip, following, pad_token))


@triton.jit  # type: ignore[untyped-decorator]
def _guide(
    own: tl.tensor,  # a codebook's logits [V] of the conditional pass
    scale: tl.tensor,
    codebooks: tl.tensor,
    passes: tl.constexpr,
    vocabulary: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """Return the guided logits in float64, -inf past the vocabulary."""
    token = tl.arange(0, block)
    is_token = token < vocabulary
    scores = tl.load(own + token, mask=is_token, other=float("-inf")).to(tl.float64)
    if passes == 2:
        other = own + codebooks * vocabulary + token
        unconditional = tl.load(other, mask=is_token, other=0.0).to(tl.float64)
        guided = unconditional + (scores - unconditional) * scale.to(tl.float64)
        scores = tl.where(scale > 1, guided, scores)
    return scores


@triton.jit  # type: ignore[untyped-decorator]
def _choose(
    scores: tl.tensor,  # [block], float64, no two alike
    uniform: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """Return the score of the token that the uniform number decides on."""
    rank = tl.arange(0, block)
    top = _sort(scores, block)
    weights = tl.exp((top - tl.max(top, axis=0)) / temperature)
    weights = tl.where(rank < top_k, weights, 0.0)
    probabilities = weights / tl.sum(weights, axis=0)
    cumulative = tl.cumsum(probabilities, axis=0)
    is_kept = cumulative - probabilities < top_p
    total = tl.max(tl.where(is_kept, cumulative, 0.0), axis=0)
    drawn = tl.sum((cumulative <= uniform * total).to(tl.int32), axis=0)
    return tl.max(tl.where(rank == drawn, top, float("-inf")), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _sort(numbers: tl.tensor, block: tl.constexpr) -> tl.tensor:
    """Return the numbers [block], the largest first: a bitonic sort (Batcher 1968).

    Triton's own sort is one of its functions that the interpreter takes minutes for.
    """
    i = tl.arange(0, block)
    run = 2
    while run <= block:
        step = run // 2
        while step > 0:
            other = tl.gather(numbers, i ^ step, axis=0)
            # Every other run is sorted the other way round; two such runs are merged next.
            takes_larger = ((i & step) == 0) == ((i & run) == 0)
            larger, smaller = tl.maximum(numbers, other), tl.minimum(numbers, other)
            numbers = tl.where(takes_larger, larger, smaller)
            step //= 2
        run *= 2
    return numbers
