"""Those who watch generations live: what each may see, and the events that wait for each."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from dgx_music.storage import Generation

MOST_WAITING = 64
"""If more events than this wait for a viewer, a snapshot takes their place."""


class Kind(StrEnum):
    """The names of the events."""

    SNAPSHOT = "snapshot"
    GENERATION = "generation"
    GONE = "gone"
    QUEUE = "queue"
    STALE = "stale"


@dataclass(frozen=True)
class View:
    """What somebody may see of a row, and how."""

    key: Hashable
    """Viewers with the same key see the same of each row."""
    tenant: str | None
    """Whose rows are seen; ``None``: all."""
    show: Callable[[Generation], Mapping[str, Any]]


class ShownRow:
    """A row, made into JSON once for all viewers who see the same of it."""

    def __init__(self, row: Generation) -> None:
        self.row = row
        self._texts: dict[Hashable, str] = {}

    def text(self, view: View) -> str:
        """Return the row as this view shows it, as JSON."""
        if view.key not in self._texts:
            self._texts[view.key] = to_json(view.show(self.row))
        return self._texts[view.key]


@dataclass(frozen=True, eq=False)
class Event:
    """Something that has happened, for everybody who watches it."""

    id: str
    kind: Kind
    content: ShownRow | Mapping[str, Any]
    generation_id: str | None = None
    tenant: str | None = None
    """Of a row: whose it is. Of a queue: whose viewers hear it; ``None``: those who see all."""
    _texts: dict[Hashable, bytes] = field(default_factory=dict)

    def text(self, view: View) -> bytes:
        """Return the event as it is sent."""
        if isinstance(self.content, ShownRow):
            if view.key not in self._texts:
                self._texts[view.key] = message(self.id, self.kind, self.content.text(view))
            return self._texts[view.key]
        return message(self.id, self.kind, to_json(self.content))


class Viewer:
    """One stream: what it watches, and what is still to be sent to it."""

    def __init__(
        self,
        view: View,
        ids: Collection[str],
        *,
        last_id: str | None = None,
        has_queue: bool = False,
        is_until_end: bool = False,
    ) -> None:
        self.view = view
        self.ids = dict.fromkeys(ids)
        self.last_id = last_id
        """The id of the last event that it has, if it was here before."""
        self.has_queue = has_queue
        self.is_until_end = is_until_end
        """Whether it ends with the generation that it watches."""
        self.waiting: deque[Event] = deque()
        self.needs_snapshot = False
        self.is_ended = False
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when its first events wait; raises ``DatabaseError`` if there are none."""
        self._has_news = asyncio.Event()

    @property
    def has_news(self) -> bool:
        """True if something is to be sent."""
        return self.needs_snapshot or bool(self.waiting)

    def hears(self, event: Event) -> bool:
        """Return True if the event is for this viewer, who then may see it."""
        match event.kind:
            case Kind.GENERATION | Kind.GONE:
                return event.generation_id in self.ids and self.sees(event.tenant)
            case Kind.QUEUE:
                return self.has_queue and event.tenant == self.view.tenant
        return True

    def sees(self, tenant: str | None) -> bool:
        """Return True if rows of this tenant may be seen."""
        return self.view.tenant in (None, tenant)

    def push(self, event: Event) -> None:
        """Have the event sent; if too many wait already, a snapshot instead of them all."""
        if not self.opened.done() or self.needs_snapshot:
            return  # what is sent first is made later, and has it
        if len(self.waiting) >= MOST_WAITING:
            self.ask_snapshot()
        else:
            self.waiting.append(event)
        self._has_news.set()

    def ask_snapshot(self) -> None:
        """Have a snapshot sent instead of all that waits."""
        self.waiting.clear()
        self.needs_snapshot = True
        self._has_news.set()

    def open(self, events: Collection[Event] | None) -> None:
        """Begin with these events, or with a snapshot."""
        if events is None or len(events) > MOST_WAITING:
            self.ask_snapshot()
        else:
            self.waiting.extend(events)
            self._has_news.set()
        if not self.opened.done():  # else the client has left
            self.opened.set_result(None)

    def end(self, error: Exception | None = None) -> None:
        """End the stream; if it has not begun, with this error if there is one."""
        self.is_ended = True
        self._has_news.set()
        if self.opened.done():
            return
        if error is None:
            self.opened.cancel()
        else:
            self.opened.set_exception(error)

    def ping(self) -> None:
        """Have the stream say that it is alive, unless there is something else to say."""
        self._has_news.set()

    async def wait(self) -> None:
        """Wait until there are news, a ping, or the end."""
        await self._has_news.wait()

    def take(self) -> list[Event]:
        """Return all events that wait, which then wait no longer."""
        taken = [*self.waiting]
        self.waiting.clear()
        self.needs_snapshot = False
        self._has_news.clear()
        return taken


class Pings:
    """Pings all viewers in turn, with one timer: one for each of them costs more than its events."""

    def __init__(self, viewers: Collection[Viewer]) -> None:
        self._viewers = viewers
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, seconds: float) -> None:
        """Ping so often while there are viewers; called when the first one has come."""
        if self._timer is not None:
            self._timer.cancel()  # the one of viewers who have left
        self._timer = asyncio.get_running_loop().call_later(seconds, self._ping, seconds)

    def _ping(self, seconds: float) -> None:
        for each in self._viewers:
            each.ping()
        if self._viewers:
            self.begin(seconds)


def message(event_id: str, kind: Kind, text: str) -> bytes:
    """Return an event as it is sent; the text is JSON, which has no line breaks."""
    return f"id: {event_id}\nevent: {kind}\ndata: {text}\n\n".encode()


def to_json(value: Any) -> str:
    """Return the value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
