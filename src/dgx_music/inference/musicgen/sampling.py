"""How the next tokens are drawn: each row's own guidance, temperature, top_k and top_p, one random number for each token.

Shapes: R rows; halves 1 (conditional) or 2 (conditional, null); K codebooks of V tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_COLDEST = 1e-4
"""Below this temperature the likeliest token is certain, and logits divided by it may overflow: decode greedily."""
_TIE = 1e-12
"""Of two tokens alike, and in 16 bit there are many, the lower one goes first: this much apart, whatever their number."""


class Sampling(NamedTuple):
    """How to sample each row, ``[R, 1, 1]`` each, on the device; whole numbers as floats."""

    guidance_scale: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Sampling:
        """Return the sampling of so many rows that nobody has asked for anything yet: greedy."""
        return cls(*(torch.ones(count, 1, 1, device=device) for _ in cls._fields))

    def first(self, count: int) -> Sampling:
        """Return a view of the first rows."""
        return Sampling(*(column[:count] for column in self))

    def write(
        self, row: int, *, guidance_scale: float, temperature: float, top_k: int, top_p: float | None, vocabulary: int
    ) -> None:
        """Set one row; a temperature near 0 is greedy, a top_k of 0 takes all tokens."""
        is_greedy = temperature < _COLDEST
        self.guidance_scale[row] = guidance_scale
        self.temperature[row] = 1.0 if is_greedy else temperature
        self.top_k[row] = float(effective_top_k(temperature, top_k, vocabulary))
        self.top_p[row] = math.inf if top_p is None or top_p == 1 else top_p


def effective_top_k(temperature: float, top_k: int, vocabulary: int) -> int:
    """Return among how many of the likeliest tokens is chosen: 1 where it is so cold that the likeliest is certain."""
    return 1 if temperature < _COLDEST else min(top_k or vocabulary, vocabulary)


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling, widest: int) -> tuple[Tensor, Tensor]:
    """Return the next tokens ``[R, K]`` for ``[R, half, K, V]``, and whether each row's scores are finite ``[R]``.

    Guidance is that of Ho and Salimans 2022, null + scale * (conditional - null). Then the inverse of the cumulative
    distribution over the sorted top_k, cut at top_p, is read at the uniforms ``[R, K]``, which are in [0, 1): one number
    decides one token, whoever else is in the batch. ``widest`` is at least the largest top_k.
    """
    logits = logits.double()  # sums of float32 would depend, in the last bits, on how wide the others choose
    scores = logits[:, 0]  # [R, K, V]
    if logits.shape[1] == 2:
        guided = logits[:, 1] + (scores - logits[:, 1]) * sampling.guidance_scale
        scores = torch.where(sampling.guidance_scale > 1, guided, scores)
    scores = scores - torch.arange(scores.shape[-1], device=scores.device) * _TIE
    top, tokens = scores.topk(widest)  # [R, K, widest], from the likeliest on
    is_out = torch.arange(widest, device=top.device) >= sampling.top_k
    probabilities = (top / sampling.temperature).masked_fill(is_out, -math.inf).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    is_kept = cumulative - probabilities < sampling.top_p  # the likeliest, until they add up to top_p
    total = cumulative.masked_fill(~is_kept, 0).amax(-1, keepdim=True)
    rank = (cumulative <= uniforms[..., None] * total).sum(-1, keepdim=True)  # [R, K, 1]
    rank = rank.clamp(max=widest - 1)  # where a row's scores are NaN, no number is <= another
    return tokens.gather(-1, rank).squeeze(-1), top[..., 0].isfinite().all(-1)
