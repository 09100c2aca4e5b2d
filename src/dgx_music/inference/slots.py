"""The slots: many generations share every forward pass, and each joins and leaves when it likes.

One generation is a row. Its way through this file::

    admit   its prompt's keys and values and its random numbers take the next slot, at position 0
    step    one forward pass for all rows: each reads its own last tokens at its own position
    sample  the next tokens, with each row's own guidance, temperature, top_k and top_p
    retire  after frames + longest delay steps the codes are whole; the last row moves into the slot

MusicGen has no end token, so the number of steps is known at admission: the host counts, and never asks the device.
Nothing a row's tokens depend on comes from its neighbours, so cancelling one, or admitting another, changes no other.

Shapes: R rows in the first R of S slots, halves 2 where any row is guided (conditional, null) and else 1; K codebooks of V
tokens; T positions. Codebook k is ``delay[k]`` steps late (Copet et al. 2023, "Simple and Controllable Music
Generation", section 2.2): position p predicts its frame p - delay[k].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dgx_music.errors import EngineError
from dgx_music.inference.decoder import Decoder, stack_texts

_COLDEST = 1e-4
"""Below this temperature the likeliest token is certain, and logits divided by it may overflow: decode greedily."""


@dataclass(eq=False, kw_only=True)
class Row:
    """One generation on its way; ``position`` is how many steps it has made."""

    text: Tensor  # [L, 2, H, X, D], cross-attention's keys and values
    uniforms: Tensor  # [step, K], in [0, 1), drawn from the request's own seed
    frame_count: int
    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 250
    top_p: float | None = None
    position: int = 0

    @property
    def step_count(self) -> int:
        """How many steps the row takes: its frames and the longest delay."""
        return len(self.uniforms)

    @property
    def is_done(self) -> bool:
        """True where all steps are made."""
        return self.position >= self.step_count


@dataclass(frozen=True)
class Sampling:
    """How to sample each row, ``[R, 1, 1]`` each; ``halves`` and ``widest`` (the largest top_k) are for all."""

    guidance_scale: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    halves: int
    widest: int

    @classmethod
    def of(cls, rows: list[Row], vocabulary: int, device: torch.device) -> Sampling:
        """Return the rows' sampling; greedy is a top_k of 1, and a top_k of 0 takes all tokens."""
        is_greedy = [row.temperature < _COLDEST for row in rows]
        top_k = [1 if cold else row.top_k or vocabulary for row, cold in zip(rows, is_greedy, strict=True)]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None, None]

        return cls(
            guidance_scale=column([row.guidance_scale for row in rows]),
            temperature=column([1.0 if cold else row.temperature for row, cold in zip(rows, is_greedy, strict=True)]),
            top_k=column([float(k) for k in top_k]),
            top_p=column([math.inf if row.top_p is None or row.top_p == 1 else row.top_p for row in rows]),
            halves=2 if any(row.guidance_scale > 1 for row in rows) else 1,
            widest=min(max(top_k), vocabulary),
        )


class Slots:
    """A fixed number of slots on one device. Not for several threads at once."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, slot_count: int) -> None:
        device, codebooks, steps = decoder.device, decoder.codebook_count, decoder.max_steps
        self.rows: list[Row] = []
        """The occupied slots, always the first ones."""
        self.slot_count = slot_count
        self._decoder = decoder
        self._delays = delays(codebooks, decoder.channels)
        self._delay = torch.tensor(self._delays, device=device)  # [K]
        self._cache = decoder.empty_cache(slot_count)  # [L, S, half, 2, H, T, D]
        self._tokens = torch.full((slot_count, steps + 1, codebooks), decoder.pad_token, device=device)
        self._uniforms = torch.zeros(slot_count, steps, codebooks, device=device)
        self._is_finite = torch.ones(slot_count, dtype=torch.bool, device=device)
        self._slot = torch.arange(slot_count, device=device)

    @property
    def has_room(self) -> bool:
        """True while a slot is free."""
        return len(self.rows) < self.slot_count

    @torch.inference_mode()
    def admit(self, row: Row) -> None:
        """Give the row the next free slot. What another row left in its cache is masked, so nothing is cleared."""
        slot = len(self.rows)
        self._clean(slot)
        self._tokens[slot, 0] = self._decoder.pad_token
        self._uniforms[slot, : row.step_count] = row.uniforms
        self._is_finite[slot] = True
        self._gather([*self.rows, row])

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every row by one position."""
        rows, positions = self.rows, self._positions
        furthest, nearest = max(row.position for row in rows), min(row.position for row in rows)
        slot = self._slot[: len(rows)]
        logits = self._decoder.forward(
            self._tokens[slot, positions],  # [R, K]
            positions,
            self._cache,
            self._text,
            halves=self._sampling.halves,
            filled=furthest + 1,
            is_ragged=furthest > nearest,
        )
        sampled, is_finite = sample(logits, self._uniforms[slot, positions], self._sampling)
        frame = positions[:, None] - self._delay  # [R, K]
        is_in_clip = (frame >= 0) & (frame < self._frame_counts[:, None])
        self._tokens[slot, positions + 1] = torch.where(is_in_clip, sampled, self._decoder.pad_token)
        self._is_finite[slot] &= is_finite
        positions += 1
        for row in rows:
            row.position += 1

    @torch.inference_mode()
    def codes(self, row: Row) -> Tensor:
        """Return the codes ``[K, frame]`` of a row that is done. Raises ``EngineError`` where a number was not finite."""
        slot = self.rows.index(row)
        if not self._is_finite[slot]:
            raise EngineError("The model's numbers are not finite; try DGX_MUSIC_DTYPE=float32, or else other weights.")
        tokens = self._tokens[slot, 1 : row.step_count + 1]  # [step, K]
        codes = [tokens[delay : delay + row.frame_count, k] for k, delay in enumerate(self._delays)]
        return torch.stack(codes)  # a copy: the slot has its next row soon

    @torch.inference_mode()
    def retire(self, row: Row) -> None:
        """Free the slot of a row that is done or given up; the last row moves into it, to keep the batch dense."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        mover = self.rows[last]
        if mover is not row:
            self._clean(slot)
            self._cache[:, slot, ..., : mover.position, :] = self._cache[:, last, ..., : mover.position, :]
            for state in (self._tokens, self._uniforms, self._is_finite):
                state[slot] = state[last]
        self._gather([mover if other is row else other for other in self.rows[:last]])

    def _clean(self, slot: int) -> None:
        """Clear the slot's cache if it may hold NaN: what is masked is still multiplied by 0, which leaves NaN."""
        if not self._is_finite[slot]:
            self._cache[:, slot] = 0

    def _gather(self, rows: list[Row]) -> None:
        """Make these the rows, with what every step needs of them side by side; where that fails, nothing changes."""
        if rows:
            device = self._decoder.device
            self._text, self._sampling, self._positions, self._frame_counts = (
                stack_texts([row.text for row in rows]),
                Sampling.of(rows, self._decoder.vocabulary, device),
                torch.tensor([row.position for row in rows], device=device),  # [R]
                torch.tensor([row.frame_count for row in rows], device=device),  # [R]
            )
        self.rows = rows


def delays(codebook_count: int, channels: int) -> list[int]:
    """Return how many steps late each codebook is; a stereo model's alternate between left and right."""
    return [codebook // channels for codebook in range(codebook_count)]


def sample(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the next tokens ``[R, K]`` for ``[R, half, K, V]``, and whether each row's scores are finite ``[R]``.

    Guidance is that of Ho and Salimans 2022, null + scale * (conditional - null). Then the inverse of the cumulative
    distribution over the sorted top_k, cut at top_p, is read at the uniforms ``[R, K]``: one number decides one token,
    whoever else is in the batch.
    """
    scores = logits[:, 0]  # [R, K, V]
    if sampling.halves == 2:
        guided = logits[:, 1] + (scores - logits[:, 1]) * sampling.guidance_scale
        scores = torch.where(sampling.guidance_scale > 1, guided, scores)
    top, tokens = scores.topk(sampling.widest)  # [R, K, widest], from the likeliest on
    is_out = torch.arange(sampling.widest, device=top.device) >= sampling.top_k
    probabilities = (top / sampling.temperature).masked_fill(is_out, -math.inf).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    is_kept = cumulative - probabilities < sampling.top_p  # the likeliest, until they add up to top_p
    total = cumulative.masked_fill(~is_kept, 0).amax(-1, keepdim=True)
    rank = (cumulative <= uniforms[..., None] * total).sum(-1, keepdim=True)  # [R, K, 1]
    return tokens.gather(-1, rank).squeeze(-1), top[..., 0].isfinite().all(-1)
