"""EnCodec: from samples to codes and back. The codes of a stereo model alternate left and right."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dgx_music.inference.musicgen.launches import borrow_stream


class Codec:
    """A loaded EnCodec, in float32, as ``channels`` mono codecs side by side."""

    def __init__(self, model: Any, channels: int) -> None:
        self._model = model
        self.channels = channels
        self.sample_rate: int = model.config.sampling_rate
        self.frame_size: int = model.config.hop_length
        """Samples in a frame."""
        self._stream = borrow_stream(self, model.device)

    @property
    def frame_rate(self) -> float:
        """Frames in a second."""
        return self.sample_rate / self.frame_size

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the samples ``[channel, sample]`` of ``[codebook, frame]``, both on the CPU."""
        with self._on_own_stream():
            codes = codes.to(self._model.device)
            sides = [codes[None, None, side :: self.channels] for side in range(self.channels)]
            decoded = [self._model.decode(side, [None]).audio_values[0] for side in sides]
            return torch.cat(decoded).cpu()

    @torch.no_grad()
    def encode(self, samples: Tensor) -> Tensor:
        """Return the codes ``[codebook, frame]`` of ``[channel, sample]``, both on the CPU."""
        with self._on_own_stream():
            samples = samples[:, None].to(self._model.device)
            sides: Tensor = self._model.encode(samples).audio_codes[0]  # [channel, codebook, frame]
            return sides.transpose(0, 1).flatten(0, 1).cpu()

    def _on_own_stream(self) -> AbstractContextManager[object]:
        """Return a context whose work on a GPU blocks no other work there."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
