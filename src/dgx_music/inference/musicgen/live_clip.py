"""A clip whose audio is made while its codes are still being decoded, and is handed out at once."""

from __future__ import annotations

from concurrent.futures import Future

import torch
from torch import Tensor

from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineError
from dgx_music.inference.engine import Run
from dgx_music.inference.musicgen.codec import Codec
from dgx_music.inference.musicgen.codec_thread import CodecThread


class LiveClip:
    """One clip: takes codes window by window, and gives its audio to those who listen.

    The windows are those of ``Codec.decode``, so the samples are the same as without listeners.
    """

    def __init__(
        self, codec: Codec, thread: CodecThread, frame_count: int, sample_count: int, run: Run
    ) -> None:
        self._sample_count = sample_count
        self._sample_rate = codec.sample_rate
        self._run = run
        self._window = codec.window
        self._thread = thread
        self._clip = thread.open(codec.begin_decoding(frame_count, self._hand_out))
        self.frame_count = frame_count
        self.next_start = 0
        """The frame at which the next window begins."""

    @property
    def result(self) -> Future[Tensor]:
        """What will be all samples ``[channel, sample]``; a cancel ends the work."""
        return self._clip.result

    @property
    def next_end(self) -> int:
        """The frame at which the next window ends."""
        return min(self.next_start + self._window, self.frame_count)

    def push(self, codes: Tensor) -> None:
        """Take the codes ``[codebook, frame]`` of the next window; returns at once.

        Raises what an earlier window has failed with: no more steps are made for it.
        """
        if self.result.done():
            self.result.result()
        self.next_start = self.next_end
        self._thread.push(self._clip, codes)

    def push_rest(self, codes: Tensor) -> None:
        """Take those of the clip's codes ``[codebook, frame]`` that are still missing."""
        while self.next_start < self.frame_count:
            self.push(codes[:, self.next_start : self.next_end])

    def seen_after(self, before: Tensor) -> _SeenAfter:
        """Return it for a row that begins after these codes ``[codebook, frame]`` of the clip.

        Takes the windows that end in them: the row does not have their frames.
        """
        while self.next_end <= before.shape[1]:
            self.push(before[:, self.next_start : self.next_end])
        return _SeenAfter(self, before)

    def _hand_out(self, made: Tensor, start: int) -> None:
        samples = made[:, : max(0, self._sample_count - start)]
        check_finite(samples)
        if samples.shape[1]:
            self._run.hand_out(Audio(samples.numpy(), self._sample_rate), start)


class _SeenAfter:
    """A clip as a row sees it that decodes a part of the clip."""

    def __init__(self, clip: LiveClip, before: Tensor) -> None:
        self._clip = clip
        self._before = before

    @property
    def next_start(self) -> int:
        """The row's frame at which the next window begins; 0 if that is before the row."""
        return max(0, self._clip.next_start - self._before.shape[1])

    @property
    def next_end(self) -> int:
        """The row's frame at which the next window ends."""
        return self._clip.next_end - self._before.shape[1]

    def push(self, codes: Tensor) -> None:
        """Take the codes of the next window, or of its part that is in the row."""
        earlier = self._before[:, self._clip.next_start :]
        self._clip.push(torch.cat([earlier, codes], dim=1))


def check_finite(samples: Tensor) -> None:
    """Raise ``EngineError`` if a sample is not finite."""
    if not torch.isfinite(samples).all():
        raise EngineError("The codec's samples are not finite; its weights may be damaged.")
