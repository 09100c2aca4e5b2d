"""MusicGen's language model: the forward pass of one decode step for many rows.

The mathematics is that of ``transformers``' ``modeling_musicgen.py`` and ``modeling_musicgen_melody.py``, which the tests
hold it to, token for token. What differs is what is not done: q, k and v are one product, the codebooks' heads are one
product, the null half of guidance skips cross-attention, and nothing that was already computed is copied from step to step.

Shapes: R rows, each with one half (conditional) or two (conditional, null), so N = R * halves lines of numbers; L layers,
H heads of size D, hidden = H * D; K codebooks of V tokens; T positions; X text tokens; E embeddings before the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dgx_music.inference.musicgen.kernels import add_norm, attend_cached, can_launch, is_available, store_newest
from dgx_music.inference.musicgen.launches import Span, borrow_stream
from dgx_music.inference.musicgen.layers import EPSILON, Cross, Layer, Norm, Weight, linear, norm_of, quantise
from dgx_music.inference.musicgen.native import Native, build

_MOST_SHAPES = 128
"""So many shapes of the forward pass are compiled: a GPU's plans of six sizes of batch and twelve lengths, and some."""
_PREFILL_POSITIONS = 256
"""Read at a time: enough to make reading the weights cheap, few enough for the memory that attention needs."""


class Text(NamedTuple):
    """What the rows' prompts are to cross-attention: keys and values, of the first half or of both."""

    keys_values: Tensor  # [L, slot, half, 2, H, X, D]
    mask: Tensor  # [slot, half, X], what to add to the scores: 0, or -inf past a text's end
    halves: int
    spans: tuple[Span, ...]


class _Part(NamedTuple):
    """What neighbouring lines read; all views, made once for all layers."""

    lines: slice
    keys: tuple[Tensor, ...]  # for each layer [N, H, T, D]
    values: tuple[Tensor, ...]
    mask: Tensor | None  # [N, 1, 1, T], what to add to the scores
    newest: tuple[Tensor, ...] = ()  # for each layer [N, 2, H, D], where the last of them goes


class _Reach(NamedTuple):
    """What a step writes and reads of the caches."""

    slots: Tensor  # [R], and
    positions: Tensor  # [R], where the new keys and values go
    halves: int
    last: Tensor  # [N], the last position that each line reads
    is_exact: bool
    """True where no line reads further than that, so that the host knows the positions."""
    parts: tuple[_Part, ...]


class Decoder:
    """The language model on its device, with room for ``max_positions`` in each row: prefix, tokens and one to spare."""

    @torch.no_grad()
    def __init__(self, model: Any, text_projection: nn.Linear | None, max_positions: int) -> None:
        """Take over the weights of a ``Musicgen(Melody)ForCausalLM``.

        Its layers are gone afterwards: two copies might not fit in memory.
        """
        decoder, config = model.model.decoder, model.config
        self.codebook_count: int = config.num_codebooks
        self.channels: int = config.audio_channels
        self.vocabulary: int = config.vocab_size
        self.pad_token: int = config.pad_token_id
        self.max_positions = max_positions
        self.head_count: int = config.num_attention_heads
        self.head_size: int = config.hidden_size // config.num_attention_heads
        self._text_projection = text_projection
        self._embedding = torch.cat([table.weight for table in decoder.embed_tokens])  # [K * (V + 1), hidden]
        self.device, self.dtype = self._embedding.device, self._embedding.dtype
        self.stream = borrow_stream(self, self.device, priority=-1)
        """Of a GPU: where all slots of this decoder make their steps, before whatever else there is to do."""
        self._first_tokens = torch.arange(self.codebook_count, device=self.device) * (config.vocab_size + 1)  # [K]
        self._positions = sinusoids(max_positions, config.hidden_size).to(self.device, self.dtype)  # [T, hidden]
        self._final_norm = norm_of(decoder.layer_norm)
        self._heads: Weight = torch.cat([head.weight for head in model.lm_heads])  # [K * V, hidden]
        self.cache_dtype = self.dtype
        self._has_kernel = self._find_kernel()
        self._native: Native | None = None
        self.layers: list[Layer] = []
        while decoder.layers:
            self.layers.append(Layer.fuse(decoder.layers[0]))
            del decoder.layers[0]

    @property
    def reads_text(self) -> bool:
        """True where text reaches the rows through cross-attention, False where it is a prefix."""
        return self.layers[0].cross is not None

    @property
    def reads_positions(self) -> bool:
        """True if kernels find each row's position on the device, so that one recording serves all positions."""
        return self._has_kernel

    @property
    def weight_bytes(self) -> int:
        """How much memory the weights take."""
        others = self._embedding.nbytes + self._heads.nbytes + self._positions.nbytes
        return others + sum(layer.nbytes for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        """How much memory one slot's keys and values take."""
        numbers = len(self.layers) * 2 * 2 * self.head_count * self.max_positions * self.head_size
        return numbers * self.cache_dtype.itemsize

    @property
    def has_native_kernels(self) -> bool:
        """True where kernels in C were built."""
        return self._native is not None

    @torch.no_grad()
    def quantise(self) -> None:
        """Round all to 8 bits that is read at every step; embeddings and norms stay as they are."""
        for index in range(len(self.layers)):
            self.layers[index] = self.layers[index].quantise(self._native)
        self._heads = quantise(self._heads, self._native)

    def shrink_cache(self) -> None:
        """Keep keys and values in 8 bits (e4m3: 4 of exponent, 3 of mantissa) from now on; halves what a slot takes."""
        self.cache_dtype = torch.float8_e4m3fn
        self._has_kernel = self._find_kernel()

    def _find_kernel(self) -> bool:
        return is_available(self.device, self.cache_dtype) and can_launch(self.device, self.cache_dtype)

    def build_kernels(self) -> None:
        """Have kernels in C do what torch does in several operations, where this can be; for a CPU, and before ``quantise``."""
        self._native = build(self.head_size, self.dtype)

    def compile(self, backend: str = "inductor", *, is_strict: bool = False) -> None:
        """Have torch compile the forward pass, which then takes a minute the first time; not together with kernels in C.

        Fixed shapes on a GPU, whose launches are of few; on a CPU, where every step reads a little more, one for all. Past a
        number of shapes (``_MOST_SHAPES``, or 8 where torch cannot be told) it runs as plain torch; where ``is_strict``,
        torch raises instead, and where it cannot compile the pass in one piece.
        """
        options: dict[str, Any] = {"backend": backend, "dynamic": self.device.type == "cpu", "fullgraph": is_strict}
        if "recompile_limit" in signature(torch.compile).parameters:
            options["recompile_limit"] = _MOST_SHAPES
        self.forward = torch.compile(self.forward, **options)  # type: ignore[method-assign]

    def empty_cache(self, slot_count: int) -> Tensor:
        """Return zeros for the keys and values of every slot: ``[L, slot, half, 2, H, T, D]``."""
        shape = (len(self.layers), slot_count, 2, 2, self.head_count, self.max_positions, self.head_size)
        return torch.zeros(shape, device=self.device, dtype=self.cache_dtype)

    def empty_text(self, slot_count: int, length: int) -> Tensor:
        """Return zeros for cross-attention's keys and values of every slot: ``[L, slot, half, 2, H, X, D]``."""
        shape = (len(self.layers), slot_count, 2, 2, self.head_count, length, self.head_size)
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def read_text(self, states: Tensor) -> Tensor:
        """Return cross-attention's keys and values ``[L, 2, H, X, D]`` of one text's states ``[X, width]``."""
        states = states.to(self.dtype)
        if self._text_projection is not None:
            states = self._text_projection(states)  # [X, hidden]
        weights = [layer.cross.kv for layer in self.layers if layer.cross is not None]
        pairs = torch.stack([functional.linear(states, weight) for weight in weights])  # [L, X, 2 * hidden]
        return pairs.view(*pairs.shape[:2], 2, self.head_count, self.head_size).permute(0, 2, 3, 1, 4)

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: Tensor,
        text: Text | None,
        *,
        halves: int,
        spans: tuple[Span, ...],
        lines: int,
    ) -> Tensor:
        """Return the logits ``[R, half, K, V]`` that follow the tokens ``[R, K]`` at the positions ``[R]``, in float32.

        Row r owns slot r of the cache, which gets its new keys and values. The ``spans`` say how much of the cache each
        row reads: one more than its position, or more, where it is masked. On a CPU products are made of at least ``lines``
        lines, so that a row's numbers are the same to the last bit whoever shares the step.
        """
        reach = self._reach(positions, cache, halves, spans)
        texts = () if text is None else tuple(_text_parts(text))
        x = self._embed(tokens) + self._positions[positions]
        x = x.repeat_interleave(halves, dim=0)  # the halves' tokens agree
        # Without a text of its own, the null half's states are zero, and so is what attention makes of them.
        every = 1 if text is None else halves // text.halves
        following = [*(layer.self_norm for layer in self.layers[1:]), self._final_norm]
        normed = self.layers[0].self_norm(x)
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.unbind(0), strict=True)):
            read = self._self_attention(layer, index, normed, layer_cache, reach, lines)
            if layer.cross is not None and text is not None:
                normed = self._add(x, read, layer.cross.norm, read_every=every)
                read = self._cross_attention(layer.cross, index, normed, texts, lines)
                normed = self._add(x, read, layer.mlp_norm, added_every=every)
            else:
                normed = self._add(x, read, layer.mlp_norm)
            normed = self._add(x, self._mlp(layer, normed, lines), following[index])
        logits = linear(normed, self._heads, lines).float()  # [N, K * V]
        return logits.view(len(tokens), halves, self.codebook_count, -1)

    def _add(self, x: Tensor, more: Tensor, norm: Norm, *, added_every: int = 1, read_every: int = 1) -> Tensor:
        """Add to every so many lines of x, in place; return every so many of them, normalised."""
        if self._has_kernel:
            return add_norm(x, more, norm.weight, norm.bias, added_every, read_every, epsilon=EPSILON)
        x[::added_every].add_(more)
        return norm(x[::read_every])

    @torch.no_grad()
    def prefill(self, prefix: Tensor | None, tokens: Tensor, cache: Tensor, text: Text | None) -> None:
        """Fill one slot's cache ``[L, half, 2, H, T, D]`` with what stands before the position to decode.

        That is the prefix ``[half, E, hidden]`` and the tokens ``[P, K]``, given in advance: they take a few large
        products instead of P small steps. Attention is causal throughout, as transformers has it. The text is one slot's.
        """
        embedded = self._embed(tokens).expand(2, -1, -1)  # [half, P, hidden]
        x = embedded if prefix is None else torch.cat([prefix.to(self.dtype), embedded], dim=1)
        x = x + self._positions[: x.shape[1]]
        for start in range(0, x.shape[1], _PREFILL_POSITIONS):
            self._prefill(x[:, start : start + _PREFILL_POSITIONS], start, cache, text)

    def _prefill(self, x: Tensor, start: int, cache: Tensor, text: Text | None) -> None:
        """Read so many positions ``[half, C, hidden]`` at once, from ``start`` on."""
        end = start + x.shape[1]
        position = torch.arange(end, device=self.device)
        seen = position <= position[start:, None]  # [C, end]
        texts = () if text is None else tuple(_text_parts(text))  # one, or none
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache.unbind(0), strict=True)):
            q, k, v = self._heads_of(_each(layer.self_norm(x), layer.self_qkv), 3)  # [half, H, C, D]
            layer_cache[:, :, :, start:end] = self._to_cache(torch.stack([k, v], dim=1))
            keys, values = layer_cache[..., :end, :].to(self.dtype).unbind(1)
            x = x + _each(_merge(_attention(q, keys, values, seen)), layer.self_out)
            if layer.cross is not None and text is not None:
                (q,) = self._heads_of(_each(layer.cross.norm(x[: text.halves]), layer.cross.q), 1)
                keys, values, mask = texts[0].keys[index], texts[0].values[index], texts[0].mask
                read = _each(_merge(_attention(q, keys, values, mask)), layer.cross.out)
                x = torch.cat([x[: text.halves] + read, x[text.halves :]])
            flat = x.flatten(0, 1)
            x = x + self._mlp(layer, layer.mlp_norm(flat), len(flat)).view(x.shape)

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return the sum of the codebooks' embeddings, ``[R, hidden]``, in transformers' order."""
        total, *others = functional.embedding(tokens + self._first_tokens, self._embedding).unbind(1)
        for embedded in others:
            total = total + embedded
        return total

    def _heads_of(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Return the parts of ``[half, C, parts * hidden]``, each ``[half, H, C, D]``."""
        return x.view(*x.shape[:2], parts, self.head_count, self.head_size).permute(2, 0, 3, 1, 4).unbind(0)

    def _reach(self, positions: Tensor, cache: Tensor, halves: int, spans: tuple[Span, ...]) -> _Reach:
        last = positions.repeat_interleave(halves)  # [N]
        is_exact = not any(span.is_masked for span in spans)
        parts = []
        for start, stop, length, is_masked in spans:
            lines, mask = slice(start * halves, stop * halves), None
            if is_masked and not self._has_kernel:
                mask = additive(torch.arange(length, device=self.device) <= last[lines, None], self.dtype)
            filled = cache[:, start:stop, :halves].flatten(1, 2)[..., :length, :]  # [L, N, 2, H, length, D]
            newest = filled[..., -1, :].unbind(0) if is_exact else ()
            parts.append(_Part(lines, *_views(filled), mask, newest))
        return _Reach(torch.arange(len(positions), device=self.device), positions, halves, last, is_exact, tuple(parts))

    def _self_attention(
        self, layer: Layer, index: int, normed: Tensor, cache: Tensor, reach: _Reach, lines: int
    ) -> Tensor:
        qkv = linear(normed, layer.self_qkv, lines).contiguous()
        q, fresh = torch.split_with_sizes(qkv, (normed.shape[1], 2 * normed.shape[1]), 1)
        self._write(fresh.view(-1, 2, self.head_count, self.head_size), index, cache, reach)
        q = q.view(-1, self.head_count, 1, self.head_size)
        read = [self._read(_of(part, q), index, part, reach) for part in reach.parts]
        return linear(_join(read), layer.self_out, lines)

    def _write(self, fresh: Tensor, index: int, cache: Tensor, reach: _Reach) -> None:
        """Put the keys and values ``[N, 2, H, D]`` of this step into a layer's cache."""
        if self._has_kernel:
            store_newest(fresh, cache, reach.positions, reach.halves)
            return
        fresh = self._to_cache(fresh)
        if reach.is_exact:  # a copy for each part is several times as fast on a CPU as one by indices
            for part in reach.parts:
                part.newest[index].copy_(_of(part, fresh))
        else:
            rows = fresh.view(-1, reach.halves, *fresh.shape[1:])
            _copyable(cache)[reach.slots, : reach.halves, :, :, reach.positions] = _copyable(rows)

    def _read(self, q: Tensor, index: int, part: _Part, reach: _Reach) -> Tensor:
        """Return what the part's queries ``[N, H, 1, D]`` read of a layer's cache: ``[N, H * D]``."""
        keys, values = part.keys[index], part.values[index]
        if self._has_kernel:
            return attend_cached(q.squeeze(2), keys, values, reach.last[part.lines], keys.shape[-2])
        # Nothing is converted, unless the cache is in 8 bits.
        return self._attend(q, keys.to(self.dtype), values.to(self.dtype), part.mask)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return what one query ``[N, H, 1, D]`` of each line reads from keys and values ``[N, H, T, D]``: ``[N, H * D]``.

        The last dimension of each must be contiguous: else torch takes a path that is several times as slow, and the kernels
        in C refuse.
        """
        if self._native is not None:
            return self._native.attend(q, keys, values, mask)
        return _attention(q, keys, values, mask).flatten(1)

    def _to_cache(self, keys_values: Tensor) -> Tensor:
        """Return them in the cache's number format; what is too large for 8 bits is as large as they can hold, not NaN."""
        if self.cache_dtype == self.dtype:
            return keys_values
        most = torch.finfo(self.cache_dtype).max
        return keys_values.clamp(-most, most).to(self.cache_dtype)

    def _cross_attention(
        self, cross: Cross, index: int, normed: Tensor, texts: tuple[_Part, ...], lines: int
    ) -> Tensor:
        q = linear(normed, cross.q, lines).contiguous().view(-1, self.head_count, 1, self.head_size)
        read = [self._attend(_of(part, q), part.keys[index], part.values[index], part.mask) for part in texts]
        return linear(_join(read), cross.out, lines)

    def _mlp(self, layer: Layer, normed: Tensor, lines: int) -> Tensor:
        # Side by side in memory, each number goes through the same instructions wherever it stands.
        inner = linear(normed, layer.mlp_in, lines).contiguous()
        return linear(layer.activation(inner), layer.mlp_out, lines)


def sinusoids(count: int, width: int) -> Tensor:
    """Return the position embeddings ``[count, width]``: cosines, then sines (``create_sin_embedding`` of audiocraft)."""
    half = width // 2
    rates = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def additive(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return attention's mask ``[N, 1, 1, T]`` for ``[N, T]``: 0 where visible, -inf elsewhere."""
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
    return mask.masked_fill_(~is_visible, -math.inf)[:, None, None]


def _text_parts(text: Text) -> Iterator[_Part]:
    for start, stop, length, is_masked in text.spans:
        keys_values = text.keys_values[:, start:stop, : text.halves, :, :, :length].flatten(1, 2)  # [L, N, 2, H, X, D]
        mask = text.mask[start:stop, : text.halves, :length].flatten(0, 1)[:, None, None] if is_masked else None
        yield _Part(slice(start * text.halves, stop * text.halves), *_views(keys_values), mask)


def _views(keys_values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return each layer's keys and each layer's values, of ``[L, N, 2, ...]``."""
    keys, values = keys_values.unbind(2)
    return keys.unbind(0), values.unbind(0)


def _of(part: _Part, lines: Tensor) -> Tensor:
    """Return the part's own among all lines."""
    return lines if part.lines == slice(0, len(lines)) else lines[part.lines]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def _copyable(numbers: Tensor) -> Tensor:
    """Return a view that torch can copy by index: it cannot do that with numbers of 8 bits."""
    return numbers.view(torch.uint8) if numbers.itemsize == 1 else numbers


def _merge(heads: Tensor) -> Tensor:
    """Return ``[half, C, hidden]`` for ``[half, H, C, D]``."""
    return heads.transpose(1, 2).flatten(2)


def _each(x: Tensor, weight: Weight) -> Tensor:
    """Return ``linear`` of each line of ``[half, C, in]``."""
    flat = x.flatten(0, 1)
    return linear(flat, weight, len(flat)).reshape(*x.shape[:2], -1)
