"""EnCodec: from samples to codes and back, window by window.

The codes of a stereo model alternate left and right.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.musicgen.launches import borrow_stream
from dgx_music.inference.musicgen.streaming import Chain

WINDOW_SECONDS = 1.0
"""Of audio in one pass. A longer window takes more memory, a shorter one more time."""

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
        self._stream = borrow_stream(self, model.device)

    @property
    def frame_rate(self) -> float:
        """Frames in a second."""
        return self.sample_rate / self.frame_size

    def open_decoder(self) -> CodecStream:
        """Return a stream from codes ``[codebook, frame]`` to samples ``[channel, sample]``."""
        return _Decoding(self._model, self.channels, self._stream)

    def open_encoder(self) -> CodecStream:
        """Return a stream from samples ``[channel, sample]`` to codes ``[codebook, frame]``."""
        return _Encoding(self._model, self.channels, self._stream)

    def decode(self, codes: Tensor) -> CodecWork:
        """Return the work from ``[codebook, frame]`` to samples ``[channel, sample]``."""
        samples = torch.empty(self.channels, codes.shape[1] * self.frame_size)
        return CodecWork(self.open_decoder(), codes, self.window, samples)

    def begin_decoding(self, frame_count: int, hear: HearPart) -> CodecWork:
        """Return the work of ``decode`` for a clip whose codes come window by window.

        ``hear`` gets each part of the samples, and the place of its first one.
        """
        samples = torch.empty(self.channels, frame_count * self.frame_size)
        count = math.ceil(frame_count / self.window)
        return CodecWork(self.open_decoder(), None, self.window, samples, count, hear)

    def encode(self, samples: Tensor) -> CodecWork:
        """Return the work from ``[channel, sample]`` to codes ``[codebook, frame]``."""
        frame_count = math.ceil(samples.shape[1] / self.frame_size)
        codebooks = self.channels * _codebook_count(self._model)
        codes = torch.empty(codebooks, frame_count, dtype=torch.long)
        return CodecWork(self.open_encoder(), samples, self.window * self.frame_size, codes)


class CodecStream(ABC):
    """One clip on its way through the codec, part by part; for one thread at a time."""

    def __init__(self, model: Any, channels: int, stream: torch.cuda.Stream | None) -> None:
        self._model = model
        # On a CPU, two rows in one LSTM take longer than one after the other.
        self._sides = [Chain(self._layers(model)) for _ in range(channels)]
        self._stream = stream

    def step(self, part: Tensor) -> Tensor:
        """Return what is decided by the input so far and was not returned yet, on the CPU."""
        return self._run(part, is_last=False)

    def finish(self, part: Tensor) -> Tensor:
        """Return the rest of the output; ``part``, of any length, is the rest of the input."""
        return self._run(part, is_last=True)

    @torch.no_grad()
    def _run(self, part: Tensor, *, is_last: bool) -> Tensor:
        # A stream of its own: on a GPU it blocks no other work.
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            inputs = self._split(part.to(self._model.device))
            outputs = [
                self._read(side.step(x, is_last=is_last))
                for side, x in zip(self._sides, inputs, strict=True)
            ]
            return torch.stack(outputs, dim=1).flatten(0, 1).cpu()  # [1 or codebook, side, time]

    @abstractmethod
    def _layers(self, model: Any) -> nn.ModuleList:
        """Return the layers of each side."""

    @abstractmethod
    def _split(self, part: Tensor) -> list[Tensor]:
        """Return the layers' input ``[1, channel, time]`` for each side."""

    @abstractmethod
    def _read(self, x: Tensor) -> Tensor:
        """Return the result ``[1 or codebook, time]`` of the layers' output."""


class _Decoding(CodecStream):
    def _layers(self, model: Any) -> nn.ModuleList:
        layers: nn.ModuleList = model.decoder.layers
        return layers

    def _split(self, part: Tensor) -> list[Tensor]:
        count = len(self._sides)
        return [self._model.quantizer.decode(part[side::count, None]) for side in range(count)]

    def _read(self, x: Tensor) -> Tensor:
        return x[0]


class _Encoding(CodecStream):
    def _layers(self, model: Any) -> nn.ModuleList:
        layers: nn.ModuleList = model.encoder.layers
        return layers

    def _split(self, part: Tensor) -> list[Tensor]:
        return list(part[:, None, None])

    def _read(self, x: Tensor) -> Tensor:
        codes: Tensor = self._model.quantizer.encode(x, _bandwidth(self._model))
        return codes[:, 0]


class CodecWork:
    """A whole clip's way through the codec, one window for each step.

    If ``given`` is ``None``, ``count`` windows are pushed one after another.
    """

    def __init__(
        self,
        stream: CodecStream,
        given: Tensor | None,
        window: int,
        result: Tensor,
        count: int = 0,
        hear: HearPart | None = None,
    ) -> None:
        self._stream = stream
        self._parts = deque(() if given is None else torch.split(given, window, dim=1))
        self.left = count or len(self._parts)
        """How many steps are left."""
        self._result = result
        self._hear = hear
        self._end = 0

    @property
    def is_ready(self) -> bool:
        """True if the next window is there."""
        return bool(self._parts)

    def push(self, part: Tensor) -> None:
        """Add the next window, while another thread may do an earlier one."""
        self._parts.append(part)

    def step(self) -> None:
        """Do the next window."""
        part = self._parts.popleft()
        self.left -= 1
        made = self._stream.step(part) if self.left else self._stream.finish(part)
        start, self._end = self._end, self._end + made.shape[1]
        self._result[:, start : self._end] = made
        if self._hear is not None:
            self._hear(made, start)

    def finish(self) -> Tensor:
        """Do all that is left; return the result, on the CPU."""
        while self._parts:
            self.step()
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
