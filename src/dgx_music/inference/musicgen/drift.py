"""How far a changed decoder's distributions are from what they were, by Kullback-Leibler divergence, in nats.

What is compared is what tokens are drawn from: the guided distribution over all tokens, at temperature 1, of each codebook
at each of its frames. Both times the same tokens are fed, so that the decoders differ in their numbers alone, and not in
what became of a first difference. All of it goes through the slots, as every generation does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgx_music.audio.samples import Audio
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.slots import Row, Slots, delays

MOST_NATS = 0.02
"""What fewer bits may cost on average in any one passage and codebook.

The mean total variation is then at most sqrt(0.02 / 2) = 0.1, by Pinsker's and Jensen's inequalities: no more than one
token in ten would have been drawn otherwise.
"""
TRIAL_FRAMES = 24
"""So many frames of each passage are the model's own, and are compared."""
_PROMPTS = ("a calm piano ballad", "fast drum and bass with a heavy synth line")
_NOTES = (261.63, 329.63, 392.0, 523.25, 440.0, 349.23, 293.66, 392.0)  # hertz, a second each
_SAMPLE_RATE = 32_000
_SEED = 2023
_NEVER = -1e9
"""The logit of a token that is not to be drawn; finite, as the slots take anything else for a failure."""


class Passage(NamedTuple):
    """What came of a row."""

    codes: Tensor  # [K, frame]
    logits: Tensor  # [step, half, K, V], float32, on the CPU; zeros where none were needed


def trial_requests(model: str, *, hears_melody: bool) -> list[GenerationRequest]:
    """Return what a model is tried with: prompts, none, a past of eight seconds, and a melody where it hears one."""
    tune = make_tune()
    asked: list[dict[str, Any]] = [
        {"prompt": _PROMPTS[0]},
        {"prompt": _PROMPTS[1], "continuation": tune},
        {"prompt": ""},
    ]
    if hears_melody:
        asked.append({"prompt": _PROMPTS[0], "melody": tune})
    return [GenerationRequest(generation_id="trial", model=model, duration=10.0, seed=_SEED, **each) for each in asked]


def make_tune() -> Audio:
    """Return a few notes that fade, a sine each."""
    time = np.arange(_SAMPLE_RATE) / _SAMPLE_RATE
    notes = [0.3 * np.exp(-3 * time) * np.sin(2 * np.pi * hertz * time) for hertz in _NOTES]
    return Audio(np.concatenate(notes)[None].astype(np.float32), _SAMPLE_RATE)


def measure_change(decoder: Decoder, rows: list[Row], change: Callable[[], None]) -> float:
    """Change the decoder, and return the divergence from what it was, of the worst codebook of the worst row.

    Measured on what the decoder makes of the rows before the change, on average over the frames that they were not given.
    """
    before = [decode(decoder, row) for row in rows]
    change()
    divergences = []
    for row, (codes, logits) in zip(rows, before, strict=True):
        after = decode(decoder, row, codes).logits
        divergences.append(divergence(scores(decoder, row, logits), scores(decoder, row, after)))
    return float(torch.stack(divergences).max())  # NaN where any is


@torch.no_grad()
def decode(decoder: Decoder, row: Row, codes: Tensor | None = None) -> Passage:
    """Return what the decoder makes of the row; or else these codes, whatever it would have drawn (teacher-forced)."""
    watched = _Watched(decoder, row, codes)
    slots = Slots(watched, 1, row.step_count)  # type: ignore[arg-type]
    try:
        slots.admit(row)
        while not row.is_done:
            slots.step()
        return Passage(slots.codes(row), watched.logits[: row.step_count].cpu())
    finally:
        slots.close()  # the next one's cache, and the measuring of what is free, come soon


def scores(decoder: Decoder, row: Row, logits: Tensor) -> Tensor:
    """Return what the row's own frames are drawn from, ``[frame, K, V]``: guided where the row is, and nothing cut off."""
    conditional, null = logits.unbind(1)  # [step, K, V]
    drawn_from = conditional
    if row.guidance_scale > 1:
        drawn_from = null + row.guidance_scale * (conditional - null)
    given = 0 if row.given is None else row.given.shape[1]
    lags = delays(decoder.codebook_count, decoder.channels)
    own = [drawn_from[given + lag : row.frame_count + lag, codebook] for codebook, lag in enumerate(lags)]
    return torch.stack(own, dim=1)


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """Return the divergence ``[K]`` of logits ``[…, K, V]`` from the exact ones, averaged over all else."""
    exact, other = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return (exact.exp() * (exact - other)).sum(-1).flatten(0, -2).mean(0)


class _Watched:
    """A decoder of one row that keeps all its logits, and may be told what is to be drawn from them.

    All on the device, by position: where a launch is recorded and replayed, this is as well.
    """

    def __init__(self, decoder: Decoder, row: Row, codes: Tensor | None) -> None:
        self._decoder = decoder
        self._offset = row.offset
        steps = row.step_count + 1  # a launch of several may go past the end
        shape = (decoder.codebook_count, decoder.vocabulary)
        self.logits = torch.zeros(steps, 2, *shape, device=decoder.device)
        self._forced = None if codes is None else _in_steps(decoder, codes, steps).to(decoder.device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, tokens: Tensor, positions: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """Return the logits ``[R, half, K, V]``, or such that leave no choice."""
        logits = self._decoder.forward(tokens, positions, *arguments, **options)
        step = positions - self._offset  # [R], and R is 1
        self.logits[step, : logits.shape[1]] = logits
        if self._forced is None:
            return logits
        drawn = self._forced[step][:, None, :, None].expand(*logits.shape[:-1], 1)
        return torch.full_like(logits, _NEVER).scatter_(-1, drawn, 0.0)


def _in_steps(decoder: Decoder, codes: Tensor, steps: int) -> Tensor:
    """Return what is drawn at each step, ``[step, K]``, for codes ``[K, frame]``; any token where that is of no use."""
    drawn = torch.zeros(steps, len(codes), dtype=torch.long)
    for codebook, lag in enumerate(delays(decoder.codebook_count, decoder.channels)):
        drawn[lag : lag + codes.shape[1], codebook] = codes[codebook]
    return drawn
