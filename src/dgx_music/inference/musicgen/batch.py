"""What a batch consists of: rows on the host, and the state of every slot on the device.

Shapes: S slots; K codebooks; P frames given in advance. Codebook k is ``delays[k]`` steps late
(Copet et al. 2023, "Simple and Controllable Music Generation", section 2.2): position p predicts
its frame p - delays[k].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dgx_music.inference.musicgen.launches import TEXT_STEP, round_up
from dgx_music.sampling import Sampling


@dataclass(eq=False, kw_only=True)
class Row:
    """One generation under way."""

    uniforms: Tensor  # [step, K], in [0, 1), drawn from the request's own seed
    frame_count: int
    sampling: Sampling
    text: Tensor | None = None  # [L, 2, H, X, D], cross-attention's keys and values; None: no text
    negative: Tensor | None = None  # the same for the unconditional pass
    prefix: Tensor | None = None  # [pass, E, hidden], what a melody model reads before the tokens
    given: Tensor | None = None  # [K, P], the codes of the first P frames, P < frame_count
    position: int = 0
    """How many steps are done, those given in advance included."""

    @property
    def step_count(self) -> int:
        """How many steps the row takes: its frames plus the longest delay."""
        return len(self.uniforms)

    @property
    def is_done(self) -> bool:
        """True if all steps are done."""
        return self.position >= self.step_count

    @property
    def is_guided(self) -> bool:
        """True if the row needs the unconditional pass as well."""
        return self.sampling.guidance_scale > 1

    @property
    def given_count(self) -> int:
        """How many frames were given in advance."""
        return 0 if self.given is None else self.given.shape[1]

    @property
    def offset(self) -> int:
        """The place of position 0 in the cache: after the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[1]

    @property
    def texts(self) -> tuple[Tensor | None, Tensor | None]:
        """What the conditional and the unconditional pass read."""
        return self.text, self.negative if self.is_guided else None

    @property
    def text_passes(self) -> int:
        """How many passes read a text: 0, 1 or 2."""
        text, negative = self.texts
        return 2 if negative is not None else int(text is not None)

    @property
    def text_length(self) -> int:
        """How many tokens the passes read, masked ones included.

        Rounded up, so that rows can share a call.
        """
        lengths = (round_up(text.shape[-2], TEXT_STEP) for text in self.texts if text is not None)
        return max(lengths, default=TEXT_STEP)


class BatchState(NamedTuple):
    """What the device knows of each slot; the addresses never change, the contents do."""

    tokens: Tensor  # [S, step + 1, K], what to feed at each position; the last place is a dump
    uniforms: Tensor  # [S, step, K]
    position: Tensor  # [S]
    offset: Tensor  # [S]
    frame_count: Tensor  # [S]
    given_count: Tensor  # [S], frames whose codes were given in advance
    is_finite: Tensor  # [S]

    @classmethod
    def empty(
        cls,
        slot_count: int,
        max_steps: int,
        codebook_count: int,
        pad_token: int,
        device: torch.device,
    ) -> BatchState:
        """Return the state of slots that no row has used yet."""
        return cls(
            tokens=torch.full(
                (slot_count, max_steps + 2, codebook_count), pad_token, device=device
            ),
            uniforms=torch.zeros(slot_count, max_steps + 1, codebook_count, device=device),
            position=torch.zeros(slot_count, dtype=torch.long, device=device),
            offset=torch.zeros(slot_count, dtype=torch.long, device=device),
            frame_count=torch.zeros(slot_count, dtype=torch.long, device=device),
            given_count=torch.zeros(slot_count, dtype=torch.long, device=device),
            is_finite=torch.ones(slot_count, dtype=torch.bool, device=device),
        )

    def first(self, count: int) -> BatchState:
        """Return a view of the first slots."""
        return BatchState(*(column[:count] for column in self))

    def place(self, sampled: Tensor, is_finite: Tensor, delay: Tensor, pad_token: int) -> None:
        """Put the sampled tokens ``[R, K]`` at the rows' next position, if they belong there.

        What was given in advance stays, and outside the clip is padding. ``is_finite`` ``[R]`` says
        which rows' numbers were, ``delay`` ``[K]`` how many steps late each codebook is.
        """
        row = torch.arange(len(sampled), device=sampled.device)
        frame = self.position[:, None] - delay  # [R, K]
        is_in_clip = (frame >= 0) & (frame < self.frame_count[:, None])
        is_given = frame < self.given_count[:, None]
        following = torch.where(is_given, self.tokens[row, self.position + 1], sampled)
        self.tokens[row, self.position + 1] = torch.where(is_in_clip, following, pad_token)
        self.is_finite.logical_and_(is_finite)

    def write(self, slot: int, row: Row, delays: list[int], pad_token: int) -> None:
        """Put a row's numbers into its slot, the tokens given in advance included."""
        given = row.given_count
        self.tokens[slot] = pad_token
        for codebook, codes in enumerate(() if row.given is None else row.given):
            first = delays[codebook] + 1
            self.tokens[slot, first : first + given, codebook] = codes
        self.uniforms[slot, : row.step_count] = row.uniforms
        for column, number in (
            (self.position, given),
            (self.offset, row.offset),
            (self.frame_count, row.frame_count),
            (self.given_count, given),
            (self.is_finite, True),
        ):
            column[slot] = number


def delays(codebook_count: int, channels: int) -> list[int]:
    """Return how many steps late each codebook is; a stereo model's alternate left and right."""
    return [codebook // channels for codebook in range(codebook_count)]
