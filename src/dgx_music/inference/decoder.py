"""MusicGen's language model in plain torch: fused weights, and the forward pass of one decode step for many rows.

The mathematics is that of ``transformers``' ``modeling_musicgen.py``, which the tests hold it to, token for token. What
differs is what is not done: q, k and v are one product, the codebooks' heads are one product, the null half of guidance
skips cross-attention, and nothing that was already computed is copied from step to step.

Shapes: R rows, each with one half (conditional) or two (conditional, null), so N = R * halves lines of numbers; L layers,
H heads of size D, hidden = H * D; K codebooks of V tokens; T positions; X text tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import MusicgenForCausalLM


class Norm(NamedTuple):
    """Weight and bias of a layer norm, [hidden] each."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension."""
        return functional.layer_norm(x, self.bias.shape, self.weight, self.bias)


@dataclass(frozen=True)
class Layer:
    """The weights of one layer, each [out, in]; there are no biases but the norms'."""

    self_norm: Norm
    self_qkv: Tensor  # [3 * hidden, hidden]
    self_out: Tensor
    cross_norm: Norm
    cross_q: Tensor
    cross_kv: Tensor  # [2 * hidden, hidden]
    cross_out: Tensor
    mlp_norm: Norm
    mlp_in: Tensor
    mlp_out: Tensor
    activation: Callable[[Tensor], Tensor]

    @classmethod
    def fuse(cls, layer: Any) -> Layer:
        """Return the weights of one of transformers' decoder layers; only the fused ones are copied."""
        own, text = layer.self_attn, layer.encoder_attn
        return cls(
            self_norm=_norm(layer.self_attn_layer_norm),
            self_qkv=torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight]),
            self_out=own.out_proj.weight,
            cross_norm=_norm(layer.encoder_attn_layer_norm),
            cross_q=text.q_proj.weight,
            cross_kv=torch.cat([text.k_proj.weight, text.v_proj.weight]),
            cross_out=text.out_proj.weight,
            mlp_norm=_norm(layer.final_layer_norm),
            mlp_in=layer.fc1.weight,
            mlp_out=layer.fc2.weight,
            activation=layer.activation_fn,
        )


@dataclass(frozen=True)
class Text:
    """The keys and values of the rows' prompts, which cross-attention reads at every step."""

    keys_values: Tensor  # [L, 2, R, H, X, D]
    mask: Tensor | None
    """[R, 1, 1, X], what to add to the scores: 0, or -inf past a prompt's end; ``None`` where all are equally long."""


class _Reach(NamedTuple):
    """What a step writes and reads of a layer's cache ``[slot, half, 2, H, T, D]``; the same in every layer."""

    lines: Tensor  # [N * 2 * H], where the new keys and values go, with all dimensions but the last flattened
    row_count: int
    halves: int
    filled: int
    mask: Tensor | None  # [N, 1, 1, filled], what to add to the scores: -inf at stale and unwritten positions


class Decoder:
    """The language model on its device, with positions for as many steps as ``max_steps``."""

    @torch.inference_mode()
    def __init__(self, model: MusicgenForCausalLM, text_projection: nn.Linear | None, max_steps: int) -> None:
        """Take over the weights of the model, whose layers are gone afterwards: two copies might not fit in memory."""
        decoder, config = model.model.decoder, model.config
        self.codebook_count: int = config.num_codebooks
        self.channels: int = config.audio_channels
        self.vocabulary: int = config.vocab_size
        self.pad_token: int = config.pad_token_id
        self.max_steps = max_steps
        self.head_count: int = config.num_attention_heads
        self.head_size: int = config.hidden_size // config.num_attention_heads
        self._text_projection = text_projection
        self._embedding = torch.cat([table.weight for table in decoder.embed_tokens])  # [K * (V + 1), hidden]
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        self._first_tokens = torch.arange(self.codebook_count, device=self.device) * (config.vocab_size + 1)  # [K]
        self._positions = sinusoids(max_steps, config.hidden_size).to(self.device, self.dtype)  # [T, hidden]
        self._final_norm = _norm(decoder.layer_norm)
        self._heads = torch.cat([head.weight for head in model.lm_heads])  # [K * V, hidden]
        self.layers: list[Layer] = []
        while decoder.layers:
            self.layers.append(Layer.fuse(decoder.layers[0]))
            del decoder.layers[0]

    def empty_cache(self, slot_count: int) -> Tensor:
        """Return zeros for the keys and values of every slot: ``[L, slot, half, 2, H, T, D]``."""
        shape = (len(self.layers), slot_count, 2, 2, self.head_count, self.max_steps, self.head_size)
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    @torch.inference_mode()
    def read_text(self, states: Tensor) -> Tensor:
        """Return cross-attention's keys and values ``[L, 2, H, X, D]`` of one prompt's text states ``[X, width]``."""
        states = states.to(self.dtype)
        if self._text_projection is not None:
            states = self._text_projection(states)  # [X, hidden]
        pairs = torch.stack([functional.linear(states, layer.cross_kv) for layer in self.layers])  # [L, X, 2 * hidden]
        return pairs.view(*pairs.shape[:2], 2, self.head_count, self.head_size).permute(0, 2, 3, 1, 4)

    @torch.inference_mode()
    def forward(
        self, tokens: Tensor, positions: Tensor, cache: Tensor, text: Text, *, halves: int, filled: int, is_ragged: bool
    ) -> Tensor:
        """Return the logits ``[R, half, K, V]`` that follow the tokens ``[R, K]`` at the positions ``[R]``, in float32.

        Row r owns slot r of the cache, which gets its new keys and values. ``filled`` is how much of the cache is read,
        one more than the furthest position; where the rows' positions differ (``is_ragged``), each is masked by its own.
        """
        reach = self._reach(positions, halves, filled, is_ragged)
        x = functional.embedding_bag(tokens + self._first_tokens, self._embedding, mode="sum")  # [R, hidden]
        x = (x + self._positions[positions]).repeat_interleave(halves, dim=0)  # [N, hidden]: the halves' tokens agree
        for layer, layer_cache, layer_text in zip(self.layers, cache, text.keys_values.unbind(0), strict=True):
            x = x + self._self_attention(layer, x, layer_cache, reach)
            # The null half's text states are zero, and so is what attention makes of them: only the first half reads.
            x[::halves] += self._cross_attention(layer, x[::halves], layer_text, text.mask)
            x = x + linear(layer.activation(linear(layer.mlp_norm(x), layer.mlp_in)), layer.mlp_out)
        logits = linear(self._final_norm(x), self._heads).float()  # [N, K * V]
        return logits.view(len(tokens), halves, self.codebook_count, -1)

    def _reach(self, positions: Tensor, halves: int, filled: int, is_ragged: bool) -> _Reach:
        row_count = len(positions)
        rows = torch.arange(row_count * 2 * 2 * self.head_count, device=self.device).view(row_count, 2, -1)[:, :halves]
        lines = rows * self.max_steps + positions[:, None, None]  # [R, half, 2 * H]
        if not is_ragged:
            return _Reach(lines.flatten(), row_count, halves, filled, None)
        is_written = torch.arange(filled, device=self.device) <= positions.repeat_interleave(halves)[:, None]
        return _Reach(lines.flatten(), row_count, halves, filled, _additive(is_written, self.dtype))

    def _self_attention(self, layer: Layer, x: Tensor, cache: Tensor, reach: _Reach) -> Tensor:
        qkv = linear(layer.self_norm(x), layer.self_qkv).contiguous().view(-1, 3, self.head_count, self.head_size)
        cache.view(-1, self.head_size).index_copy_(0, reach.lines, qkv[:, 1:].reshape(-1, self.head_size))
        keys_values = cache[: reach.row_count, : reach.halves].flatten(0, 1)[..., : reach.filled, :]
        keys, values = keys_values.unbind(1)  # [N, H, filled, D]: views, not copies
        return linear(_attend(qkv[:, 0], keys, values, reach.mask), layer.self_out)

    def _cross_attention(self, layer: Layer, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q = linear(layer.cross_norm(x), layer.cross_q).contiguous().view(-1, self.head_count, self.head_size)
        return linear(_attend(q, text[0], text[1], mask), layer.cross_out)


def stack_texts(texts: list[Tensor]) -> Text:
    """Return one row for each prompt's ``[L, 2, H, X, D]``, the shorter ones filled up with zeros and masked."""
    lengths = torch.tensor([text.shape[-2] for text in texts])
    longest = int(lengths.max())
    rows = [functional.pad(text, (0, 0, 0, longest - text.shape[-2])) for text in texts]
    keys_values = torch.stack(rows, dim=2)  # [L, 2, R, H, X, D]
    if int(lengths.min()) == longest:
        return Text(keys_values, None)
    mask = _additive(torch.arange(longest) < lengths[:, None], keys_values.dtype)  # [R, 1, 1, X]
    return Text(keys_values, mask.to(keys_values.device))


def sinusoids(count: int, width: int) -> Tensor:
    """Return the position embeddings ``[count, width]``: cosines, then sines (``create_sin_embedding`` of audiocraft)."""
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight, module.bias)


def _additive(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return attention's mask ``[N, 1, 1, T]`` for ``[N, T]``: 0 where visible, -inf elsewhere."""
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
    return mask.masked_fill_(~is_visible, -math.inf)[:, None, None]


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Return what one query ``[N, H, D]`` of each line reads from keys and values ``[N, H, T, D]``: ``[N, H * D]``.

    The last dimension of each must be contiguous: else torch takes a path that is several times as slow.
    """
    return functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask).flatten(1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T``, ``[N, out]``, for N so small that reading the weight is what takes the time.

    On a CPU the weight stands on the left: a matrix product repacks its right operand, so it had better be the small one
    (measured 1.3 to 1.5 times as fast for 2 to 32 lines in bfloat16, and for 4 to 32 in float32). A single line in
    bfloat16 is doubled, because a matrix times a vector takes a slower path.
    """
    count = x.shape[0]
    if x.device.type != "cpu" or (x.dtype == torch.float32 and count <= 2):
        return functional.linear(x, weight)
    if count > 1:
        return torch.mm(weight, x.t()).t()
    return torch.mm(weight, x.t().expand(-1, 2)).t()[:1]
