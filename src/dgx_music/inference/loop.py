"""The decoding thread: runs the slots while any is occupied, for calling threads that wait for their codes."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from dgx_music.errors import EngineError
from dgx_music.inference.engine import Run
from dgx_music.inference.slots import Row, Slots

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
    wrong in a step ends all rows in it, and the loop goes on with fresh slots. The thread starts with the first row and
    ends with the last, so that an engine nobody uses holds none.
    """

    def __init__(self, make_slots: Callable[[], Slots]) -> None:
        self._make_slots = make_slots
        self._slots: Slots | None = make_slots()  # None after a step failed: whatever it left behind is given up
        self._admitted: list[_Ticket] = []  # only the decoding thread looks
        self._waiting: deque[_Ticket] = deque()
        self._is_running = False
        self._lock = threading.Lock()  # for the two above

    def decode(self, row: Row, run: Run) -> Tensor:
        """Return the row's codes ``[K, frame]`` once it has been through a slot; safe to call from any thread.

        Raises what ``run`` raises, and ``EngineError`` where decoding fails.
        """
        ticket = _Ticket(row, run)
        with self._lock:
            if not self._is_running:
                threading.Thread(target=self._work, name="decoding").start()  # it waits for the lock
                self._is_running = True
            self._waiting.append(ticket)
        return ticket.codes.result()

    def _work(self) -> None:
        while self._has_work():
            self._admit()
            if self._slots is not None:
                self._advance(self._slots)

    def _has_work(self) -> bool:
        with self._lock:
            self._is_running = bool(self._admitted or self._waiting)
            return self._is_running

    def _admit(self) -> None:
        while self._waiting and (self._slots is None or self._slots.has_room):
            ticket = self._waiting.popleft()
            try:
                if self._slots is None:
                    self._slots = self._make_slots()
                self._slots.admit(ticket.row)
            except BaseException as error:  # a caller without an answer would wait for ever
                ticket.codes.set_exception(error)
            else:
                self._admitted.append(ticket)

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
                ticket.run.report_progress(row.position / (row.step_count + 1))  # decoding the audio is the last step
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
        failed, self._admitted, self._slots = self._admitted, [], None
        message = f"A decoding step of {len(failed)} generations failed ({type(error).__name__}: {error})."
        logger.error("decoding step failed with %d generations in it", len(failed), exc_info=error)
        for ticket in failed:
            ticket.codes.set_exception(EngineError(message))
