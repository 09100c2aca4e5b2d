"""The last events of one process, for viewers who come again."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping
from typing import Any

from dgx_music.web.viewers import Event, Kind, ShownRow

EVENTS_KEPT = 1_000
"""How many events a viewer who comes again may have missed."""


class History:
    """Numbers all events, and keeps the last ones.

    An id is ``epoch-number``. Each process has an epoch of its own, so that an id of another one
    is known to be foreign.
    """

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(4)
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.number = 0
        """The number of the last event."""

    @property
    def last_id(self) -> str:
        """The id of the last event."""
        return f"{self._epoch}-{self.number}"

    def add(
        self,
        kind: Kind,
        content: ShownRow | Mapping[str, Any],
        *,
        generation_id: str | None = None,
        tenant: str | None = None,
    ) -> Event:
        """Add an event and return it."""
        self.number += 1
        event = Event(self.last_id, kind, content, generation_id, tenant)
        self._events.append(event)
        return event

    def number_of(self, event_id: str | None) -> int | None:
        """Return the number in the id, if all later events are still known; else ``None``."""
        epoch, _, text = (event_id or "").partition("-")
        if epoch != self._epoch or not (text.isascii() and text.isdecimal() and len(text) <= 18):
            return None
        number = int(text)
        return number if 0 <= self.number - number <= len(self._events) else None

    def after(self, number: int) -> list[Event]:
        """Return the events after the one with this number."""
        kept = [*self._events]
        return kept[len(kept) - (self.number - number) :]
