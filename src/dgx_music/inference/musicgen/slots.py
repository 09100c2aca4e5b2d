"""The slots: many generations share every forward pass; each can join or leave between steps.

One generation is a row. Its way through this file::

    admit     its text, its random numbers and its prefix take the next slot (prefill)
    step      one forward pass for all rows: each reads its own last tokens at its own position
    sample    the next tokens, with each row's own guidance, temperature, top_k and top_p
    retire    after frames + longest delay steps the codes are complete; the last row moves here

MusicGen has no end token, so the number of steps is known at admission: the host counts and never
asks the device. A row's tokens depend on nothing of its neighbours, so to cancel one row or to
admit another changes no other.

Shapes: R rows in the first R of S slots, passes 2 (conditional, unconditional) if any row is guided
and else 1; K codebooks of V tokens; T positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dgx_music.errors import EngineError
from dgx_music.inference.musicgen.attention import Text
from dgx_music.inference.musicgen.batch import BatchState, Row, delays
from dgx_music.inference.musicgen.budget import check_room
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.kernels import draw_next
from dgx_music.inference.musicgen.launches import (
    TEXT_STEP,
    USUAL_TEXT,
    Plan,
    Span,
    make_launcher,
    round_up,
    text_room,
)
from dgx_music.inference.musicgen.reading import Reading
from dgx_music.inference.musicgen.sampling import SamplerState, effective_top_k, sample
from dgx_music.sampling import Sampling

_ROW_STEP = 16
"""Products have a multiple of so many rows: one tile of a processor that multiplies matrices."""


class Slots:
    """A fixed number of slots on one device. Not safe in several threads at once."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, slot_count: int, max_steps: int) -> None:
        self.rows: list[Row] = []
        """The occupied slots, always the first ones."""
        self.slot_count = slot_count
        self._decoder = decoder
        self._max_steps = max_steps
        device, codebooks = decoder.device, decoder.codebook_count
        self._delays = delays(codebooks, decoder.channels)
        self._padded_rows = round_up(2 * slot_count, _ROW_STEP)
        self._delay = torch.tensor(self._delays, device=device)  # [K]
        self._slot = torch.arange(slot_count, device=device)
        self._cache = decoder.empty_cache(slot_count)  # [L, S, pass, 2, H, T, D]
        self._sampling = SamplerState.empty(slot_count, device)
        self._state = BatchState.empty(slot_count, max_steps, codebooks, decoder.pad_token, device)
        room = self._least_text_room if decoder.reads_text else 0
        self._texts = decoder.empty_text(slot_count, room)  # [L, S, pass, 2, H, X, D]
        mask_shape = (slot_count, 2, room)  # [S, pass, X]
        self._text_mask = torch.zeros(mask_shape, dtype=decoder.dtype, device=device)
        self._text_last = torch.zeros(slot_count, 2, dtype=torch.long, device=device)
        self._launcher = make_launcher(self._advance, decoder.stream)
        if decoder.reads_positions:
            self._record_usual_plans()

    def _record_usual_plans(self) -> None:
        """Record, for each number of rows, the plan of guided rows: no first clip waits for it."""
        text = self._texts[:, 0, 0] if self._decoder.reads_text else None
        usual = Row(uniforms=self._state.uniforms[0], frame_count=1, sampling=Sampling(), text=text)
        with self._launcher.on_stream(self._cache):  # after the work that made everything here
            for count in range(self.slot_count, 0, -1):  # the first one takes the most memory
                self._launcher.record(self._fit([usual] * count))

    def close(self) -> None:
        """Wait for the steps in flight and let go of everything; the slots cannot be used again."""
        self._launcher.forget()
        # The launcher refers to the slots, so both would stay alive.
        del self._launcher, self._cache, self._texts

    @property
    def _least_text_room(self) -> int:
        """The least room for texts: if steps are recorded, so much that it hardly ever changes."""
        return USUAL_TEXT if self._decoder.reads_positions else TEXT_STEP

    @property
    def has_room(self) -> bool:
        """True while a slot is free."""
        return len(self.rows) < self.slot_count

    # --------------------------------------------------------------------------- admit and retire

    @torch.no_grad()
    def admit(self, row: Row) -> None:
        """Give the row the next free slot and prefill it; if that fails, nothing changes.

        What another row left in the slot's cache is masked, so nothing is cleared.
        """
        with self._launcher.on_stream(row.text, row.negative, row.prefix, row.given, row.uniforms):
            slot = len(self.rows)
            self._clear_if_damaged(slot)
            self._write_text(slot, row)
            self._write(slot, row)
            if row.prefix is not None or row.given is not None:
                own = Span(slot, slot + 1, row.text_length, is_masked=True)
                tokens, text = (
                    self._state.tokens[slot, : row.position],
                    self._text(row.text_passes, (own,)),
                )
                self._decoder.prefill(row.prefix, tokens, self._cache[:, slot], text)
            self.rows.append(row)

    @torch.no_grad()
    def retire(self, row: Row) -> None:
        """Free the slot of a row that is done or given up.

        The last row moves into it, so that the occupied slots stay the first ones.
        """
        slot, last = self.rows.index(row), len(self.rows) - 1
        mover = self.rows[last]
        if mover is not row:
            with self._launcher.on_stream():
                self._move(mover, last, slot)
        self.rows = [mover if other is row else other for other in self.rows[:last]]

    def _move(self, mover: Row, last: int, slot: int) -> None:
        self._clear_if_damaged(slot)
        written = min(mover.offset + mover.position, self._decoder.max_positions)
        self._cache[:, slot, ..., :written, :] = self._cache[:, last, ..., :written, :]
        self._texts[:, slot] = self._texts[:, last]
        for column in (*self._state, *self._sampling, self._text_mask, self._text_last):
            column[slot] = column[last]

    def _write(self, slot: int, row: Row) -> None:
        row.position = row.given_count
        self._state.write(slot, row, self._delays, self._decoder.pad_token)
        self._sampling.write(slot, row.sampling, self._decoder.vocabulary)

    def _clear_if_damaged(self, slot: int) -> None:
        """Clear the slot's cache if it may hold NaN.

        Attention multiplies masked values by 0, and 0 * NaN is NaN. A GPU's slot is always cleared:
        to ask, the host would have to wait for all earlier work.
        """
        if self._decoder.device.type != "cpu" or not self._state.is_finite[slot]:
            self._cache[:, slot] = 0

    def whole_frames(self, row: Row) -> int:
        """Return how many frames of a row have all their codes."""
        return max(0, min(row.position - self._delays[-1], row.frame_count))

    def codes(self, row: Row) -> Tensor:
        """Wait for the codes ``[K, frame]`` of a row at its end.

        Raises ``EngineError`` if one of its numbers was not finite.
        """
        (codes,) = self.read([(row, 0, row.frame_count)]).codes()
        if isinstance(codes, EngineError):
            raise codes
        return codes

    @torch.no_grad()
    def read(self, parts: Sequence[tuple[Row, int, int]]) -> Reading:
        """Begin to read codes of rows, each from its first frame up to before its last.

        The frames must be whole. Waits for nothing; the rows may go on or be retired meanwhile.
        """
        slots = [self.rows.index(row) for row, _, _ in parts]
        places = [
            self._places(slot, start, end)
            for slot, (_, start, end) in zip(slots, parts, strict=True)
        ]
        with self._launcher.on_stream():
            there = _upload(torch.cat(places), self._decoder.device)
            found = self._state.tokens.flatten()[there]
            are_finite = self._state.is_finite[: len(self.rows)].to(found.dtype)
            lengths = list(zip(slots, map(len, places), strict=True))
            return Reading(torch.cat([found, are_finite]), lengths, len(self._delays))

    def _places(self, slot: int, start: int, end: int) -> Tensor:
        """Return where the codes of a slot's frames are among all tokens: ``[K * frame]``."""
        steps = torch.arange(start, end) + torch.tensor(self._delays)[:, None] + 1  # [K, frame]
        _, length, codebooks = self._state.tokens.shape
        return ((slot * length + steps) * codebooks + torch.arange(codebooks)[:, None]).flatten()

    # --------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self) -> None:
        """Advance every row: by one position, or on a GPU by several."""
        with self._launcher.on_stream():
            plan = self._fit(self.rows)
            self._launcher.launch(plan)
        for row in self.rows:
            row.position += plan.steps

    def _fit(self, rows: list[Row]) -> Plan:
        """Return the plan to launch for the rows."""
        plan = self._plan(rows)
        return self._launcher.fit(plan, self.slot_count, self._decoder.max_positions)

    def _plan(self, rows: list[Row]) -> Plan:
        """Return the shape of the rows' next step: each row's own context and text, and no more."""
        text_passes = max(row.text_passes for row in rows)
        return Plan(
            rows=len(rows),
            passes=2 if any(row.is_guided for row in rows) else 1,
            text_passes=text_passes,
            context_spans=_spans(self._context_length(row) for row in rows),
            text_spans=_spans(self._text_length(row) for row in rows) if text_passes else (),
            max_top_k=max(self._max_top_k(row) for row in rows),
            steps=1,
        )

    # Kernels that read lengths on the device are given all of the room: one plan serves all lengths.

    def _context_length(self, row: Row) -> tuple[int, bool]:
        """Return how much of the cache the row reads, and whether part of that is masked."""
        if self._decoder.reads_positions:
            return self._decoder.max_positions, True
        return row.offset + row.position + 1, False

    def _text_length(self, row: Row) -> tuple[int, bool]:
        """Return how much of its texts the row reads, and whether part of that is masked."""
        return self._texts.shape[-2] if self._decoder.reads_positions else row.text_length, True

    def _max_top_k(self, row: Row) -> int:
        vocabulary = self._decoder.vocabulary
        is_any = self._decoder.reads_positions
        return vocabulary if is_any else effective_top_k(row.sampling, vocabulary)

    def _advance(self, plan: Plan) -> None:
        """Make the plan's steps, all on the device.

        Nothing here waits for a number, so that a GPU can replay it.
        """
        state, sampling = self._state.first(plan.rows), self._sampling.first(plan.rows)
        slot, text = self._slot[: plan.rows], self._text(plan.text_passes, plan.text_spans)
        for _ in range(plan.steps):
            self._decode_one_token(plan, state, sampling, slot, text)

    def _decode_one_token(
        self,
        plan: Plan,
        state: BatchState,
        sampling: SamplerState,
        slot: Tensor,
        text: Text | None,
    ) -> None:
        """Draw each row's next token of every codebook and move on by one position."""
        logits = self._decoder.forward(
            state.tokens[slot, state.position],  # [R, K]
            state.offset + state.position,
            self._cache,
            text,
            passes=plan.passes,
            spans=plan.context_spans,
            padded_rows=self._padded_rows,
        )  # [R, pass, K, V]
        if self._decoder.reads_positions:
            draw_next(logits, sampling, state, self._delay, self._decoder.pad_token)
        else:
            uniforms = state.uniforms[slot, state.position]  # [R, K]
            drawn = sample(logits, uniforms, sampling, min(plan.max_top_k, logits.shape[-1]))
            state.place(*drawn, self._delay, self._decoder.pad_token)
        state.position.add_(1).clamp_(max=self._max_steps)  # steps past a row's end do no harm

    # --------------------------------------------------------------------------------------- text

    def _write_text(self, slot: int, row: Row) -> None:
        """Put the row's texts into its slot; a pass without text reads zeros."""
        if not self._decoder.reads_text:
            return
        longest = row.text_length
        room = self._texts.shape[-2]
        if longest > room or (not self.rows and max(longest, USUAL_TEXT) < room):
            self._make_text_room(max(longest, self._least_text_room))
        self._texts[:, slot] = 0
        self._text_mask[slot] = 0
        self._text_last[slot] = 0
        for index, text in enumerate(row.texts):
            if text is not None:
                length = text.shape[-2]
                self._texts[:, slot, index, ..., :length, :] = text
                self._text_mask[slot, index, length:] = -math.inf
                self._text_last[slot, index] = length - 1

    def _make_text_room(self, length: int) -> None:
        """Make room for texts of that many tokens and keep those that are there.

        The new room is masked for them.
        """
        room = text_room(length)
        device, dtype = self._decoder.device, self._decoder.dtype
        needed = self.slot_count * self._decoder.text_bytes(room)
        check_room(needed, device, f"room for a text of {length} tokens")
        texts = self._decoder.empty_text(self.slot_count, room)
        mask = torch.full((self.slot_count, 2, room), -math.inf, dtype=dtype, device=device)
        kept = min(room, self._texts.shape[-2])
        texts[..., :kept, :], mask[..., :kept] = (
            self._texts[..., :kept, :],
            self._text_mask[..., :kept],
        )
        self._launcher.forget()
        self._texts, self._text_mask = texts, mask

    def _text(self, passes: int, spans: tuple[Span, ...]) -> Text | None:
        if not passes:
            return None
        return Text(self._texts, self._text_mask, self._text_last, passes, spans)


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Return the numbers on the device, without waiting for it."""
    if device.type == "cpu":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def _spans(lengths: Iterable[tuple[int, bool]]) -> tuple[Span, ...]:
    """Return the spans of rows with these lengths, masked or not; equal neighbours share one."""
    spans: list[Span] = []
    for row, (length, is_masked) in enumerate(lengths):
        if spans and spans[-1][2:] == (length, is_masked):
            spans[-1] = spans[-1]._replace(stop=row + 1)
        else:
            spans.append(Span(row, row + 1, length, is_masked))
    return tuple(spans)
