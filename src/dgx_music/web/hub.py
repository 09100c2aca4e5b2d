"""One look at the database for all who watch: what has changed becomes events for each of them.

Nobody who watches has a database session. While there are viewers, the hub reads the states of all
rows that they watch, by their keys: at once after a hint that something has changed, and at least
once a second. Rows have no change number, so it compares each state with the one before.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dgx_music.errors import DatabaseError
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.watching import Seen, State, look_at, read_queue
from dgx_music.web.history import History
from dgx_music.web.problems import RETRY_SECONDS, TOO_MANY_STREAMS, ProblemError
from dgx_music.web.stops import Stops, is_server_stopping
from dgx_music.web.viewers import Event, Kind, Pings, ShownRow, Viewer, message, to_json
from dgx_music.web.watched import WatchedRow, WatchedRows

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from dgx_music.storage.connection.changes import Subscription

MOST_WATCHED = 5_000
"""How many rows may be watched at a time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often the hub does what."""

    look_seconds: float = 1.0
    """It looks at unfinished rows, and at the queue, at least so often."""
    least_seconds: float = 0.1
    """It looks at most so often, however many hints there are."""
    finished_seconds: float = 2.0
    """It looks at finished rows so often: they may get a star, be tried again, or be deleted."""
    ping_seconds: float = 15.0
    """A stream says so often that it is alive, if there is nothing else to say."""
    stream_seconds: float = 900.0
    """A stream ends after so long; its client comes again, and is asked for its token again."""


@dataclass(frozen=True)
class _Look:
    """What one look reads."""

    ids: Collection[str]
    known: Mapping[str, State]
    tenants: Collection[str | None]

    async def read(self, session: AsyncSession) -> tuple[Seen, dict[str | None, dict[str, Any]]]:
        queues = {tenant: await read_queue(session, tenant) for tenant in self.tenants}
        return await look_at(session, self.ids, self.known), queues


class Hub:
    """All viewers of one process, the rows that they watch, and the last events."""

    def __init__(self, stops: Stops, most_streams: int, pace: Pace | None = None) -> None:
        self.pace = pace or Pace()
        self._stops = stops
        self._most_streams = most_streams
        self._history = History()
        self._viewers: set[Viewer] = set()
        self._pings = Pings(self._viewers)
        self._new: set[Viewer] = set()
        self._rows = WatchedRows()
        self._queue_viewers: Counter[str | None] = Counter()
        self._queues: dict[str | None, dict[str, Any]] = {}
        self._is_stale = False
        self._queues_read_at = self._finished_read_at = float("-inf")
        self._running: asyncio.Task[None] | None = None
        self._changes: Subscription | None = None

    def join(self, viewer: Viewer) -> None:
        """Let the viewer watch; raises ``ProblemError`` if there are too many."""
        self._check_room(viewer)
        if not self._viewers:
            self._pings.begin(self.pace.ping_seconds)
        self._viewers.add(viewer)
        self._new.add(viewer)
        self._rows.join(viewer)
        if viewer.has_queue:
            self._queue_viewers[viewer.view.tenant] += 1
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run(), name="dgx-music-events")
        self._wake()

    def leave(self, viewer: Viewer) -> None:
        """Forget the viewer; does nothing if it has left."""
        if viewer not in self._viewers:
            return
        self._viewers.discard(viewer)
        self._new.discard(viewer)
        self._rows.leave(viewer)
        if viewer.has_queue:
            self._forget_queue(viewer.view.tenant)
        if not self._viewers:
            self._wake()

    def take(self, viewer: Viewer) -> bytes:
        """Return what is to be sent to the viewer now: its events, or a snapshot."""
        needs_snapshot, events = viewer.needs_snapshot, viewer.take()
        if needs_snapshot:
            return self._snapshot(viewer)
        return b"".join(event.text(viewer.view) for event in events)

    def is_over(self, viewer: Viewer) -> bool:
        """Return True if nothing will be sent to the viewer any more."""
        if viewer.is_ended or viewer.has_news or not viewer.is_until_end:
            return viewer.is_ended
        return not any(self._rows[each].is_live for each in viewer.ids)

    def finds(self, viewer: Viewer, generation_id: str) -> bool:
        """Return True if there is such a row and the viewer may see it."""
        row = self._rows.get(generation_id)
        shown = None if row is None else row.shown
        return shown is not None and viewer.sees(shown.row.tenant)

    def _check_room(self, viewer: Viewer) -> None:
        what = None
        if len(self._viewers) >= self._most_streams:
            what = f"{self._most_streams:,} streams are open"
        elif self._rows.count_with(viewer) > MOST_WATCHED:
            what = f"{MOST_WATCHED:,} generations are watched"
        if what is not None:
            detail = f"{what}, and the server allows no more; try again in some seconds."
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise ProblemError(TOO_MANY_STREAMS, detail, headers=headers)

    def _forget_queue(self, tenant: str | None) -> None:
        self._queue_viewers[tenant] -= 1
        if not self._queue_viewers[tenant]:
            del self._queue_viewers[tenant]
            self._queues.pop(tenant, None)

    def _wake(self) -> None:
        if self._changes is not None:
            self._changes.wake()

    async def _run(self) -> None:
        """Look again and again while there are viewers."""
        error: Exception | None = None
        try:
            database = await ensure_database()
            with database.changes.subscribe() as changes:
                self._changes = changes
                while self._viewers:
                    await self._look_once(database)
                    await self._rest(changes)
        except Exception as raised:
            error = raised
            logger.exception("web: the hub of the streams has failed, and they end")
        finally:
            self._changes = None
            for viewer in self._viewers:
                viewer.end(error)

    async def _rest(self, changes: Subscription) -> None:
        """Wait for a hint or a new viewer, not for long; several at a time cost one look."""
        await asyncio.sleep(self.pace.least_seconds)
        if is_server_stopping():
            self._stops.stop()
        if self._viewers:
            await changes.wait(self.pace.look_seconds - self.pace.least_seconds)

    async def _look_once(self, database: Database) -> None:
        new, self._new = self._new, set()
        look = self._plan(new)
        if look.ids or look.tenants:
            try:
                seen, queues = await database.transact(look.read, read_only=True)
            except DatabaseError as error:
                self._tell_stale(error)
                for viewer in new:
                    viewer.end(error)
                return
            self._tell_stale(None)
            self._note_rows(look, seen)
            self._note_queues(queues)
        for viewer in new & self._viewers:
            viewer.open(self._missed(viewer))

    def _plan(self, new: Collection[Viewer]) -> _Look:
        """Return what is to be looked at now."""
        now = asyncio.get_running_loop().time()
        pace = self.pace
        if now - self._finished_read_at >= pace.finished_seconds or self._is_stale:
            self._finished_read_at = now
            ids: Collection[str] = [*self._rows]
        else:
            of_new = dict.fromkeys(each for viewer in new for each in viewer.ids)
            live = (each for each in self._rows if self._is_live(each))
            ids = dict.fromkeys((*of_new, *live))
        if now - self._queues_read_at >= pace.look_seconds * 0.9:
            self._queues_read_at = now
            tenants = [*self._queue_viewers]
        else:
            tenants = [each for each in self._queue_viewers if each not in self._queues]
        known = {
            each: row.state
            for each in ids
            if (row := self._rows.get(each)) is not None and row.state is not None
        }
        return _Look(ids, known, tenants)

    def _is_live(self, generation_id: str) -> bool:
        row = self._rows.get(generation_id)
        return row is not None and row.is_live

    def _note_rows(self, look: _Look, seen: Seen) -> None:
        for each in look.ids:
            if not self._rows.watchers_of(each):
                continue  # everybody has left meanwhile
            state, row = seen.states.get(each), seen.rows.get(each)
            shown = None if row is None else ShownRow(row)
            watched = self._rows.get(each)
            if watched is not None and watched.state != state:
                self._note_change(each, state, shown)
            # A state without its row was known before the look, and has been forgotten meanwhile.
            elif watched is None and (state is None or row is not None):
                self._rows[each] = WatchedRow(self._history.number, state, shown)

    def _note_change(self, generation_id: str, state: State | None, shown: ShownRow | None) -> None:
        watched = self._rows[generation_id]
        latest = shown or watched.shown
        watched.state, watched.shown = state, shown
        event = self._history.add(
            Kind.GENERATION if shown else Kind.GONE,
            shown or {"id": generation_id},
            generation_id=generation_id,
            tenant=None if latest is None else latest.row.tenant,
        )
        self._tell(event, self._rows.watchers_of(generation_id))

    def _note_queues(self, queues: Mapping[str | None, dict[str, Any]]) -> None:
        for tenant, queue in queues.items():
            former = self._queues.get(tenant)
            if tenant in self._queue_viewers:
                self._queues[tenant] = queue
            if former not in (None, queue):
                self._tell(self._history.add(Kind.QUEUE, queue, tenant=tenant), self._viewers)

    def _tell_stale(self, error: Exception | None) -> None:
        """Say that the database is away, and that it is back; each once."""
        is_stale = error is not None
        if is_stale == self._is_stale:
            return
        self._is_stale = is_stale
        logger.warning("web: streams are %s", f"stale: {error}" if is_stale else "live again")
        self._tell(self._history.add(Kind.STALE, {"stale": is_stale}), self._viewers)

    def _tell(self, event: Event, viewers: Iterable[Viewer]) -> None:
        for viewer in viewers:
            if viewer.hears(event):
                viewer.push(event)

    def _missed(self, viewer: Viewer) -> list[Event] | None:
        """Return the events since the last one that the viewer has; ``None`` if not all are known."""
        last = self._history.number_of(viewer.last_id)
        if last is None or any(self._rows[each].since > last for each in viewer.ids):
            return None
        later = self._history.after(last)
        missed = [event for event in later if viewer.hears(event) and event.kind != Kind.QUEUE]
        if viewer.has_queue:
            tenant = viewer.view.tenant
            missed.append(
                Event(self._history.last_id, Kind.QUEUE, self._queues[tenant], tenant=tenant)
            )
        return missed

    def _snapshot(self, viewer: Viewer) -> bytes:
        """Return all that the viewer watches, as an event."""
        there = {each for each in viewer.ids if self.finds(viewer, each)}
        shown = [self._rows[each].shown for each in viewer.ids if each in there]
        rows = [each.text(viewer.view) for each in shown if each is not None]
        rest = {
            "gone": [each for each in viewer.ids if each not in there],
            "queue": self._queues.get(viewer.view.tenant) if viewer.has_queue else None,
            "stale": self._is_stale,
        }
        text = f'{{"generations":[{",".join(rows)}],{to_json(rest)[1:]}'
        return message(self._history.last_id, Kind.SNAPSHOT, text)
