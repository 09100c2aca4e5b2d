"""The decoding thread: runs the slots while any is occupied, for calling threads that wait for their codes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgx_music.errors import EngineError, EngineReplacedError
from dgx_music.inference.engine import Run
from dgx_music.inference.musicgen.slots import Row, Slots
from dgx_music.inference.trouble import first_line, give_back_memory, is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """A row, the line to who asked for it, and what becomes of it."""

    row: Row
    run: Run
    codes: Future[Tensor] = field(default_factory=Future)


class DecodingLoop:
    """Continuous batching: rows are admitted between steps, in the order they came, as soon as a slot is free.

    What goes wrong for one row (it is cancelled, its parent is gone, its numbers overflow) ends that row alone. What goes
    wrong in a step ends all rows in it, and the loop goes on with fresh slots. Where memory runs out it goes on with fewer:
    with as many as were occupied when one more did not fit, with half as many when a step did not. The rows that this
    costs are given back (``EngineReplacedError``), those among them that have no slot yet; only in the last slot it is
    their own failure. The thread starts with the first row and ends with the last, so that an engine nobody uses holds none.
    """

    def __init__(
        self,
        make_slots: Callable[[int], Slots],
        slot_count: int,
        *,
        guard: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
    ) -> None:
        self.slot_count = slot_count
        """How many rows there is memory for; may shrink, never grows."""
        self._make_slots = make_slots
        self._guard = guard  # against gradients: inference mode costs the least, and cannot be compiled
        self._admitted: list[_Ticket] = []  # only the decoding thread looks
        self._waiting: deque[_Ticket] = deque()
        self._is_running = False
        self._lock = threading.Lock()  # for the two above; only the decoding thread takes from those that wait
        self._slots: Slots | None = self._make_fresh_slots()  # None once they are given up

    def decode(self, row: Row, run: Run) -> Tensor:
        """Return the row's codes ``[K, frame]`` once it has been through a slot; safe to call from any thread.

        Raises what ``run`` raises, ``EngineReplacedError`` where there was no memory for so many rows, the error itself
        where there is none for one, and ``EngineError`` where decoding fails otherwise, with the error as its cause.
        """
        ticket = _Ticket(row, run)
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._work, name="decoding").start()  # it waits for the lock
                self._is_running = True
            self._waiting.append(ticket)
        return ticket.codes.result()

    def _work(self) -> None:
        try:
            with self._guard():
                while self._has_work():
                    self._drop_cancelled()
                    self._admit()
                    if self._slots is not None:
                        self._advance(self._slots)
        except BaseException as error:
            logger.exception("the decoding thread ends")
            self._answer_all(error)

    def _answer_all(self, error: BaseException) -> None:
        """Let nobody wait for a thread that is gone; the next row starts a new one, with fresh slots."""
        self._give_up_slots()
        with self._lock:
            tickets = [*self._admitted, *self._waiting]
            self._admitted.clear()
            self._waiting.clear()
            self._is_running = False
        for ticket in tickets:
            if not ticket.codes.done():
                ticket.codes.set_exception(_failed_step(error, len(tickets)))

    def _has_work(self) -> bool:
        with self._lock:
            self._is_running = bool(self._admitted or self._waiting)
            return self._is_running

    def _drop_cancelled(self) -> None:
        """Answer the rows that must not go on before they have a slot: it may be long until one is free."""
        with self._lock:
            waiting = list(self._waiting)
        for ticket in waiting:
            try:
                ticket.run.check_cancelled()
            except BaseException as error:
                with self._lock:
                    self._waiting.remove(ticket)
                ticket.codes.set_exception(error)

    def _admit(self) -> None:
        while self._waiting and self._has_room():
            ticket = self._waiting[0]
            try:
                if self._slots is None:
                    give_back_memory()  # that of those given up
                    self._slots = self._make_fresh_slots()
                self._slots.admit(ticket.row)
            except BaseException as error:  # a caller without an answer would wait for ever
                self._refuse(ticket, error)
            else:
                self._admitted.append(self._waiting.popleft())

    def _has_room(self) -> bool:
        """Return whether one more may be admitted; slots that have become too many are given up once they are empty."""
        if self._slots is not None and self._slots.slot_count > self.slot_count and not self._admitted:
            self._give_up_slots()
        return self._slots is None or (len(self._admitted) < self.slot_count and self._slots.has_room)

    def _give_up_slots(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            with suppress(Exception):  # where the device is lost, this fails as well
                slots.close()

    def _make_fresh_slots(self) -> Slots:
        """Return empty slots, as many as there is memory for. Raises what making one raises."""
        while True:
            try:
                return self._make_slots(self.slot_count)
            except Exception as error:
                if self.slot_count == 1 or not is_out_of_memory(error):
                    raise
                give_back_memory(error)
                self._shrink(self.slot_count // 2, error)

    def _refuse(self, ticket: _Ticket, error: BaseException) -> None:
        """Answer the first row that waits, which was not admitted, or leave it to try again with what memory can be had."""
        if is_out_of_memory(error):
            give_back_memory(error)
            if ticket.run.make_room():
                return
            if self.slot_count > 1:
                self._shrink(len(self._admitted) or self.slot_count // 2, error)
                return
            self._give_up_slots()
        self._waiting.popleft()
        ticket.codes.set_exception(error)

    def _shrink(self, slot_count: int, error: BaseException) -> None:
        """Go on with so many slots, and give back the rows that wait for others."""
        logger.warning("no memory for %d slots, %d from now on: %s", self.slot_count, slot_count, first_line(error))
        self.slot_count = slot_count
        with self._lock:
            kept = slot_count - len(self._admitted)
            surplus = [self._waiting.pop() for _ in range(len(self._waiting) - kept)]
        for ticket in surplus:
            ticket.codes.set_exception(_no_room(error))

    def _advance(self, slots: Slots) -> None:
        """Let go of the rows that have ended, and make one step with the others."""
        try:
            for ticket in list(self._admitted):
                self._settle(slots, ticket)
            if slots.rows:
                slots.step()
        except BaseException as error:
            self._fail(error)

    def _settle(self, slots: Slots, ticket: _Ticket) -> None:
        """Report a row's progress; where it is done or must not go on, free its slot and answer its caller."""
        row = ticket.row
        codes: Tensor | None = None
        failure: BaseException | None = None
        try:
            if row.position:
                # Decoding the audio is the last step; a device may be ahead of what the row needs.
                ticket.run.report_progress(min(1.0, row.position / (row.step_count + 1)))
            ticket.run.check_cancelled()
            codes = slots.codes(row) if row.is_done else None
        except BaseException as error:
            failure = error
        if codes is None and failure is None:
            return
        slots.retire(row)
        self._admitted.remove(ticket)
        if codes is not None:
            ticket.codes.set_result(codes)
        else:
            ticket.codes.set_exception(failure)

    def _fail(self, error: BaseException) -> None:
        failed, self._admitted = self._admitted, []
        logger.error("decoding step failed with %d generations in it", len(failed), exc_info=error)
        self._give_up_slots()
        has_room = is_out_of_memory(error) and self._make_room(failed, error)
        error.__traceback__ = None  # which holds the slots
        for ticket in failed:  # one error each: every thread that raises one writes to it
            ticket.codes.set_exception(_no_room(error) if has_room else _failed_step(error, len(failed)))

    def _make_room(self, failed: list[_Ticket], error: BaseException) -> bool:
        """Make memory of what can be given up after a step without; return whether there was anything."""
        give_back_memory(error)
        if failed[0].run.make_room():
            return True
        if self.slot_count == 1:
            return False
        self._shrink(self.slot_count // 2, error)
        return True


def _failed_step(error: BaseException, count: int) -> BaseException:
    """Return what a row of a failed step is told: with its cause, which tells whether the device is lost."""
    if count == 1 and is_out_of_memory(error):
        return error
    failure = EngineError(f"A decoding step of {count} generations failed ({first_line(error)}).")
    failure.__cause__ = error
    return failure


def _no_room(error: BaseException) -> EngineReplacedError:
    return EngineReplacedError(f"There is no memory for as many generations at a time ({first_line(error)}).")
