"""How many slots there are: as many as were asked for, and fewer after memory has run out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from dgx_music.inference.engine import Run
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.trouble import first_line, give_back_memory, is_out_of_memory

logger = logging.getLogger(__name__)


class SlotSupply:
    """Makes the slots, gives them up, and goes on with fewer of them if memory runs out.

    For one thread at a time. Each time the number shrinks, ``on_shrink`` is called with it and the
    error.
    """

    def __init__(
        self,
        make_slots: Callable[[int], Slots],
        slot_count: int,
        on_shrink: Callable[[int, BaseException], None],
    ) -> None:
        self.slot_count = slot_count
        """How many rows fit into memory; may shrink, never grows."""
        self._make_slots = make_slots
        self._on_shrink = on_shrink
        self.slots: Slots | None = self._make_fresh()
        """``None`` after they are given up."""

    def has_room(self) -> bool:
        """Return whether one more row may be admitted.

        Gives up the slots if they are empty and have become too many.
        """
        if (
            self.slots is not None
            and self.slots.slot_count > self.slot_count
            and not self.slots.rows
        ):
            self.give_up()
        return self.slots is None or (
            len(self.slots.rows) < self.slot_count and self.slots.has_room
        )

    def get(self) -> Slots:
        """Return the slots, fresh ones if they were given up.

        Raises the error if no single one fits.
        """
        if self.slots is None:
            give_back_memory()  # of the slots that were given up
            self.slots = self._make_fresh()
        return self.slots

    def give_up(self) -> None:
        """Let go of the slots and of all rows in them."""
        slots, self.slots = self.slots, None
        if slots is not None:
            with suppress(Exception):  # if the device is lost, this fails as well
                slots.close()

    def make_room(self, run: Run, error: BaseException) -> bool:
        """Free memory after the error; return whether there was anything to free.

        Idle engines give way first. Then as many slots remain as are occupied, or half of them if
        none is. If the last slot is too many, it is given up.
        """
        give_back_memory(error)
        if run.make_room():
            return True
        if self.slot_count > 1:
            occupied = 0 if self.slots is None else len(self.slots.rows)
            self._shrink(occupied or self.slot_count // 2, error)
            return True
        self.give_up()
        return False

    def _make_fresh(self) -> Slots:
        """Return as many empty slots as fit into memory. Raises the error if no single one fits."""
        while True:
            try:
                return self._make_slots(self.slot_count)
            except Exception as error:
                if self.slot_count == 1 or not is_out_of_memory(error):
                    raise
                give_back_memory(error)
                self._shrink(self.slot_count // 2, error)

    def _shrink(self, slot_count: int, error: BaseException) -> None:
        logger.warning(
            "no memory for %d slots, %d from now on: %s",
            self.slot_count,
            slot_count,
            first_line(error),
        )
        self.slot_count = slot_count
        self._on_shrink(slot_count, error)
