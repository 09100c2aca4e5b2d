"""EnCodec: from samples to codes and back, window by window.

The codes of a stereo model alternate left and right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.musicgen.launches import borrow_stream
from dgx_music.inference.musicgen.streaming import Chain, State, join, phase, split

WINDOW_SECONDS = 1.0
"""Of audio in one pass. A longer window takes more memory, a shorter one more time."""

MOST_TOGETHER = 8
"""Windows in one pass on a GPU, of so many clips.

On an H100, 32 clips of 10 s were whole after 3.58, 1.86, 1.84 and 1.82 s with 1, 8, 16 and 32."""

HearPart = Callable[[Tensor, int], None]


class Codec:
    """A loaded EnCodec, in float32, as ``channels`` mono codecs side by side.

    Raises ``EngineUnavailableError`` if the model must see a whole clip before its first number.
    """

    def __init__(self, model: Any, channels: int) -> None:
        _check(model.config)
        _fix_weights(model)
        self._model = model
        self.channels = channels
        self.sample_rate: int = model.config.sampling_rate
        self.frame_size: int = model.config.hop_length
        """Samples in a frame."""
        self.window = round(WINDOW_SECONDS * self.frame_rate)
        """Frames in one pass."""
        stream = borrow_stream(self, model.device)
        self._decoding = _Decoding(model, channels, stream)
        self._encoding = _Encoding(model, channels, stream)

    @property
    def frame_rate(self) -> float:
        """Frames in a second."""
        return self.sample_rate / self.frame_size

    @property
    def most_together(self) -> int:
        """So many clips may do a window together; on a CPU that would take longer."""
        return 1 if self._model.device.type == "cpu" else MOST_TOGETHER

    def decode(self, codes: Tensor) -> CodecWork:
        """Return the work from ``[codebook, frame]`` to samples ``[channel, sample]``."""
        work = self.begin_decoding(codes.shape[1])
        for window in torch.split(codes, self.window, dim=1):
            work.push(window)
        return work

    def begin_decoding(self, frame_count: int, hear: HearPart | None = None) -> CodecWork:
        """Return the work of ``decode`` for a clip whose codes are pushed window by window.

        ``hear`` gets each part of the samples, and the place of its first one.
        """
        samples = torch.empty(self.channels, frame_count * self.frame_size)
        count = math.ceil(frame_count / self.window)
        return CodecWork(self._decoding, count, samples, hear)

    def encode(self, samples: Tensor) -> CodecWork:
        """Return the work from ``[channel, sample]`` to codes ``[codebook, frame]``."""
        frame_count = math.ceil(samples.shape[1] / self.frame_size)
        codebooks = self.channels * _codebook_count(self._model)
        codes = torch.empty(codebooks, frame_count, dtype=torch.long)
        windows = torch.split(samples, self.window * self.frame_size, dim=1)
        work = CodecWork(self._encoding, len(windows), codes)
        for window in windows:
            work.push(window)
        return work


class Direction(ABC):
    """One way through the codec, for one thread at a time. It keeps nothing of a clip."""

    def __init__(self, model: Any, channels: int, stream: torch.cuda.Stream | None) -> None:
        self._model = model
        self._channels = channels
        self._chain = Chain(self._layers(model))
        self._stream = stream
        self._sides_at_once = 1 if model.device.type == "cpu" else None
        """On a CPU, two rows in one LSTM take longer than one after the other."""

    def begin(self) -> list[State]:
        """Return the states of a clip at its beginning, one for each channel."""
        return [None] * self._channels

    @torch.no_grad()
    def step(
        self, parts: Sequence[Tensor], states: Sequence[list[State]], *, is_last: bool
    ) -> tuple[Tensor, list[list[State]]]:
        """Return what is decided by the clips' parts so far, on the CPU, and the new states.

        The parts are of one length, the states of one phase.
        """
        # A stream of its own: on a GPU it blocks no other work.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            sides = self._split(torch.stack(list(parts)).to(self._model.device))
            before = [state for own in states for state in own]
            made, after = self._run(sides, before, is_last=is_last)
            count = self._channels
            each = [after[start : start + count] for start in range(0, len(after), count)]
            return self._gather(made).cpu(), each

    def _run(self, x: Tensor, states: list[State], *, is_last: bool) -> tuple[Tensor, list[State]]:
        made, after = [], []
        at_once = self._sides_at_once or len(x)
        for start in range(0, len(x), at_once):
            rows = slice(start, start + at_once)
            part, state = self._chain.step(x[rows], join(states[rows]), is_last=is_last)
            made.append(part)
            after += split(state, len(part))
        return torch.cat(made), after

    @abstractmethod
    def _layers(self, model: Any) -> nn.ModuleList:
        """Return the layers of one channel."""

    @abstractmethod
    def _split(self, parts: Tensor) -> Tensor:
        """Return the layers' input ``[clip * channel, feature, time]`` for the clips' parts."""

    @abstractmethod
    def _gather(self, x: Tensor) -> Tensor:
        """Return the clips' results ``[clip, channel or codebook, time]`` of the layers' output."""


class _Decoding(Direction):
    def _layers(self, model: Any) -> nn.ModuleList:
        layers: nn.ModuleList = model.decoder.layers
        return layers

    def _split(self, parts: Tensor) -> Tensor:
        # A level's codebooks alternate between the channels: [clip, level, channel, frame].
        codes = parts.view(len(parts), -1, self._channels, parts.shape[-1]).transpose(0, 1)
        features: Tensor = self._model.quantizer.decode(codes.flatten(1, 2))
        return features

    def _gather(self, x: Tensor) -> Tensor:
        return x.view(-1, self._channels, x.shape[-1])


class _Encoding(Direction):
    def _layers(self, model: Any) -> nn.ModuleList:
        layers: nn.ModuleList = model.encoder.layers
        return layers

    def _split(self, parts: Tensor) -> Tensor:
        return parts.flatten(0, 1)[:, None]

    def _gather(self, x: Tensor) -> Tensor:
        codes: Tensor = self._model.quantizer.encode(x, _bandwidth(self._model))
        # [level, clip * channel, frame]
        by_clip = codes.view(len(codes), -1, self._channels, codes.shape[-1]).transpose(0, 1)
        return by_clip.flatten(1, 2)


class CodecWork:
    """A whole clip's way through the codec, in ``count`` windows that are pushed one by one."""

    def __init__(
        self, direction: Direction, count: int, result: Tensor, hear: HearPart | None = None
    ) -> None:
        self._direction = direction
        self._states = direction.begin()
        self._phase = phase(self._states[0])
        self._parts: deque[Tensor] = deque()
        self.left = count
        """How many windows are left."""
        self._result = result
        self._hear = hear
        self._end = 0

    @property
    def is_ready(self) -> bool:
        """True if the next window is there."""
        return bool(self._parts)

    @property
    def phase(self) -> Hashable:
        """Works of the same phase can do their next windows together."""
        is_last = self.left == 1
        return self._direction, is_last, self._parts[0].shape, self._phase

    def push(self, part: Tensor) -> None:
        """Add the next window, while another thread may do an earlier one."""
        self._parts.append(part)

    def step(self, *others: CodecWork) -> list[Tensor]:
        """Do the next window, and those of others in the same phase; return what each made.

        If it fails, nothing has changed.
        """
        works = (self, *others)
        made, states = self._direction.step(
            [work._parts[0] for work in works],
            [work._states for work in works],
            is_last=self.left == 1,
        )
        for work, own in zip(works, states, strict=True):
            work._states, work._phase = own, phase(own[0])
            work._parts.popleft()
            work.left -= 1
        return list(made)

    def take(self, made: Tensor) -> None:
        """Put what a step made into the result, and hand it to whoever listens."""
        start, self._end = self._end, self._end + made.shape[1]
        self._result[:, start : self._end] = made
        if self._hear is not None:
            self._hear(made, start)

    def finish(self) -> Tensor:
        """Do all that is left; return the result, on the CPU."""
        while self._parts:
            self.take(*self.step())
        return self._result


def _check(config: Any) -> None:
    """Refuse a codec whose numbers depend on the whole clip, or on its chunks."""
    if (
        config.normalize
        or config.chunk_length_s is not None
        or config.norm_type != "weight_norm"
        or config.pad_mode != "reflect"
    ):
        raise EngineUnavailableError(
            "The model's codec reads a clip as a whole or in chunks of its own (normalize, "
            "chunk_length_s, norm_type or pad_mode in its configuration), which this engine cannot "
            "do; use a model with MusicGen's own codec."
        )


def _fix_weights(model: nn.Module) -> None:
    """Compute the normalised weights once; else each call of a convolution would do it again."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")


def _bandwidth(model: Any) -> float:
    bandwidth: float = model.config.target_bandwidths[0]
    return bandwidth


def _codebook_count(model: Any) -> int:
    count: int = model.quantizer.get_num_quantizers_for_bandwidth(_bandwidth(model))
    return count
