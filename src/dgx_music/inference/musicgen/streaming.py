"""EnCodec's layers run over a clip in windows; the results are those of the whole clip at once.

Between two windows a clip keeps what its layers still need of their input: an LSTM its state, a
convolution the last numbers that its kernel reaches back to. Nothing is computed twice, and the
memory depends on the length of a window alone. A convolution also reads ahead, so a layer returns
the part of its output that the input so far decides; the rest follows with the next window.

The layers themselves remember nothing, so one set of them serves all clips, and clips whose
``phase`` is the same can go through them together.

Shapes: ``[batch, channel, time]`` everywhere; time may be 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.encodec import modeling_encodec

State: TypeAlias = "Tensor | int | tuple[State, ...] | None"
"""What a clip keeps of one layer, or of several; ``None`` at its beginning. Tensors have the clips
in their first dimension."""


def phase(state: State) -> object:
    """Return what must be the same for states to be joined, hashable."""
    match state:
        case Tensor():
            return state.shape[1:]
        case tuple():
            return tuple(map(phase, state))
    return state


def join(states: Sequence[State]) -> State:
    """Return the state of clips that go on together; their phases must be the same."""
    first = states[0]
    match first:
        case Tensor():
            return torch.cat(cast("list[Tensor]", list(states)))
        case tuple():
            columns = zip(*cast("Sequence[tuple[State, ...]]", states), strict=True)
            return tuple(join(column) for column in columns)
    return first


def split(state: State, count: int) -> list[State]:
    """Return the states of so many clips, each by itself."""
    if count == 1:
        return [state]
    match state:
        case Tensor():
            return [
                own.clone() for own in torch.split(state, 1)
            ]  # else each would hold all of them
        case tuple() if state:
            columns = [split(each, count) for each in state]
            return list(zip(*columns, strict=True))
    return [state] * count


class Layer(Protocol):
    """One layer, or several."""

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        """Take the next part of the input; return the next part of the output, and the new state.

        After the last part the output is complete.
        """


class Chain:
    """Layers one after another."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._layers = [wrap(module) for module in modules]

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        """Take the next part of the input; return the next part of the output, and the new state."""
        states = cast("tuple[State, ...]", state or (None,) * len(self._layers))
        after = []
        for layer, own in zip(self._layers, states, strict=True):
            x, new = layer.step(x, own, is_last=is_last)
            after.append(new)
        return x, tuple(after)


def wrap(module: Any) -> Layer:
    """Return the module of an EnCodec as a layer."""
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

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        return self._module(x), None


class _Recurrent:
    """An LSTM whose input is added to its output. Its state is two tensors ``[batch, layer, C]``."""

    def __init__(self, lstm: nn.LSTM) -> None:
        self._lstm = lstm

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        if not x.shape[-1]:
            return x, state
        x = x.permute(2, 0, 1)  # [time, batch, channel]
        before = cast("tuple[Tensor, ...] | None", state)
        # The module has the layers first.
        before = before and tuple(own.transpose(0, 1).contiguous() for own in before)
        result, after = self._lstm(x, before)
        return (result + x).permute(1, 2, 0), tuple(own.transpose(0, 1) for own in after)


class _Residual:
    """A block whose input is added to its output; the block's output comes later than its input.

    Its state is those of the block and of the shortcut, and what the shortcut has brought and the
    block has not.
    """

    def __init__(self, module: Any) -> None:
        self._block = Chain(module.block)
        self._shortcut = wrap(module.shortcut)

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        block, shortcut, held = cast("tuple[State, State, Tensor | None]", state or (None,) * 3)
        brought, shortcut = self._shortcut.step(x, shortcut, is_last=is_last)
        early = _append(held, brought)
        late, block = self._block.step(x, block, is_last=is_last)
        length = late.shape[-1]
        return early[..., :length] + late, (block, shortcut, early[..., length:].clone())


class _Convolution:
    """A convolution that pads each end of the clip with its mirror image.

    Its state is the input that it still needs, 1 if the beginning was mirrored, and the length of
    the input so far modulo the stride.
    """

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

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        held, is_begun, length = cast("tuple[Tensor | None, int, int]", state or (None, 0, 0))
        length = (length + x.shape[-1]) % self._stride
        x = _append(held, x)
        if not is_begun:
            if is_last:
                return self._whole(x), None
            if x.shape[-1] < self._mirrored_left:
                return self._nothing(x), (x, 0, length)
            x = _mirror(x, self._left, 0)
        if is_last:
            x = _mirror(x, 0, self._right + -length % self._stride)
        made, held = self._convolve(x, 0 if is_last else self._mirrored_right)
        return made, (held, 1, length)

    def _whole(self, x: Tensor) -> Tensor:
        """Return the output of a clip that is there at once, however short."""
        result: Tensor = self._module(x) if x.shape[-1] else self._nothing(x)
        return result

    def _convolve(self, x: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        """Return the output as far as the input goes, but keep that much of the input."""
        length = x.shape[-1]
        count = min((length - self._reach) // self._stride + 1, (length - kept) // self._stride)
        held = x[..., max(0, count) * self._stride :].clone()
        if count <= 0:
            return self._nothing(x), held
        return self._module.conv(x)[..., :count], held

    def _nothing(self, x: Tensor) -> Tensor:
        return x.new_empty(len(x), self._module.conv.out_channels, 0)


class _Transposed:
    """A transposed convolution: several numbers for each of its input, trimmed at both ends.

    Its state is the input that it still needs, and which number comes next of the untrimmed output
    of that.
    """

    def __init__(self, module: Any) -> None:
        self._conv = module.conv
        self._stride: int = module.conv.stride[0]
        self._reach: int = module.conv.kernel_size[0]
        trimmed = self._reach - self._stride
        is_causal = module.causal
        self._right = math.ceil(trimmed * module.trim_right_ratio) if is_causal else trimmed // 2
        self._left = trimmed - self._right
        self._context = math.ceil(self._reach / self._stride) - 1

    def step(self, x: Tensor, state: State, *, is_last: bool) -> tuple[Tensor, State]:
        held, start = cast("tuple[Tensor | None, int]", state or (None, self._left))
        x = _append(held, x)
        length = x.shape[-1]
        if not length:
            return x.new_empty(len(x), self._conv.out_channels, 0), (None, start)
        end = length * self._stride
        if is_last:
            end += self._reach - self._stride - self._right
        end = max(end, start)
        dropped = max(0, length - self._context)
        made: Tensor = self._conv(x)[..., start:end]
        return made, (x[..., dropped:].clone(), end - dropped * self._stride)


def _append(held: Tensor | None, x: Tensor) -> Tensor:
    return x if held is None or not held.shape[-1] else torch.cat([held, x], dim=-1)


def _mirror(x: Tensor, left: int, right: int) -> Tensor:
    return functional.pad(x, (left, right), "reflect") if left or right else x
