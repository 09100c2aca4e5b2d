"""The weights of MusicGen's layers, and the products with them.

They are fused from transformers' own, and kept in full or in 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgx_music.inference.musicgen.native import Native
from dgx_music.inference.musicgen.quantised import Int4, Int8

Weight: TypeAlias = Tensor | Int8 | Int4

EPSILON = 1e-5
"""What every layer norm of MusicGen adds to the variance."""
_FEW_ROWS = 64
"""With up to so many rows, a product takes as long as reading the weight."""


class Norm(NamedTuple):
    """Weight and bias of a layer norm, ``[hidden]`` each."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension."""
        return torch.layer_norm(x, self.bias.shape, self.weight, self.bias, EPSILON)

    def to(self, device: torch.device) -> Norm:
        """Return the weight and the bias on the device."""
        return Norm(self.weight.to(device), self.bias.to(device))


@dataclass(frozen=True)
class CrossAttention:
    """The weights of a layer's cross-attention, which reads the text."""

    norm: Norm
    q: Weight
    kv: Tensor  # [2 * hidden, hidden]
    out: Weight


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, each ``[out, in]``; only the norms have biases."""

    self_norm: Norm
    self_qkv: Weight  # [3 * hidden, hidden]
    self_out: Weight
    cross: CrossAttention | None
    """``None`` in the melody models, whose text is part of the prefix for self-attention."""
    mlp_norm: Norm
    mlp_in: Weight
    mlp_out: Weight
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def fuse(cls, layer: Any, device: torch.device) -> Layer:
        """Return the weights of one of transformers' layers on the device, fused before."""
        own, text = layer.self_attn, getattr(layer, "encoder_attn", None)
        qkv = torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight])
        cross = None
        if text is not None:
            cross = cls._fuse_cross(text, layer.encoder_attn_layer_norm, device)
        return cls(
            self_norm=norm_of(layer.self_attn_layer_norm).to(device),
            self_qkv=qkv.to(device),
            self_out=own.out_proj.weight.to(device),
            cross=cross,
            mlp_norm=norm_of(layer.final_layer_norm).to(device),
            mlp_in=layer.fc1.weight.to(device),
            mlp_out=layer.fc2.weight.to(device),
            activation=layer.activation_fn,
        )

    @staticmethod
    def _fuse_cross(text: Any, norm: nn.LayerNorm, device: torch.device) -> CrossAttention:
        keys_values = torch.cat([text.k_proj.weight, text.v_proj.weight])
        return CrossAttention(
            norm_of(norm).to(device),
            text.q_proj.weight.to(device),
            keys_values.to(device),
            text.out_proj.weight.to(device),
        )

    def quantise(self, bits: str, native: Native | None) -> Layer:
        """Return the layer with all weights that every step reads in ``int8`` or ``int4``."""
        cross = self.cross
        if cross is not None:
            cross = replace(
                cross, q=quantise(cross.q, bits, native), out=quantise(cross.out, bits, native)
            )
        return replace(
            self,
            self_qkv=quantise(self.self_qkv, bits, native),
            self_out=quantise(self.self_out, bits, native),
            cross=cross,
            mlp_in=quantise(self.mlp_in, bits, native),
            mlp_out=quantise(self.mlp_out, bits, native),
        )

    @property
    def nbytes(self) -> int:
        """How much memory the layer's matrices take."""
        weights: list[Weight] = [self.self_qkv, self.self_out, self.mlp_in, self.mlp_out]
        if self.cross is not None:
            weights += [self.cross.q, self.cross.kv, self.cross.out]
        return sum(weight.nbytes for weight in weights)


def norm_of(module: nn.LayerNorm) -> Norm:
    """Return the weights of one of torch's layer norms.

    Raises ``ValueError`` if its epsilon is not the usual one.
    """
    if module.eps != EPSILON:
        raise ValueError(f"a layer norm's epsilon is {module.eps:g} and not {EPSILON:g}")
    return Norm(module.weight, module.bias)


def quantise(weight: Weight, bits: str, native: Native | None) -> Int8 | Int4:
    """Return the weight in ``int8`` or ``int4``; one that was rounded before stays as it is."""
    if isinstance(weight, Int8 | Int4):
        return weight
    return Int4.of(weight) if bits == "int4" else Int8.of(weight, native)


def linear(x: Tensor, weight: Weight, padded_rows: int) -> Tensor:
    """Return ``x @ weight.T``, ``[N, out]``; fast for few rows.

    On a CPU the weight stands on the left: a matrix product repacks its right operand, so that one
    should be small (measured 1.3 to 1.5 times as fast for 2 to 32 rows in bfloat16, and for 4 to 32
    in float32, on a Xeon with AMX). If x has fewer than ``padded_rows`` rows, rows of zeros are
    added: how a product is rounded depends on its number of rows, and a row's numbers must not
    depend on how many others there are. That costs next to nothing.
    """
    if isinstance(weight, Int8 | Int4):
        return weight.apply(x)  # rounds each row as if it were alone
    count = x.shape[0]
    if x.device.type != "cpu" or count > max(padded_rows, _FEW_ROWS):
        return functional.linear(x, weight)
    padded = functional.pad(x, (0, 0, 0, padded_rows - count)) if count < padded_rows else x
    return torch.mm(weight, padded.t()).t()[:count]
