"""Draws the next tokens: each row has its own guidance, temperature, top_k and top_p.

One random number decides one token.

Shapes: R rows; 1 pass (conditional) or 2 (conditional, unconditional); K codebooks of V tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dgx_music.sampling import Sampling

_GREEDY_BELOW = 1e-4
"""At a lower temperature the likeliest token is certain and division may overflow: be greedy."""
TIE_BREAK = 1e-12
"""Subtracted per token id: of equal logits, and in 16 bits there are many, the lowest id wins."""


class SamplerState(NamedTuple):
    """How to sample each row, ``[R, 1, 1]`` each, on the device; whole numbers as floats.

    The columns have the names of the fields of ``Sampling`` that the sampler reads.
    """

    guidance_scale: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> SamplerState:
        """Return the state of empty rows (greedy)."""
        return cls(*(torch.ones(count, 1, 1, device=device) for _ in cls._fields))

    def first(self, count: int) -> SamplerState:
        """Return a view of the first rows."""
        return SamplerState(*(column[:count] for column in self))

    def write(self, row: int, sampling: Sampling, vocabulary: int) -> None:
        """Set one row; a temperature near 0 is greedy, a top_k of 0 means all tokens."""
        top_p = sampling.top_p
        self.guidance_scale[row] = sampling.guidance_scale
        self.temperature[row] = 1.0 if _is_greedy(sampling) else sampling.temperature
        self.top_k[row] = float(effective_top_k(sampling, vocabulary))
        self.top_p[row] = math.inf if top_p is None or top_p == 1 else top_p


def effective_top_k(sampling: Sampling, vocabulary: int) -> int:
    """Return how many of the likeliest tokens to choose from: 1 if the temperature means greedy."""
    return 1 if _is_greedy(sampling) else min(sampling.top_k or vocabulary, vocabulary)


def _is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < _GREEDY_BELOW


def sample(
    logits: Tensor, uniforms: Tensor, sampling: SamplerState, max_top_k: int
) -> tuple[Tensor, Tensor]:
    """Return the tokens ``[R, K]`` for logits ``[R, pass, K, V]``, and which rows are finite ``[R]``.

    Guidance is that of Ho and Salimans 2022: unconditional + scale * (conditional - unconditional).
    Then the sorted top_k are cut at top_p, and the inverse of their cumulative distribution is read
    at the uniforms ``[R, K]``, which are in [0, 1): one number decides one token, whoever else is in
    the batch. ``max_top_k`` is at least the largest top_k.
    """
    # In float64: float32 sums would depend, in the last bits, on max_top_k.
    scores = _guide(logits.double(), sampling)  # [R, K, V]
    scores = scores - torch.arange(scores.shape[-1], device=scores.device) * TIE_BREAK
    top, tokens = scores.topk(max_top_k)  # [R, K, max_top_k], the likeliest first
    is_out = torch.arange(max_top_k, device=top.device) >= sampling.top_k
    probabilities = (top / sampling.temperature).masked_fill(is_out, -math.inf).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    is_kept = cumulative - probabilities < sampling.top_p  # the likeliest, up to a sum of top_p
    total = cumulative.masked_fill(~is_kept, 0).amax(-1, keepdim=True)
    rank = (cumulative <= uniforms[..., None] * total).sum(-1, keepdim=True)  # [R, K, 1]
    rank = rank.clamp(max=max_top_k - 1)  # if a row's scores are NaN, no number is <= another
    return tokens.gather(-1, rank).squeeze(-1), top[..., 0].isfinite().all(-1)


def _guide(logits: Tensor, sampling: SamplerState) -> Tensor:
    """Return the logits ``[R, K, V]`` to sample from: guided, or else the conditional ones."""
    conditional = logits[:, 0]
    if logits.shape[1] == 1:
        return conditional
    guided = logits[:, 1] + (conditional - logits[:, 1]) * sampling.guidance_scale
    return torch.where(sampling.guidance_scale > 1, guided, conditional)
