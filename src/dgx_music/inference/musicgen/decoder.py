"""MusicGen's language model: ``prefill`` for one row, and ``forward`` for one decode step of many.

The mathematics is that of ``transformers``' ``modeling_musicgen.py`` and
``modeling_musicgen_melody.py``; the tests compare the tokens with theirs, one by one. The speed
comes from what is left out: q, k and v are one product, the codebooks' heads are one product, the
unconditional pass skips cross-attention, and no step copies what an earlier one computed.

Shapes: R rows (one generation each), each with one pass (conditional) or two (conditional,
unconditional), so N = R * passes sequences; L layers, H heads of size D, hidden = H * D;
K codebooks of V tokens; T positions; X text tokens; E embeddings before the tokens; C positions
that a prefill reads at once.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgx_music.inference.musicgen.attention import Attention, Step, Text, no_plans
from dgx_music.inference.musicgen.embedding import Embedding
from dgx_music.inference.musicgen.few_rows import advance, can_advance
from dgx_music.inference.musicgen.kernels import add_norm, embed
from dgx_music.inference.musicgen.launches import Span, borrow_stream
from dgx_music.inference.musicgen.layers import (
    EPSILON,
    Layer,
    Norm,
    Weight,
    linear,
    norm_of,
    quantise,
)
from dgx_music.inference.musicgen.products import fits, most_sequences, read_normed

_PREFILL_POSITIONS = 256
"""How many positions a prefill reads at once.

Enough to make reading the weights cheap, few enough for the memory that attention needs.
"""


class Decoder:
    """The language model on its device.

    Each row has room for ``max_positions``: the prefix, the tokens and one to spare.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        text_projection: nn.Linear | None,
        max_positions: int,
        device: torch.device | None = None,
    ) -> None:
        """Take over the weights of a ``Musicgen(Melody)ForCausalLM``, and put them on the device.

        Removes its layers on the way: two copies might not fit in memory. They are fused where they
        are, so that the device gets only what it keeps. Without a device they stay there.
        """
        decoder, config = model.model.decoder, model.config
        self.codebook_count: int = config.num_codebooks
        self.channels: int = config.audio_channels
        self.vocabulary: int = config.vocab_size
        self.pad_token: int = config.pad_token_id
        self.max_positions = max_positions
        self._has_gelu = config.activation_function == "gelu"
        self._text_projection = text_projection
        self._embedding = Embedding(decoder.embed_tokens, max_positions, device)
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        self.stream = borrow_stream(self, self.device, priority=-1)
        """Of a GPU: all slots of this decoder make their steps here, before all other work."""
        self._final_norm = norm_of(decoder.layer_norm).to(self.device)
        heads_weight = torch.cat([head.weight for head in model.lm_heads])  # [K * V, hidden]
        self._heads: Weight = heads_weight.to(self.device)
        heads: int = config.num_attention_heads
        self.attention = Attention(heads, config.hidden_size // heads, self.device, self.dtype)
        self.layers: list[Layer] = []
        while decoder.layers:
            self.layers.append(Layer.fuse(decoder.layers[0], self.device))
            del decoder.layers[0]

    @property
    def reads_text(self) -> bool:
        """True if text reaches the rows through cross-attention, False if it is a prefix."""
        return self.layers[0].cross is not None

    @property
    def reads_positions(self) -> bool:
        """True if kernels find each row's position on the device: one recording serves all."""
        return self.attention.has_kernel

    @property
    def weight_bytes(self) -> int:
        """How much memory the weights take."""
        layers = sum(layer.nbytes for layer in self.layers)
        return self._embedding.nbytes + self._heads.nbytes + layers

    @property
    def slot_bytes(self) -> int:
        """How much memory one slot's keys and values take."""
        numbers = len(self.layers) * 2 * 2 * self._hidden_size * self.max_positions
        return numbers * self.attention.cache_dtype.itemsize

    def text_bytes(self, length: int) -> int:
        """Return how much memory one slot's texts of that many tokens take."""
        numbers = len(self.layers) * 2 * 2 * self._hidden_size * length
        return numbers * self.dtype.itemsize if self.reads_text else 0

    @property
    def has_native_kernels(self) -> bool:
        """True if kernels in C were built."""
        return self.attention.native is not None

    @property
    def _hidden_size(self) -> int:
        return self.attention.head_count * self.attention.head_size

    # ------------------------------------------------------------------------------------- setup

    @torch.no_grad()
    def quantise(self, bits: str = "int8") -> None:
        """Round to ``int8`` or ``int4`` whatever every step reads, but no embeddings and norms."""
        for index in range(len(self.layers)):
            self.layers[index] = self.layers[index].quantise(bits, self.attention.native)
        self._heads = quantise(self._heads, bits, self.attention.native)

    def shrink_cache(self) -> None:
        """Keep keys and values in 8 bits (e4m3: 4 of exponent, 3 of mantissa) from now on.

        A slot then takes half of what it takes in 16 bits.
        """
        self.attention.shrink_cache()

    def build_kernels(self) -> None:
        """Compile kernels in C that replace several operations of torch, if there is a compiler.

        They are for a CPU. Call this before ``quantise``.
        """
        self.attention.build_kernels()

    def empty_cache(self, slot_count: int) -> Tensor:
        """Return zeros for every slot's keys and values: ``[L, slot, pass, 2, H, T, D]``."""
        return self._zeros(slot_count, self.max_positions, self.attention.cache_dtype)

    def empty_text(self, slot_count: int, length: int) -> Tensor:
        """Return zeros for cross-attention's keys and values: ``[L, slot, pass, 2, H, X, D]``."""
        return self._zeros(slot_count, length, self.dtype)

    def _zeros(self, slot_count: int, length: int, dtype: torch.dtype) -> Tensor:
        heads, head_size = self.attention.head_count, self.attention.head_size
        shape = (len(self.layers), slot_count, 2, 2, heads, length, head_size)
        return torch.zeros(shape, device=self.device, dtype=dtype)

    @torch.no_grad()
    def read_text(self, states: Tensor) -> Tensor:
        """Return cross-attention's keys and values ``[L, 2, H, X, D]`` of one text.

        ``states`` are what the text encoder makes of it: ``[X, width]``.
        """
        states = states.to(self.dtype)
        if self._text_projection is not None:
            states = self._text_projection(states)  # [X, hidden]
        weights = [layer.cross.kv for layer in self.layers if layer.cross is not None]
        pairs = torch.stack([functional.linear(states, weight) for weight in weights])
        # [L, X, 2 * hidden] -> [L, 2, H, X, D]
        heads = pairs.view(*pairs.shape[:2], 2, self.attention.head_count, self.attention.head_size)
        return heads.permute(0, 2, 3, 1, 4)

    # ------------------------------------------------------------------------------- decode step

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: Tensor,
        text: Text | None,
        *,
        passes: int,
        spans: tuple[Span, ...],
        padded_rows: int,
    ) -> Tensor:
        """Return the float32 logits ``[R, pass, K, V]`` that follow the tokens ``[R, K]``.

        Row r owns slot r of the cache, which gets its new keys and values at ``positions[r]``. The
        ``spans`` give each row's context length: its position plus one, or more if it is masked.
        On a CPU, matrix products have at least ``padded_rows`` rows, so that a row's numbers are
        the same to the last bit in any batch.
        """
        context = self.attention.context(positions, cache, passes, spans)
        texts, text_every = ((), 1) if text is None else (text.segments(), passes // text.passes)
        step = Step(context, texts, text_every, padded_rows)
        x, normed = self._embed(tokens, positions, passes)
        if self._takes_few_kernels(len(x)):
            logits = self._advance_few(x, cache, step)
        else:
            for index, layer_cache in enumerate(cache.unbind(0)):
                normed = self._step_layer(index, x, normed, layer_cache, step)
            logits = linear(normed, self._heads, padded_rows).float()  # [N, K * V]
        return logits.view(len(tokens), passes, self.codebook_count, -1)

    def _takes_few_kernels(self, sequence_count: int) -> bool:
        """Return whether so many sequences go through each layer in few kernels."""
        most = most_sequences(self._hidden_size)
        if not (self.attention.has_kernel and self._has_gelu and sequence_count <= most):
            return False
        is_plain = isinstance(self._heads, Tensor) and fits(self._heads)
        return is_plain and all(map(can_advance, self.layers))

    def _advance_few(self, x: Tensor, cache: Tensor, step: Step) -> Tensor:
        """Return the logits ``[N, K * V]`` of few sequences; x ``[N, hidden]`` is written to."""
        for index, (layer, own) in enumerate(zip(self.layers, cache.unbind(0), strict=True)):
            advance(layer, index, x, own, step, self.attention)
        return read_normed(x, self._final_norm, cast("Tensor", self._heads), torch.float32)

    def _embed(self, tokens: Tensor, positions: Tensor, passes: int) -> tuple[Tensor, Tensor]:
        """Return what goes into the first layer ``[N, hidden]``, and the same normalised for it."""
        norm = self.layers[0].self_norm
        if self.attention.has_kernel:
            return embed(tokens, positions, self._embedding, *norm, passes, epsilon=EPSILON)
        x = self._embedding.of_tokens(tokens) + self._embedding.positions[positions]
        x = x.repeat_interleave(passes, dim=0)  # both passes read the same tokens
        return x, norm(x)

    def _step_layer(
        self, index: int, x: Tensor, normed: Tensor, cache: Tensor, step: Step
    ) -> Tensor:
        """Add one layer's results to x ``[N, hidden]``, in place.

        ``normed`` is x, normalised for this layer; returns x, normalised for the next one.
        """
        layer, padded_rows = self.layers[index], step.padded_rows
        read = self.attention.attend_self(layer, index, normed, cache, step.context, padded_rows)
        if layer.cross is not None and step.texts:
            normed = self._add(x, read, layer.cross.norm, read_every=step.text_every)
            read = self.attention.attend_cross(layer.cross, index, normed, step.texts, padded_rows)
            normed = self._add(x, read, layer.mlp_norm, added_every=step.text_every)
        else:
            normed = self._add(x, read, layer.mlp_norm)
        return self._add(x, _mlp(layer, normed, padded_rows), self._norm_after(index))

    def _norm_after(self, index: int) -> Norm:
        is_last = index + 1 == len(self.layers)
        return self._final_norm if is_last else self.layers[index + 1].self_norm

    def _add(
        self,
        x: Tensor,
        more: Tensor,
        norm: Norm,
        *,
        added_every: int = 1,
        read_every: int = 1,
    ) -> Tensor:
        """Add ``more`` to every so many rows of x, in place; return every so many, normalised."""
        if self.attention.has_kernel:
            return add_norm(x, more, *norm, added_every, read_every, epsilon=EPSILON)
        x[::added_every].add_(more)
        return norm(x[::read_every])

    # ----------------------------------------------------------------------------------- prefill

    @torch.no_grad()
    def prefill(
        self,
        prefix: Tensor | None,
        tokens: Tensor,
        cache: Tensor,
        text: Text | None,
    ) -> None:
        """Fill one slot's cache ``[L, pass, 2, H, T, D]`` up to the position to decode.

        What comes before is the prefix ``[pass, E, hidden]`` and the tokens ``[P, K]`` given in
        advance: they take a few large products instead of P small steps. Attention is causal
        throughout, as in transformers. The text is that of one slot.
        """
        embedded = self._embedding.of_tokens(tokens).expand(2, -1, -1)  # [pass, P, hidden]
        x = embedded if prefix is None else torch.cat([prefix.to(self.dtype), embedded], dim=1)
        x = x + self._embedding.positions[: x.shape[1]]
        with no_plans:
            for start in range(0, x.shape[1], _PREFILL_POSITIONS):
                self._prefill_chunk(x[:, start : start + _PREFILL_POSITIONS], start, cache, text)

    def _prefill_chunk(self, x: Tensor, start: int, cache: Tensor, text: Text | None) -> None:
        """Read C positions ``[pass, C, hidden]`` at once, from ``start`` on."""
        position = torch.arange(start + x.shape[1], device=self.device)
        is_visible = position <= position[start:, None]  # [C, start + C]
        texts = () if text is None else text.segments()  # one or none
        for index, (layer, layer_cache) in enumerate(
            zip(self.layers, cache.unbind(0), strict=True)
        ):
            normed = layer.self_norm(x)
            x = x + self.attention.prefill_self(layer, normed, start, layer_cache, is_visible)
            if layer.cross is not None and text is not None:
                normed = layer.cross.norm(x[: text.passes])
                read = self.attention.prefill_cross(layer.cross, index, normed, texts[0])
                x = torch.cat([x[: text.passes] + read, x[text.passes :]])
            flat = x.flatten(0, 1)
            x = x + _mlp(layer, layer.mlp_norm(flat), len(flat)).view(x.shape)


def _mlp(layer: Layer, normed: Tensor, padded_rows: int) -> Tensor:
    # Contiguous, so that each number goes through the same instructions wherever it stands.
    inner = linear(normed, layer.mlp_in, padded_rows).contiguous()
    return linear(layer.activation(inner), layer.mlp_out, padded_rows)
