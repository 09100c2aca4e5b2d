"""EnCodec's layers run over a clip in windows; the results are those of the whole clip at once.

Each layer keeps what it still needs of its input: an LSTM its state, a convolution the last numbers
that its kernel reaches back to. Nothing is computed twice, and the memory depends on the length of
a window alone. A convolution also reads ahead, so a layer returns the part of its output that the
input so far decides; the rest follows with the next window.

Shapes: ``[batch, channel, time]`` everywhere; time may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.encodec import modeling_encodec


class Layer(Protocol):
    """One layer, or several, at work on one clip."""

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        """Take the next part of the input; return the next part of the output.

        After the last part the output is complete.
        """


class Chain:
    """Layers one after another."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layers = [open_layer(module) for module in modules]

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        """Take the next part of the input; return the next part of the output."""
        for layer in self._layers:
            x = layer.step(x, is_last=is_last)
        return x


def open_layer(module: Any) -> Layer:
    """Return the module of an EnCodec, ready for the beginning of a clip."""
    match module:
        case modeling_encodec.EncodecConv1d():
            return _Convolution(module)
        case modeling_encodec.EncodecConvTranspose1d():
            return _Transposed(module)
        case modeling_encodec.EncodecLSTM():
            return _Recurrent(module.lstm)
        case modeling_encodec.EncodecResnetBlock():
            return _Residual(module)
    return _Pointwise(module)


class _Pointwise:
    """A layer that reads each number by itself."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        result: Tensor = self._module(x)
        return result


class _Recurrent:
    """An LSTM whose input is added to its output."""

    def __init__(self, lstm: nn.LSTM) -> None:
        self._lstm = lstm
        self._state: tuple[Tensor, Tensor] | None = None

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        if not x.shape[-1]:
            return x
        x = x.permute(2, 0, 1)  # [time, batch, channel]
        result: Tensor
        result, self._state = self._lstm(x, self._state)
        return (result + x).permute(1, 2, 0)


class _Residual:
    """A block whose input is added to its output; the block's output comes later than its input."""

    def __init__(self, module: Any) -> None:
        self._block = Chain(module.block)
        self._shortcut = open_layer(module.shortcut)
        self._early: Tensor | None = None
        """What the shortcut has brought and the block has not."""

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        early = _join(self._early, self._shortcut.step(x, is_last=is_last))
        late = self._block.step(x, is_last=is_last)
        self._early = early[..., late.shape[-1] :].clone()
        return early[..., : late.shape[-1]] + late


class _Convolution:
    """A convolution that pads each end of the clip with its mirror image."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._stride: int = module.conv.stride[0]
        self._reach = (module.conv.kernel_size[0] - 1) * module.conv.dilation[0] + 1
        padding = self._reach - self._stride
        self._right = 0 if module.causal else padding // 2
        self._left = padding - self._right
        most_right = self._right + self._stride - 1
        self._mirrored_left = max(self._left, most_right) + 1
        """So much input must be there before either end can be mirrored."""
        self._mirrored_right = most_right + 1 if most_right else 0
        """So much input must be kept, because the clip may end at any time."""
        self._is_begun = False
        self._length = 0
        self._held: Tensor | None = None

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        self._length += x.shape[-1]
        x = _join(self._held, x)
        if not self._is_begun:
            if is_last:
                return self._whole(x)
            if x.shape[-1] < self._mirrored_left:
                self._held = x
                return self._nothing(x)
            x = _mirror(x, self._left, 0)
            self._is_begun = True
        if is_last:
            x = _mirror(x, 0, self._right + -self._length % self._stride)
        return self._convolve(x, 0 if is_last else self._mirrored_right)

    def _whole(self, x: Tensor) -> Tensor:
        """Return the output of a clip that is there at once, however short."""
        result: Tensor = self._module(x) if x.shape[-1] else self._nothing(x)
        return result

    def _convolve(self, x: Tensor, kept: int) -> Tensor:
        """Return the output as far as the input goes, but keep that much of the input."""
        length = x.shape[-1]
        count = min((length - self._reach) // self._stride + 1, (length - kept) // self._stride)
        self._held = x[..., max(0, count) * self._stride :].clone()
        if count <= 0:
            return self._nothing(x)
        result: Tensor = self._module.conv(x)[..., :count]
        return result

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), self._module.conv.out_channels, 0)


class _Transposed:
    """A transposed convolution: several numbers for each of its input, trimmed at both ends."""

    def __init__(self, module: Any) -> None:
        self._conv = module.conv
        self._stride: int = module.conv.stride[0]
        self._reach: int = module.conv.kernel_size[0]
        trimmed = self._reach - self._stride
        is_causal = module.causal
        self._right = math.ceil(trimmed * module.trim_right_ratio) if is_causal else trimmed // 2
        self._context = math.ceil(self._reach / self._stride) - 1
        self._count = 0
        """Of the input so far."""
        self._next = trimmed - self._right
        """Which number of the untrimmed output comes next."""
        self._held: Tensor | None = None

    def step(self, x: Tensor, *, is_last: bool) -> Tensor:
        self._count += x.shape[-1]
        x = _join(self._held, x)
        if not x.shape[-1]:
            return x.new_empty(len(x), self._conv.out_channels, 0)
        start = (self._count - x.shape[-1]) * self._stride  # of the output that x takes part in
        end = self._count * self._stride
        if is_last:
            end += self._reach - self._stride - self._right
        self._held = x[..., max(0, x.shape[-1] - self._context) :].clone()
        result: Tensor = self._conv(x)[..., self._next - start : max(end, self._next) - start]
        self._next = max(end, self._next)
        return result


def _join(held: Tensor | None, x: Tensor) -> Tensor:
    return x if held is None or not held.shape[-1] else torch.cat([held, x], dim=-1)


def _mirror(x: Tensor, left: int, right: int) -> Tensor:
    return functional.pad(x, (left, right), "reflect") if left or right else x
