"""A layer's decode step in few kernels: for so few sequences that a GPU mostly waits.

The plain way, in ``decoder``, takes about sixteen kernels a layer; this one takes nine, or ten with
a text of more than 128 tokens. What each computes is the same, but for numbers that are rounded less
often.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from dgx_music.inference.musicgen.attention import Attention, Step
from dgx_music.inference.musicgen.layers import Layer
from dgx_music.inference.musicgen.products import add_product, fits, read_normed, read_queries


def can_advance(layer: Layer) -> bool:
    """Return whether ``advance`` can multiply with the layer's weights."""
    weights = [layer.self_qkv, layer.self_out, layer.mlp_in, layer.mlp_out]
    if layer.cross is not None:
        weights += [layer.cross.q, layer.cross.out]
    return all(isinstance(weight, Tensor) and fits(weight) for weight in weights)


def advance(
    layer: Layer, index: int, x: Tensor, cache: Tensor, step: Step, attention: Attention
) -> None:
    """Add one layer's results to x ``[N, hidden]``, in place."""
    context, (segment,) = step.context, step.context.segments
    heads = (-1, attention.head_count, 1, attention.head_size)
    positions, passes = context.positions, context.passes
    qkv = cast("Tensor", layer.self_qkv)
    q = read_queries(x, layer.self_norm, qkv, cache, positions, passes)
    read = attention.read(q.view(heads), index, segment, overlaps=True)
    add_product(x, read, cast("Tensor", layer.self_out))
    if layer.cross is not None and step.texts:
        (text,), own = step.texts, x[:: step.text_every]
        q = read_normed(own, layer.cross.norm, cast("Tensor", layer.cross.q))
        read = attention.read(q.view(heads), index, text, overlaps=True)
        add_product(own, read, cast("Tensor", layer.cross.out))
    inner = read_normed(x, layer.mlp_norm, cast("Tensor", layer.mlp_in), gelu=True)
    add_product(x, inner, cast("Tensor", layer.mlp_out))
