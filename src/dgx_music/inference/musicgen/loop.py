"""The decoding thread: makes steps while any slot is occupied; callers wait for their codes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgx_music.errors import EngineError, EngineReplacedError
from dgx_music.inference.engine import Run
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.reading import Reading
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.supply import SlotSupply
from dgx_music.inference.trouble import first_line, is_out_of_memory

logger = logging.getLogger(__name__)


class Listening(Protocol):
    """Takes a row's codes window by window, while later ones are being made."""

    @property
    def next_start(self) -> int:
        """The row's frame at which the next window begins."""

    @property
    def next_end(self) -> int:
        """The row's frame at which it ends."""

    def push(self, codes: Tensor) -> None:
        """Take the codes ``[K, frame]`` of the next window; it must not take long."""


@dataclass(eq=False)
class _Ticket:
    """A row, the ``Run`` of its caller, and the codes that the caller waits for."""

    row: Row
    run: Run
    listening: Listening | None = None
    codes: Future[Tensor] = field(default_factory=Future)
    is_being_read: bool = False
    """True while codes for whoever listens are on their way to the host."""

    def answer(self, ending: Tensor | BaseException) -> None:
        """Give the caller its codes, or have it raise the error."""
        if isinstance(ending, BaseException):
            self.codes.set_exception(ending)
        else:
            self.codes.set_result(ending)


class _Part(NamedTuple):
    """Codes that are being read: all of the ticket's row, or some for whoever listens to it."""

    ticket: _Ticket
    start: int
    """The row's frame at which they begin."""
    is_whole: bool


class _OnTheWay(NamedTuple):
    """A reading, and what each of its parts is for."""

    reading: Reading
    parts: list[_Part]


class DecodingLoop:
    """Continuous batching: rows are admitted between steps, in order, as soon as a slot is free.

    A failure of one row (it is cancelled, its parent is gone, its numbers overflow) ends that row
    alone. A failure of a step ends all rows in it, and the loop continues with fresh slots.

    If memory runs out, the loop continues with fewer slots: with as many as were occupied if one
    more did not fit, with half as many if a step did not fit. The rows that lose their place get
    ``EngineReplacedError`` and can be tried again; in the last slot it is a failure of the row.

    The thread starts with the first row and ends with the last one: an idle engine has no thread.
    """

    def __init__(
        self,
        make_slots: Callable[[int], Slots],
        slot_count: int,
    ) -> None:
        # These two are for the decoding thread only.
        self._admitted: list[_Ticket] = []
        self._on_the_way: deque[_OnTheWay] = deque()  # in the order in which they arrive
        # Only the decoding thread removes rows from those that wait.
        self._waiting: deque[_Ticket] = deque()
        self._is_running = False
        self._lock = threading.Lock()  # for the two above
        self._supply = SlotSupply(make_slots, slot_count, self._give_back_surplus)

    @property
    def slot_count(self) -> int:
        """How many rows fit into memory; may shrink, never grows."""
        return self._supply.slot_count

    def decode(self, row: Row, run: Run, listening: Listening | None = None) -> Tensor:
        """Wait until the row has been through a slot; return its codes ``[K, frame]``.

        ``listening`` gets codes in the meantime, in the decoding thread.

        Any thread may call this. Raises what ``run`` raises, ``EngineReplacedError`` if there was
        no memory for so many rows, the out-of-memory error itself if there is none for one row,
        and ``EngineError`` if decoding fails otherwise, with the error as its cause.
        """
        ticket = _Ticket(row, run, listening)
        with self._lock:
            if not self._is_running:
                # it waits for the lock
                threading.Thread(target=self._work, name="decoding").start()
                self._is_running = True
            self._waiting.append(ticket)
        return ticket.codes.result()

    def _work(self) -> None:
        try:
            with torch.inference_mode():  # no gradients, at the least cost
                while self._has_work():
                    self._drop_cancelled()
                    self._admit()
                    self._advance()
        except BaseException as error:
            logger.exception("the decoding thread ends")
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Fail all rows, as their thread ends; the next row starts a new one, with fresh slots."""
        self._supply.give_up()
        with self._lock:
            tickets = [*self._let_go(), *self._waiting]
            self._waiting.clear()
            self._is_running = False
        for ticket in tickets:
            if not ticket.codes.done():
                ticket.answer(_failed_step(error, len(tickets)))

    def _has_work(self) -> bool:
        with self._lock:
            self._is_running = bool(self._admitted or self._on_the_way or self._waiting)
            return self._is_running

    def _drop_cancelled(self) -> None:
        """Answer cancelled rows that still wait: it may be long until a slot is free."""
        with self._lock:
            waiting = list(self._waiting)
        for ticket in waiting:
            try:
                ticket.run.check_cancelled()
            except BaseException as error:
                with self._lock:
                    self._waiting.remove(ticket)
                ticket.answer(error)

    def _admit(self) -> None:
        """Put waiting rows into free slots, in order."""
        while self._waiting and self._supply.has_room():
            ticket = self._waiting[0]
            try:
                self._supply.get().admit(ticket.row)
            except BaseException as error:  # without an answer the caller would wait for ever
                self._refuse(ticket, error)
            else:
                self._admitted.append(self._waiting.popleft())

    def _refuse(self, ticket: _Ticket, error: BaseException) -> None:
        """Answer the first waiting row, unless memory was freed: then it is tried again.

        If there are fewer slots now, it may already be one of the rows that were given back.
        """
        if is_out_of_memory(error) and self._supply.make_room(ticket.run, error):
            return
        self._waiting.popleft()
        ticket.answer(error)

    def _give_back_surplus(self, slot_count: int, error: BaseException) -> None:
        """Give back the waiting rows that are too many for the slots that remain."""
        with self._lock:
            kept = slot_count - len(self._admitted)
            surplus = [self._waiting.pop() for _ in range(len(self._waiting) - kept)]
        for ticket in surplus:
            ticket.answer(_no_room(error))

    def _advance(self) -> None:
        """Make one step with the rows that have not ended; hand over what has been read."""
        slots = self._supply.slots
        try:
            if slots is not None:
                self._drop_troubled(slots)
                self._begin_to_read(slots)
            has_rows = slots is not None and bool(slots.rows)
            self._hand_over(waits=not (has_rows or self._waiting))
            if slots is not None and slots.rows:
                slots.step()
        except BaseException as error:
            self._fail(error)

    def _drop_troubled(self, slots: Slots) -> None:
        """Report the rows' progress; free the slots of those that are cancelled."""
        for ticket in list(self._admitted):
            try:
                _report(ticket)
            except BaseException as error:
                self._retire(slots, ticket)
                ticket.answer(error)

    def _begin_to_read(self, slots: Slots) -> None:
        """Ask for the codes of rows that have ended, and of windows that somebody listens to.

        The steps go on meanwhile, and a row that has ended frees its slot at once.
        """
        due = [(ticket, span) for ticket in self._admitted if (span := _due(ticket, slots))]
        if not due:
            return
        reading = slots.read([(ticket.row, *span) for ticket, span in due])
        parts = [_Part(ticket, start, ticket.row.is_done) for ticket, (start, _) in due]
        self._on_the_way.append(_OnTheWay(reading, parts))
        for ticket, _, is_whole in parts:
            ticket.is_being_read = True
            if is_whole:
                self._retire(slots, ticket)

    def _hand_over(self, *, waits: bool) -> None:
        """Give callers and whoever listens the codes that have arrived, or ``waits`` for all."""
        while self._on_the_way and (waits or self._on_the_way[0].reading.is_there):
            reading, parts = self._on_the_way[0]
            for part, codes in zip(parts, reading.codes(), strict=True):
                self._give(part, codes)
            # Not earlier: if that fails, all of these rows are answered all the same.
            self._on_the_way.popleft()

    def _give(self, part: _Part, codes: Tensor | EngineError) -> None:
        """Hand over one part of a reading; answer its row if it has ended or failed."""
        ticket = part.ticket
        ticket.is_being_read = False
        if ticket.codes.done():  # cancelled in the meantime
            return
        ending = _ending_of(part, codes)
        if ending is not None:
            ticket.answer(ending)
            self._retire(self._supply.slots, ticket)

    def _retire(self, slots: Slots | None, ticket: _Ticket) -> None:
        """Free the ticket's slot if it still has one."""
        if slots is not None and ticket in self._admitted:
            slots.retire(ticket.row)
            self._admitted.remove(ticket)

    def _let_go(self) -> list[_Ticket]:
        """Return all tickets that nobody has answered, and forget them."""
        read = (part.ticket for _, parts in self._on_the_way for part in parts)
        tickets = dict.fromkeys([*self._admitted, *read])
        self._admitted.clear()
        self._on_the_way.clear()
        return [ticket for ticket in tickets if not ticket.codes.done()]

    def _fail(self, error: BaseException) -> None:
        """Answer all rows of a failed step, and free memory if that was the trouble."""
        with suppress(Exception):  # what was read before the step that failed is whole
            self._hand_over(waits=True)
        failed = self._let_go()
        logger.error("decoding step failed with %d generations in it", len(failed), exc_info=error)
        self._supply.give_up()
        try:
            has_room = (
                bool(failed)
                and is_out_of_memory(error)
                and self._supply.make_room(failed[0].run, error)
            )
        except BaseException:
            self._admitted = failed  # the end of this thread answers them
            raise
        error.__traceback__ = None  # it holds the slots
        for ticket in failed:  # one error each: a thread that raises an error writes to it
            ticket.answer(_no_room(error) if has_room else _failed_step(error, len(failed)))


def _report(ticket: _Ticket) -> None:
    """Report a row's progress. Raises the error that ends it if it is cancelled."""
    row = ticket.row
    if row.position:
        # The audio is the last step; a device may be ahead of the row's last step.
        ticket.run.report_progress(min(1.0, row.position / (row.step_count + 1)))
    ticket.run.check_cancelled()


def _due(ticket: _Ticket, slots: Slots) -> tuple[int, int] | None:
    """Return which frames of a row are to be read: all when it is done, or windows, or none."""
    row, listening = ticket.row, ticket.listening
    if row.is_done:
        return 0, row.frame_count
    if listening is None or ticket.is_being_read:
        return None
    end = min(slots.whole_frames(row), row.frame_count - 1)  # the last window comes with the whole
    return (listening.next_start, end) if listening.next_end <= end else None


def _ending_of(part: _Part, codes: Tensor | EngineError) -> Tensor | BaseException | None:
    """Return a done row's codes or the error that ends it; else give whoever listens the codes."""
    listening = part.ticket.listening
    if part.is_whole or isinstance(codes, EngineError) or listening is None:
        return codes
    try:
        end = part.start + codes.shape[1]
        while listening.next_end <= end:
            window = slice(listening.next_start - part.start, listening.next_end - part.start)
            listening.push(codes[:, window])
    except BaseException as error:
        return error
    return None


def _failed_step(error: BaseException, count: int) -> BaseException:
    """Return the error of a row of a failed step; its cause tells whether the device is lost."""
    if count == 1 and is_out_of_memory(error):
        return error
    failure = EngineError(f"A decoding step of {count} generations failed ({first_line(error)}).")
    failure.__cause__ = error
    return failure


def _no_room(error: BaseException) -> EngineReplacedError:
    return EngineReplacedError(
        f"There is no memory for as many generations at a time ({first_line(error)})."
    )
