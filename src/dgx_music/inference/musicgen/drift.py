"""How far a changed decoder's distributions are from the original ones: Kullback-Leibler, in nats.

Compared are the distributions that tokens are drawn from: guided, over all tokens, at temperature 1,
for each codebook at each of its frames. Both decoders get the same tokens (teacher forcing), so that
a first difference has no consequences. Everything goes through the slots, as every generation does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgx_music.audio.samples import Audio
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.musicgen.batch import Row, delays
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.slots import Slots

MAX_NATS = 0.02
"""The largest mean divergence that fewer bits may cause in any trial row and codebook.

The mean total variation is then at most sqrt(0.02 / 2) = 0.1, by Pinsker's and Jensen's
inequalities: fewer bits change at most one token in ten.
"""
TRIAL_FRAMES = 24
"""How many frames of each trial row the model decodes; these are compared."""
_PROMPTS = ("a calm piano ballad", "fast drum and bass with a heavy synth line")
_NOTES = (261.63, 329.63, 392.0, 523.25, 440.0, 349.23, 293.66, 392.0)  # hertz, a second each
_SAMPLE_RATE = 32_000
_SEED = 2023
_NEVER = -1e9
"""The logit of a token that must not be drawn; finite, as others are a failure to the slots."""


class Trace(NamedTuple):
    """What a decoder made of a row."""

    codes: Tensor  # [K, frame]
    logits: Tensor  # [step, pass, K, V], float32, on the CPU; zeros if the step needed none


def trial_requests(model: str, *, hears_melody: bool) -> list[GenerationRequest]:
    """Return requests that try a model: a prompt, a clip, no prompt, and perhaps a melody."""
    tune = make_tune()
    fields: list[dict[str, Any]] = [
        {"prompt": _PROMPTS[0]},
        {"prompt": _PROMPTS[1], "continuation": tune},
        {"prompt": ""},
    ]
    if hears_melody:
        fields.append({"prompt": _PROMPTS[0], "melody": tune})
    shared: dict[str, Any] = {
        "generation_id": "trial",
        "model": model,
        "duration": 10.0,
        "seed": _SEED,
    }
    return [GenerationRequest(**shared, **own) for own in fields]


def make_tune() -> Audio:
    """Return a few notes that fade: a sine for each."""
    time = np.arange(_SAMPLE_RATE) / _SAMPLE_RATE
    notes = [0.3 * np.exp(-3 * time) * np.sin(2 * np.pi * hertz * time) for hertz in _NOTES]
    return Audio(np.concatenate(notes)[None].astype(np.float32), _SAMPLE_RATE)


def measure_change(decoder: Decoder, rows: list[Row], change: Callable[[], None]) -> float:
    """Change the decoder; return the divergence of the worst codebook of the worst row.

    Measured on the tokens that the decoder draws before the change, averaged over the frames that
    it decodes itself.
    """
    before = [decode(decoder, row) for row in rows]
    change()
    divergences = []
    for row, (codes, logits) in zip(rows, before, strict=True):
        after = decode(decoder, row, codes).logits
        divergences.append(divergence(scores(decoder, row, logits), scores(decoder, row, after)))
    return float(torch.stack(divergences).max())  # NaN if any is


@torch.no_grad()
def decode(decoder: Decoder, row: Row, codes: Tensor | None = None) -> Trace:
    """Return the decoder's trace of the row; teacher-forced if there are codes ``[K, frame]``."""
    watched = _RecordingDecoder(decoder, row, codes)
    slots = Slots(watched, 1, row.step_count)  # type: ignore[arg-type]
    try:
        slots.admit(row)
        while not row.is_done:
            slots.step()
        return Trace(slots.codes(row), watched.logits[: row.step_count].cpu())
    finally:
        slots.close()  # at once: the next cache needs the memory


def scores(decoder: Decoder, row: Row, logits: Tensor) -> Tensor:
    """Return the logits ``[frame, K, V]`` of the frames that the row decodes, with its guidance."""
    conditional, unconditional = logits.unbind(1)  # [step, K, V]
    guided = conditional
    if row.is_guided:
        guided = unconditional + row.sampling.guidance_scale * (conditional - unconditional)
    first, last = row.given_count, row.frame_count
    lags = delays(decoder.codebook_count, decoder.channels)
    own = [guided[first + lag : last + lag, codebook] for codebook, lag in enumerate(lags)]
    return torch.stack(own, dim=1)


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """Return the mean divergence ``[K]`` of logits ``[…, K, V]`` from the exact ones."""
    exact, other = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1).flatten(0, -2).mean(0)


class _RecordingDecoder:
    """A decoder of one row that keeps all logits, and can force which tokens are drawn.

    All its work is on the device, so it also works inside a recorded CUDA graph.
    """

    def __init__(self, decoder: Decoder, row: Row, codes: Tensor | None) -> None:
        self._decoder = decoder
        self._offset = row.offset
        steps = row.step_count + 1  # a launch of several may go past the end
        shape = (decoder.codebook_count, decoder.vocabulary)
        self.logits = torch.zeros(steps, 2, *shape, device=decoder.device)
        self._forced: Tensor | None = None  # [step, K]
        if codes is not None:
            self._forced = _in_steps(decoder, codes, steps).to(decoder.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, tokens: Tensor, positions: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return the logits ``[R, pass, K, V]``; if tokens are forced, they allow only those."""
        logits = self._decoder.forward(tokens, positions, *arguments, **options)
        step = positions - self._offset  # [R], and R is 1
        self.logits[step, : logits.shape[1]] = logits
        if self._forced is None:
            return logits
        drawn = self._forced[step][:, None, :, None].expand(*logits.shape[:-1], 1)
        return torch.full_like(logits, _NEVER).scatter_(-1, drawn, 0.0)


def _in_steps(decoder: Decoder, codes: Tensor, steps: int) -> Tensor:
    """Return the tokens ``[step, K]`` that make the codes ``[K, frame]``; 0 outside the clip."""
    drawn = torch.zeros(steps, len(codes), dtype=torch.long)
    for codebook, lag in enumerate(delays(decoder.codebook_count, decoder.channels)):
        drawn[lag : lag + codes.shape[1], codebook] = codes[codebook]
    return drawn
