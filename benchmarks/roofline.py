"""The roofline: how fast a decode step could be if it only read what it must, at the bandwidth that was measured.

A step of so few rows does little arithmetic on each number it reads, so reading is what bounds it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.device import now
from benchmarks.musicgen_models import Shape

_TURNS = 5
_CPU_BYTES, _CUDA_BYTES = 2**30, 2**32  # far more than any cache holds


def read_bandwidth(device: torch.device) -> float:
    """Return bytes per second: the best of several sums, and of copies (read and written), of one large tensor."""
    size = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = 0.0
    works: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: torch.sum(source), size),
        (lambda: torch.max(source), size),
        (lambda: target.copy_(source), 2 * size),
    )
    for work, moved in works:
        work()
        for _ in range(_TURNS):
            started = now(device)
            work()
            best = max(best, moved / (now(device) - started))
    return best


def weight_bytes(shape: Shape, bytes_per_weight: float, bytes_per_number: int) -> float:
    """Return what of the weights one step reads, whatever the batch.

    Of each layer q, k, v and out (4 hidden²), cross-attention's q and out (2 hidden²; its k and v are the prompt's and
    computed once) and the MLP (8 hidden²); and the codebooks' heads, which int8 leaves as they are. Of the embeddings a
    step reads a few lines, of norms and int8's scales next to nothing: left out.
    """
    layers = shape.layers * 14 * shape.hidden**2
    return layers * bytes_per_weight + shape.codebooks * shape.vocabulary * shape.hidden * bytes_per_number


def cache_bytes(shape: Shape, bytes_per_number: int, batch: int, filled: float, text_tokens: int) -> float:
    """Return what of keys and values one step reads where ``filled`` positions are behind it, with guidance.

    Self-attention: layers * (k, v) * (conditional, null) * batch * filled * hidden. Cross-attention: the same over the
    prompt's tokens for the conditional half alone, for the null half's output is zero.
    """
    line = shape.layers * 2 * batch * shape.hidden * bytes_per_number
    return line * (2 * filled + text_tokens)


def step_seconds(
    shape: Shape,
    *,
    bandwidth: float,
    batch: int,
    steps: int,
    text_tokens: int,
    bytes_per_weight: float,
    bytes_per_number: int,
) -> float:
    """Return the least seconds of a clip's mean step: bytes / bandwidth, with half of the clip's positions filled."""
    cached = cache_bytes(shape, bytes_per_number, batch, (steps + 1) / 2, text_tokens)
    return (weight_bytes(shape, bytes_per_weight, bytes_per_number) + cached) / bandwidth
