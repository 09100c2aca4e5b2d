"""The roofline: the time of a decode step that only reads what it must, at the measured bandwidth.

A step of so few rows does little arithmetic on each number that it reads, so reading is the limit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.device import now
from benchmarks.musicgen_models import Shape

_TURNS = 5
_CPU_BYTES, _CUDA_BYTES = 2**30, 2**32  # far more than any cache holds


def read_bandwidth(device: torch.device) -> float:
    """Return bytes per second: the best of several sums, maxima and copies of one large tensor.

    A copy counts twice, since it reads and writes.
    """
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
    """Return the bytes of weights that one step reads, whatever the batch.

    For each layer: q, k, v and out (4 hidden²), cross-attention's q and out (2 hidden²; its k and v
    depend on the prompt alone and are computed once) and the MLP (8 hidden²). Then the heads of the
    codebooks, which int8 leaves unchanged. Left out: the few rows of the embeddings that a step
    reads, the norms, and the scales of int8.
    """
    layers = shape.layers * 14 * shape.hidden**2
    return (
        layers * bytes_per_weight
        + shape.codebooks * shape.vocabulary * shape.hidden * bytes_per_number
    )


def cache_bytes(
    shape: Shape, bytes_per_number: int, batch: int, filled: float, text_tokens: int
) -> float:
    """Return the bytes of keys and values that one guided step reads after ``filled`` positions.

    Self-attention: layers * (k, v) * (conditional, unconditional) * batch * filled * hidden.
    Cross-attention: the same over the tokens of the prompt, for the conditional pass alone, because
    the output of the unconditional pass is zero.
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
    """Return the least seconds of the mean step of a clip: bytes / bandwidth.

    The mean step has half of the positions of the clip filled.
    """
    cached = cache_bytes(shape, bytes_per_number, batch, (steps + 1) / 2, text_tokens)
    return (weight_bytes(shape, bytes_per_weight, bytes_per_number) + cached) / bandwidth
