"""Whether the kernels in Triton run on a device, and whether they do there what torch does."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen.batch import BatchState
from dgx_music.inference.musicgen.cached_attention import BLOCK, attend_cached
from dgx_music.inference.musicgen.embedding import Embedding
from dgx_music.inference.musicgen.kernels import add_norm, draw_next, embed, store_newest
from dgx_music.inference.musicgen.layers import Norm
from dgx_music.inference.musicgen.products import MOST, add_product, read_normed, read_queries
from dgx_music.inference.musicgen.sampling import SamplerState, sample
from dgx_music.inference.trouble import first_line, has_lost_the_device, is_out_of_memory

logger = logging.getLogger(__name__)

_FP8_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
_CAPABILITY = (8, 0)  # Ampere: what Triton supports, and the first with bfloat16
_HEAD_SIZE, _HIDDEN, _CODEBOOKS, _VOCABULARY = 64, 1024, 4, 2048  # musicgen-small's
_WIDTH = 256  # of the products: enough for every block size
_TOLERANCE = 1e-3


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
    """Launch each kernel once, on a few numbers; return whether it does what torch does.

    If not, logs why. Raises the error itself if there is no memory or the device is lost: torch's
    own operations would not work either.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            _check_attention(device, cache_dtype)
            _check_input(device)
            _check_sampling(device)
            _check_products(device)
    except Exception as error:  # compilers raise errors of many kinds
        if is_out_of_memory(error) or has_lost_the_device(error):
            raise
        logger.warning("no Triton kernels, torch's own instead: %s", first_line(error))
        return False
    return True


def _check_attention(device: torch.device, cache_dtype: torch.dtype) -> None:
    length = 3 * BLOCK  # so that there are splits to merge
    numbers = torch.arange(2 * length * _HEAD_SIZE, device=device).sin()
    numbers = numbers.view(1, 1, 2, 1, length, _HEAD_SIZE)
    cache = numbers.to(cache_dtype)  # [slot, pass, 2, H, T, D]
    last = torch.tensor([length - 1], device=device)
    fresh = cache[..., 5, :].float().clone()
    store_newest(fresh[0], cache, last, 1)
    _agree(cache[..., -1, :].float(), fresh)
    q, (keys, values) = numbers[0, :, 0, :, 7], cache[0].unbind(1)  # [N, H, D], [N, H, T, D]
    exact = functional.scaled_dot_product_attention(q[:, :, None], keys.float(), values.float())
    for overlaps in (False, True):
        read = attend_cached(q, keys, values, last, length, overlaps=overlaps)
        _agree(read, exact.flatten(1))


def _check_input(device: torch.device) -> None:
    tables = [torch.nn.Embedding(2, _HIDDEN, device=device).requires_grad_(False)] * 2
    embedding = Embedding(tables, max_positions=2)
    ones = torch.ones(1, 2, dtype=torch.long, device=device)
    weight, bias = embedding.positions
    x, normed = embed(ones, ones[0, :1], embedding, weight, bias, 1)
    _agree(x, embedding.of_tokens(ones) + bias)
    _agree(normed, functional.layer_norm(x, [_HIDDEN], weight, bias))
    added = functional.layer_norm(x + normed, [_HIDDEN], weight, bias)
    _agree(add_norm(x, normed, weight, bias), added)


def _check_products(device: torch.device) -> None:
    """Check those of few sequences and of more, before and after the other work of a layer."""
    weight = torch.arange(_WIDTH * _WIDTH, device=device).sin().view(_WIDTH, _WIDTH) / 16
    norm = Norm(weight[0], weight[1])
    for count in (2, MOST):
        x = weight[:count].clone()
        exact = functional.gelu(functional.linear(norm(x), weight))
        _agree(read_normed(x, norm, weight, gelu=True), exact)
        added = x + functional.linear(x, weight)
        add_product(x, x.clone(), weight)
        _agree(x, added)
        _check_queries(x, norm, weight)


def _check_queries(x: Tensor, norm: Norm, weight: Tensor) -> None:
    """Check the product that writes keys and values into the cache."""
    count, positions = len(x), torch.zeros(len(x), dtype=torch.long, device=x.device)
    cache = torch.zeros(count, 1, 2, _WIDTH // _HEAD_SIZE, 1, _HEAD_SIZE, device=x.device)
    qkv = torch.cat([weight, weight.flip(0), weight.flip(1)])
    q = read_queries(x, norm, qkv, cache, positions, passes=1)
    found = torch.cat([q, cache.flatten(1)], dim=1)
    _agree(found, functional.linear(norm(x), qkv))


def _check_sampling(device: torch.device) -> None:
    shape = (1, 2, _CODEBOOKS, _VOCABULARY)  # [R, pass, K, V]
    logits = torch.arange(math.prod(shape), device=device).sin().view(shape)
    state = BatchState.empty(1, 2, _CODEBOOKS, _VOCABULARY, device)
    state.uniforms[0, 0] = torch.linspace(0.1, 0.9, _CODEBOOKS)
    state.frame_count.fill_(2)
    numbers = (torch.full((1, 1, 1), number, device=device) for number in (3.0, 0.9, 250.0, 0.8))
    sampling, delay = SamplerState(*numbers), torch.zeros_like(state.tokens[0, 0])
    drawn, _ = sample(logits, state.uniforms[:, 0], sampling, _VOCABULARY)
    draw_next(logits, sampling, state, delay, _VOCABULARY)
    _agree(state.tokens[:, 1], drawn)


def _agree(ours: Tensor, theirs: Tensor) -> None:
    """Raise ``ValueError`` if the kernels' numbers are not torch's; waits for the device."""
    if not torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise ValueError("they do not compute what torch does")
