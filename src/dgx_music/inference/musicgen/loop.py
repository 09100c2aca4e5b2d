"""The decoding thread: makes steps while any slot is occupied; callers wait for their codes."""

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
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.trouble import first_line, give_back_memory, is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Ticket:
    """A row, the ``Run`` of its caller, and the codes that the caller waits for."""

    row: Row
    run: Run
    codes: Future[Tensor] = field(default_factory=Future)


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
        *,
        guard: Callable[[], AbstractContextManager[object]] = torch.inference_mode,
    ) -> None:
        self.slot_count = slot_count
        """How many rows fit into memory; may shrink, never grows."""
        self._make_slots = make_slots
        self._guard = guard  # no gradients: inference mode costs least, but cannot be compiled
        self._admitted: list[_Ticket] = []  # for the decoding thread only
        # Only the decoding thread removes rows from those that wait.
        self._waiting: deque[_Ticket] = deque()
        self._is_running = False
        self._lock = threading.Lock()  # for the two above
        self._slots: Slots | None = self._make_fresh_slots()  # None after they are given up

    def decode(self, row: Row, run: Run) -> Tensor:
        """Wait until the row has been through a slot; return its codes ``[K, frame]``.

        Any thread may call this. Raises what ``run`` raises, ``EngineReplacedError`` if there was
        no memory for so many rows, the out-of-memory error itself if there is none for one row,
        and ``EngineError`` if decoding fails otherwise, with the error as its cause.
        """
        ticket = _Ticket(row, run)
        with self._lock:
            if not self._is_running:
                # it waits for the lock
                threading.Thread(target=self._work, name="decoding").start()
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
            self._fail_all(error)

    def _fail_all(self, error: BaseException) -> None:
        """Fail all rows, as their thread ends; the next row starts a new one, with fresh slots."""
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
        """Answer cancelled rows that still wait: it may be long until a slot is free."""
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
                    give_back_memory()  # of the slots that were given up
                    self._slots = self._make_fresh_slots()
                self._slots.admit(ticket.row)
            except BaseException as error:  # without an answer the caller would wait for ever
                self._refuse(ticket, error)
            else:
                self._admitted.append(self._waiting.popleft())

    def _has_room(self) -> bool:
        """Return whether one more row may be admitted.

        Gives up the slots if they are empty and have become too many.
        """
        is_too_large = self._slots is not None and self._slots.slot_count > self.slot_count
        if is_too_large and not self._admitted:
            self._give_up_slots()
        return self._slots is None or (
            len(self._admitted) < self.slot_count and self._slots.has_room
        )

    def _give_up_slots(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            with suppress(Exception):  # if the device is lost, this fails as well
                slots.close()

    def _make_fresh_slots(self) -> Slots:
        """Return as many empty slots as fit into memory. Raises the error if no single one fits."""
        while True:
            try:
                return self._make_slots(self.slot_count)
            except Exception as error:
                if self.slot_count == 1 or not is_out_of_memory(error):
                    raise
                give_back_memory(error)
                self._shrink(self.slot_count // 2, error)

    def _refuse(self, ticket: _Ticket, error: BaseException) -> None:
        """Answer the first waiting row, or free memory and let it try again."""
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
        """Continue with so many slots; give back the waiting rows that are too many for them."""
        logger.warning(
            "no memory for %d slots, %d from now on: %s",
            self.slot_count,
            slot_count,
            first_line(error),
        )
        self.slot_count = slot_count
        with self._lock:
            kept = slot_count - len(self._admitted)
            surplus = [self._waiting.pop() for _ in range(len(self._waiting) - kept)]
        for ticket in surplus:
            ticket.codes.set_exception(_no_room(error))

    def _advance(self, slots: Slots) -> None:
        """Retire the rows that have ended, and make one step with the others."""
        try:
            for ticket in list(self._admitted):
                self._retire_if_ended(slots, ticket)
            if slots.rows:
                slots.step()
        except BaseException as error:
            self._fail(error)

    def _retire_if_ended(self, slots: Slots, ticket: _Ticket) -> None:
        """Report a row's progress; if it is over, free its slot and answer its caller."""
        row = ticket.row
        codes: Tensor | None = None
        failure: BaseException | None = None
        try:
            if row.position:
                # The audio is the last step; a device may be ahead of the row's last step.
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
        error.__traceback__ = None  # it holds the slots
        for ticket in failed:  # one error each: a thread that raises an error writes to it
            own = _no_room(error) if has_room else _failed_step(error, len(failed))
            ticket.codes.set_exception(own)

    def _make_room(self, failed: list[_Ticket], error: BaseException) -> bool:
        """Free memory after a step ran out of it; return whether there was anything to free."""
        give_back_memory(error)
        if failed[0].run.make_room():
            return True
        if self.slot_count == 1:
            return False
        self._shrink(self.slot_count // 2, error)
        return True


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
