"""Self-attention over the cache and cross-attention over the text, in a decode step or a prefill.

Shapes: R rows (one generation each), each with one pass (conditional) or two (conditional,
unconditional), so N = R * passes sequences; H heads of size D, hidden = H * D; T cached positions;
X text tokens; C positions that a prefill reads at once; L layers.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen.cached_attention import attend_cached
from dgx_music.inference.musicgen.kernel_check import can_launch, is_available
from dgx_music.inference.musicgen.kernels import store_newest
from dgx_music.inference.musicgen.launches import Span
from dgx_music.inference.musicgen.layers import CrossAttention, Layer, Weight, linear
from dgx_music.inference.musicgen.native import Native, build


class Segment(NamedTuple):
    """What neighbouring sequences attend to; all views, made once for all layers."""

    sequences: slice
    keys: tuple[Tensor, ...]  # for each layer [N, H, T, D]
    values: tuple[Tensor, ...]
    mask: Tensor | None  # [N, 1, 1, T], what to add to the scores
    last: Tensor  # [N], the last position that each sequence attends to
    newest: tuple[Tensor, ...] = ()  # for each layer [N, 2, H, D], the cache's last position


class Context(NamedTuple):
    """What one decode step writes to the cache and reads from it."""

    positions: Tensor  # [R], the place of the new keys and values
    passes: int
    is_exact: bool
    """True if no sequence reads past its own position, so that the host knows the positions."""
    segments: tuple[Segment, ...]


class Step(NamedTuple):
    """What all layers share in one decode step."""

    context: Context
    texts: tuple[Segment, ...]  # none if no row has a text
    text_every: int
    """2 if only every second sequence reads a text, else 1.

    The unconditional pass may have none. Its text states would then be zero, and so would be what
    cross-attention reads from them.
    """
    padded_rows: int


class Text(NamedTuple):
    """The rows' prompts as cross-attention reads them: keys and values of one pass or of both."""

    keys_values: Tensor  # [L, slot, pass, 2, H, X, D]
    mask: Tensor  # [slot, pass, X], what to add to the scores: 0, or -inf past a text's end
    last: Tensor  # [slot, pass], the place of each text's last token
    passes: int
    spans: tuple[Span, ...]

    def segments(self) -> tuple[Segment, ...]:
        """Return one segment for each span."""
        return tuple(self._segment(span) for span in self.spans)

    def _segment(self, span: Span) -> Segment:
        start, stop, length, is_masked = span
        keys_values = self.keys_values[:, start:stop, : self.passes, :, :, :length]
        keys_values = keys_values.flatten(1, 2)  # [L, N, 2, H, X, D]
        mask = None
        if is_masked:
            mask = self.mask[start:stop, : self.passes, :length].flatten(0, 1)[:, None, None]
        sequences = slice(start * self.passes, stop * self.passes)
        last = self.last[start:stop, : self.passes].flatten().contiguous()
        return Segment(sequences, *_by_layer(keys_values), mask, last)


class Attention:
    """Attention with the device's kernels: Triton on a GPU, C on a CPU, or else torch's own."""

    def __init__(
        self,
        head_count: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.head_count = head_count
        self.head_size = head_size
        self.device = device
        self.dtype = dtype
        self.cache_dtype = dtype
        self.has_kernel = self._find_kernel()
        """True if Triton's kernels run here; they read each row's position on the device."""
        self.native: Native | None = None
        """Kernels in C, for a CPU."""

    def shrink_cache(self) -> None:
        """Keep keys and values in 8 bits (e4m3) from now on."""
        self.cache_dtype = torch.float8_e4m3fn
        self.has_kernel = self._find_kernel()

    def _find_kernel(self) -> bool:
        where = (self.device, self.cache_dtype)
        return is_available(*where) and can_launch(*where)

    def build_kernels(self) -> None:
        """Compile the kernels in C, if there is a compiler for them."""
        self.native = build(self.head_size, self.dtype)

    # ------------------------------------------------------------------------------- decode step

    def context(
        self,
        positions: Tensor,
        cache: Tensor,
        passes: int,
        spans: tuple[Span, ...],
    ) -> Context:
        """Return what a step at the positions ``[R]`` writes and reads of the cache."""
        last = positions.repeat_interleave(passes)  # [N]
        is_exact = not any(span.is_masked for span in spans)
        segments = []
        for start, stop, length, is_masked in spans:
            sequences, mask = slice(start * passes, stop * passes), None
            if is_masked and not self.has_kernel:
                is_visible = torch.arange(length, device=self.device) <= last[sequences, None]
                mask = additive_mask(is_visible, self.dtype)
            # [L, N, 2, H, length, D]
            read = cache[:, start:stop, :passes].flatten(1, 2)[..., :length, :]
            newest = read[..., -1, :].unbind(0) if is_exact else ()
            segments.append(Segment(sequences, *_by_layer(read), mask, last[sequences], newest))
        return Context(positions, passes, is_exact, tuple(segments))

    def attend_self(
        self,
        layer: Layer,
        index: int,
        normed: Tensor,
        cache: Tensor,
        context: Context,
        padded_rows: int,
    ) -> Tensor:
        """Return what the sequences ``[N, hidden]`` read from the layer's cache and their own keys."""
        qkv = linear(normed, layer.self_qkv, padded_rows).contiguous()
        q, fresh = torch.split_with_sizes(qkv, (normed.shape[1], 2 * normed.shape[1]), 1)
        self._write(fresh.view(-1, 2, self.head_count, self.head_size), index, cache, context)
        q = q.view(-1, self.head_count, 1, self.head_size)
        read = [self.read(_select(part, q), index, part) for part in context.segments]
        return linear(_join(read), layer.self_out, padded_rows)

    def attend_cross(
        self,
        cross: CrossAttention,
        index: int,
        normed: Tensor,
        texts: tuple[Segment, ...],
        padded_rows: int,
    ) -> Tensor:
        """Return what the sequences ``[N, hidden]`` read from their texts."""
        q = linear(normed, cross.q, padded_rows).contiguous()
        q = q.view(-1, self.head_count, 1, self.head_size)
        read = [self.read(_select(text, q), index, text) for text in texts]
        return linear(_join(read), cross.out, padded_rows)

    def _write(self, fresh: Tensor, index: int, cache: Tensor, context: Context) -> None:
        """Put the keys and values ``[N, 2, H, D]`` of this step into a layer's cache."""
        if self.has_kernel:
            store_newest(fresh, cache, context.positions, context.passes)
            return
        fresh = self.to_cache(fresh)
        # a copy for each segment: on a CPU several times as fast as by indices
        if context.is_exact:
            for segment in context.segments:
                segment.newest[index].copy_(_select(segment, fresh))
        else:
            rows = _copyable(fresh.view(-1, context.passes, *fresh.shape[1:]))
            slots = torch.arange(len(rows), device=self.device)
            _copyable(cache)[slots, : context.passes, :, :, context.positions] = rows

    def read(self, q: Tensor, index: int, segment: Segment, *, overlaps: bool = False) -> Tensor:
        """Return what queries ``[N, H, 1, D]`` read from a layer's cache or text: ``[N, H * D]``."""
        keys, values = segment.keys[index], segment.values[index]
        if self.has_kernel:
            length, q = keys.shape[-2], q.squeeze(2)
            return attend_cached(q, keys, values, segment.last, length, overlaps=overlaps)
        # Nothing is converted, unless the cache is in 8 bits.
        return self._attend(q, keys.to(self.dtype), values.to(self.dtype), segment.mask)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return what one query ``[N, H, 1, D]`` reads from ``[N, H, T, D]``: ``[N, H * D]``.

        The last dimension of each must be contiguous: else torch takes a path that is several times
        as slow, and the kernels in C raise ``ValueError``.
        """
        if self.native is not None:
            return self.native.attend(q, keys, values, mask)
        return _attend_by_torch(q, keys, values, mask).flatten(1)

    def to_cache(self, keys_values: Tensor) -> Tensor:
        """Return keys and values in the cache's number format.

        A number too large for 8 bits becomes the largest that they hold, not NaN.
        """
        if self.cache_dtype == self.dtype:
            return keys_values
        limit = torch.finfo(self.cache_dtype).max
        return keys_values.clamp(-limit, limit).to(self.cache_dtype)

    # ----------------------------------------------------------------------------------- prefill

    def prefill_self(
        self,
        layer: Layer,
        normed: Tensor,
        start: int,
        cache: Tensor,
        is_visible: Tensor,
    ) -> Tensor:
        """Write C positions ``[pass, C, hidden]`` to a slot's cache; return what they read from it."""
        end = start + normed.shape[1]
        q, k, v = self._split_heads(_linear_each(normed, layer.self_qkv), 3)  # [pass, H, C, D]
        cache[:, :, :, start:end] = self.to_cache(torch.stack([k, v], dim=1))
        keys, values = cache[..., :end, :].to(self.dtype).unbind(1)
        read = _attend_by_torch(q, keys, values, is_visible)
        return _linear_each(_merge_heads(read), layer.self_out)

    def prefill_cross(
        self,
        cross: CrossAttention,
        index: int,
        normed: Tensor,
        text: Segment,
    ) -> Tensor:
        """Return what C positions ``[pass, C, hidden]`` read from one row's text."""
        (q,) = self._split_heads(_linear_each(normed, cross.q), 1)
        read = _attend_by_torch(q, text.keys[index], text.values[index], text.mask)
        return _linear_each(_merge_heads(read), cross.out)

    def _split_heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """Return the parts of ``[pass, C, count * hidden]``, each ``[pass, H, C, D]``."""
        parts = x.view(*x.shape[:2], count, self.head_count, self.head_size)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)


def additive_mask(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return attention's mask ``[N, 1, 1, T]`` for ``[N, T]``: 0 if visible, else -inf."""
    mask = torch.zeros(is_visible.shape, dtype=dtype, device=is_visible.device)
    return mask.masked_fill_(~is_visible, -math.inf)[:, None, None]


def _by_layer(keys_values: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return each layer's keys and each layer's values of ``[L, N, 2, ...]``."""
    keys, values = keys_values.unbind(2)
    return keys.unbind(0), values.unbind(0)


def _select(segment: Segment, x: Tensor) -> Tensor:
    """Return the segment's sequences of ``[N, ...]``."""
    return x if segment.sequences == slice(0, len(x)) else x[segment.sequences]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _NoPlans:
    """Leaves cuDNN's attention out while any thread is in here: it is a setting of the process.

    cuDNN makes a plan for each new shape: 0.5 to 1.8 s for a prefill on an H100, where the prefill
    itself takes 0.03 s. All rows would wait for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._was_on = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._was_on = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                torch.backends.cuda.enable_cudnn_sdp(self._was_on)


no_plans = _NoPlans()


def _attend_by_torch(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def _copyable(numbers: Tensor) -> Tensor:
    """Return a view that torch can copy by index: it cannot do that with numbers of 8 bits."""
    return numbers.view(torch.uint8) if numbers.itemsize == 1 else numbers


def _merge_heads(heads: Tensor) -> Tensor:
    """Return ``[pass, C, hidden]`` for ``[pass, H, C, D]``."""
    return heads.transpose(1, 2).flatten(2)


def _linear_each(x: Tensor, weight: Weight) -> Tensor:
    """Return ``linear`` of ``[pass, C, in]``: ``[pass, C, out]``."""
    flat = x.flatten(0, 1)
    return linear(flat, weight, len(flat)).reshape(*x.shape[:2], -1)
