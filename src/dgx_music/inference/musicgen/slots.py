"""The slots: many generations share every forward pass, and each joins and leaves when it likes.

One generation is a row. Its way through this file::

    admit   its text, its random numbers and what it starts from take the next slot
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
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dgx_music.errors import EngineError
from dgx_music.inference.musicgen.decoder import Decoder, Text
from dgx_music.inference.musicgen.launches import TEXT_STEP, USUAL_TEXT, Plan, Span, make_launcher, round_up, text_room
from dgx_music.inference.musicgen.sampling import Sampling, effective_top_k, sample

_LINES = 16
"""Products are made of a multiple of so many lines: one tile of a processor that multiplies matrices."""


@dataclass(eq=False, kw_only=True)
class Row:
    """One generation on its way; ``position`` is how many steps it has made, the ones given in advance included."""

    uniforms: Tensor  # [step, K], in [0, 1), drawn from the request's own seed
    frame_count: int
    text: Tensor | None = None  # [L, 2, H, X, D], cross-attention's keys and values; None for no text
    negative: Tensor | None = None  # the same of the null half's text
    prefix: Tensor | None = None  # [half, E, hidden], what a melody model reads before the tokens
    given: Tensor | None = None  # [K, P], the codes of the first P frames, P < frame_count
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

    @property
    def offset(self) -> int:
        """Where in the cache position 0 is: behind the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[1]

    @property
    def texts(self) -> tuple[Tensor | None, Tensor | None]:
        """What the two halves read; without guidance there is no other half."""
        return self.text, self.negative if self.guidance_scale > 1 else None

    @property
    def text_halves(self) -> int:
        """How many halves have a text to read: 0, 1 or 2."""
        text, negative = self.texts
        return 2 if negative is not None else int(text is not None)

    @property
    def text_extent(self) -> int:
        """How many tokens the halves read, what is masked included: rounded up, so that rows can share a call."""
        return max((round_up(text.shape[-2], TEXT_STEP) for text in self.texts if text is not None), default=TEXT_STEP)


class _Board(NamedTuple):
    """What the device knows of each slot; the addresses never change, the contents do."""

    tokens: Tensor  # [S, step + 1, K], what to feed at each position; one more at the end takes what nobody needs
    uniforms: Tensor  # [S, step, K]
    position: Tensor  # [S]
    offset: Tensor  # [S]
    frame_count: Tensor  # [S]
    given_count: Tensor  # [S], frames whose codes were given in advance
    is_finite: Tensor  # [S]

    def first(self, count: int) -> _Board:
        """Return a view of the first slots."""
        return _Board(*(column[:count] for column in self))


class Slots:
    """A fixed number of slots on one device. Not for several threads at once."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, slot_count: int, max_steps: int) -> None:
        self.rows: list[Row] = []
        """The occupied slots, always the first ones."""
        self.slot_count = slot_count
        self._decoder = decoder
        self._max_steps = max_steps
        device, codebooks = decoder.device, decoder.codebook_count
        self._delays = delays(codebooks, decoder.channels)
        self._lines = round_up(2 * slot_count, _LINES)
        self._delay = torch.tensor(self._delays, device=device)  # [K]
        self._slot = torch.arange(slot_count, device=device)
        self._cache = decoder.empty_cache(slot_count)  # [L, S, half, 2, H, T, D]
        self._sampling = Sampling.empty(slot_count, device)
        self._board = _Board(
            tokens=torch.full((slot_count, max_steps + 2, codebooks), decoder.pad_token, device=device),
            uniforms=torch.zeros(slot_count, max_steps + 1, codebooks, device=device),
            position=torch.zeros(slot_count, dtype=torch.long, device=device),
            offset=torch.zeros(slot_count, dtype=torch.long, device=device),
            frame_count=torch.zeros(slot_count, dtype=torch.long, device=device),
            given_count=torch.zeros(slot_count, dtype=torch.long, device=device),
            is_finite=torch.ones(slot_count, dtype=torch.bool, device=device),
        )
        room = TEXT_STEP if decoder.reads_text else 0
        self._texts = decoder.empty_text(slot_count, room)  # [L, S, half, 2, H, X, D]
        self._text_mask = torch.zeros(slot_count, 2, room, dtype=decoder.dtype, device=device)  # [S, half, X]
        self._launcher = make_launcher(self._advance, decoder.stream)

    def close(self) -> None:
        """Wait for what is under way and let go of everything; the slots are of no use any more."""
        self._launcher.forget()
        del self._launcher, self._cache, self._texts  # the launcher refers to the slots, and so would outlive them

    @property
    def has_room(self) -> bool:
        """True while a slot is free."""
        return len(self.rows) < self.slot_count

    @torch.no_grad()
    def admit(self, row: Row) -> None:
        """Give the row the next free slot, and read what it starts from; where that fails, nothing changes.

        What another row left in the slot's cache is masked, so nothing is cleared.
        """
        with self._launcher.on_stream(row.text, row.negative, row.prefix, row.given, row.uniforms):
            slot = len(self.rows)
            self._clean(slot)
            self._write_text(slot, row)
            self._write(slot, row)
            if row.prefix is not None or row.given is not None:
                own = Span(slot, slot + 1, row.text_extent, is_masked=True)
                tokens, text = self._board.tokens[slot, : row.position], self._text(row.text_halves, (own,))
                self._decoder.prefill(row.prefix, tokens, self._cache[:, slot], text)
            self.rows.append(row)

    @torch.no_grad()
    def step(self) -> None:
        """Advance every row: by one position, or on a GPU by several."""
        with self._launcher.on_stream():
            plan = self._launcher.fit(self._plan(), self.slot_count, self._decoder.max_positions)
            self._launcher.launch(plan)
        for row in self.rows:
            row.position += plan.steps

    @torch.no_grad()
    def codes(self, row: Row) -> Tensor:
        """Return the codes ``[K, frame]`` of a row that is done. Raises ``EngineError`` where a number was not finite."""
        with self._launcher.on_stream():
            slot = self.rows.index(row)
            if not self._board.is_finite[slot]:
                raise EngineError(
                    "The model's numbers are not finite; try DGX_MUSIC_DTYPE=float32, or else other weights."
                )
            tokens = self._board.tokens[slot, 1 : row.step_count + 1]  # [step, K]
            codes = [tokens[delay : delay + row.frame_count, k] for k, delay in enumerate(self._delays)]
            return torch.stack(codes).cpu()  # a copy: the slot has its next row soon

    @torch.no_grad()
    def retire(self, row: Row) -> None:
        """Free the slot of a row that is done or given up; the last row moves into it, to keep the batch dense."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        mover = self.rows[last]
        if mover is not row:
            with self._launcher.on_stream():
                self._clean(slot)
                reached = min(mover.offset + mover.position, self._decoder.max_positions)
                self._cache[:, slot, ..., :reached, :] = self._cache[:, last, ..., :reached, :]
                self._texts[:, slot] = self._texts[:, last]
                for column in (*self._board, *self._sampling, self._text_mask):
                    column[slot] = column[last]
        self.rows = [mover if other is row else other for other in self.rows[:last]]

    def _plan(self) -> Plan:
        """Return what the next step must reach: of each row what is its own, and nothing of its neighbours'."""
        text_halves = max(row.text_halves for row in self.rows)
        return Plan(
            rows=len(self.rows),
            halves=2 if any(row.guidance_scale > 1 for row in self.rows) else 1,
            text_halves=text_halves,
            reach=_spans(self._extent(row) for row in self.rows),
            texts=_spans((row.text_extent, True) for row in self.rows) if text_halves else (),
            widest=max(effective_top_k(row.temperature, row.top_k, self._decoder.vocabulary) for row in self.rows),
            steps=1,
        )

    def _extent(self, row: Row) -> tuple[int, bool]:
        """Return how much of the cache the row reads, and whether not all of that is its own yet."""
        if self._decoder.reads_positions:
            return self._decoder.max_positions, True
        return row.offset + row.position + 1, False

    def _advance(self, plan: Plan) -> None:
        """Make the plan's steps. All on the device: nothing here waits for a number, so that a GPU can replay it."""
        board, sampling = self._board.first(plan.rows), self._sampling.first(plan.rows)
        slot, text = self._slot[: plan.rows], self._text(plan.text_halves, plan.texts)
        for _ in range(plan.steps):
            logits = self._decoder.forward(
                board.tokens[slot, board.position],  # [R, K]
                board.offset + board.position,
                self._cache,
                text,
                halves=plan.halves,
                spans=plan.reach,
                lines=self._lines,
            )
            sampled, is_finite = sample(
                logits, board.uniforms[slot, board.position], sampling, min(plan.widest, self._decoder.vocabulary)
            )
            frame = board.position[:, None] - self._delay  # [R, K]
            is_in_clip = (frame >= 0) & (frame < board.frame_count[:, None])
            is_given = frame < board.given_count[:, None]
            following = torch.where(is_given, board.tokens[slot, board.position + 1], sampled)
            board.tokens[slot, board.position + 1] = torch.where(is_in_clip, following, self._decoder.pad_token)
            board.is_finite.logical_and_(is_finite)
            board.position.add_(1).clamp_(max=self._max_steps)  # past a row's end is of no use, and does no harm

    def _write(self, slot: int, row: Row) -> None:
        """Put a row's numbers on the board, the tokens it was given among them."""
        board = self._board
        given = 0 if row.given is None else row.given.shape[1]
        row.position = given
        board.tokens[slot] = self._decoder.pad_token
        for codebook, codes in enumerate(() if row.given is None else row.given):
            first = self._delays[codebook] + 1
            board.tokens[slot, first : first + given, codebook] = codes
        board.uniforms[slot, : row.step_count] = row.uniforms
        for column, number in (
            (board.position, given),
            (board.offset, row.offset),
            (board.frame_count, row.frame_count),
            (board.given_count, given),
            (board.is_finite, True),
        ):
            column[slot] = number
        self._sampling.write(
            slot,
            guidance_scale=row.guidance_scale,
            temperature=row.temperature,
            top_k=row.top_k,
            top_p=row.top_p,
            vocabulary=self._decoder.vocabulary,
        )

    def _clean(self, slot: int) -> None:
        """Clear the slot's cache where it may hold NaN: what is masked is still multiplied by 0, which leaves NaN.

        A GPU is not asked: the host would have to wait for all that it has to do before.
        """
        if self._decoder.device.type != "cpu" or not self._board.is_finite[slot]:
            self._cache[:, slot] = 0

    # ------------------------------------------------------------------------------------------------- text

    def _write_text(self, slot: int, row: Row) -> None:
        """Put what cross-attention reads of the row into its slot, zeros where a half has no text: it reads zeros."""
        if not self._decoder.reads_text:
            return
        longest = row.text_extent
        room = self._texts.shape[-2]
        if longest > room or (not self.rows and max(longest, USUAL_TEXT) < room):
            self._make_text_room(longest)
        self._texts[:, slot] = 0
        self._text_mask[slot] = 0
        for half, text in enumerate(row.texts):
            if text is not None:
                length = text.shape[-2]
                self._texts[:, slot, half, ..., :length, :] = text
                self._text_mask[slot, half, length:] = -math.inf

    def _make_text_room(self, length: int) -> None:
        """Make room for texts of that many tokens, and keep those that are there; what is new is masked for them."""
        room = text_room(length)
        texts = self._decoder.empty_text(self.slot_count, room)
        mask = torch.full((self.slot_count, 2, room), -math.inf, dtype=self._decoder.dtype, device=self._decoder.device)
        kept = min(room, self._texts.shape[-2])
        texts[..., :kept, :], mask[..., :kept] = self._texts[..., :kept, :], self._text_mask[..., :kept]
        self._launcher.forget()
        self._texts, self._text_mask = texts, mask

    def _text(self, halves: int, spans: tuple[Span, ...]) -> Text | None:
        return Text(self._texts, self._text_mask, halves, spans) if halves else None


def _spans(extents: Iterable[tuple[int, bool]]) -> tuple[Span, ...]:
    """Return the spans of rows of which each reads so much, masked or not: neighbours alike share one."""
    spans: list[Span] = []
    for row, (length, is_masked) in enumerate(extents):
        if spans and spans[-1][2:] == (length, is_masked):
            spans[-1] = spans[-1]._replace(stop=row + 1)
        else:
            spans.append(Span(row, row + 1, length, is_masked))
    return tuple(spans)


def delays(codebook_count: int, channels: int) -> list[int]:
    """Return how many steps late each codebook is; a stereo model's alternate between left and right."""
    return [codebook // channels for codebook in range(codebook_count)]
