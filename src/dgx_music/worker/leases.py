"""What a worker runs, by lease: the leases are renewed, and cancel requests are noticed.

Two loops beside the work, which cannot hold them up: the model is in another process.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

import anyio

from dgx_music.config import Settings
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import queue
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Claim, Lease
from dgx_music.worker.presence import Presence

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_CANCEL_LOOK_SECONDS = 0.1
_MISSED_SECONDS = 1.0


class Stop(Enum):
    """Why a running generation is stopped from outside."""

    CANCELLED = "cancel requested"
    LOST = "lease lost"
    RELEASED = "worker stops"
    REFUSED = "completion refused"


@dataclass
class Running:
    """One generation that this worker runs."""

    claim: Claim
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    progress: float = 0.0
    stopped_for: Stop | None = None
    has_slot: bool = True
    is_in_engine: bool = True
    """From the claim until its audio is made."""
    is_completing: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def lease(self) -> Lease:
        """What lets us write the row."""
        return self.claim.lease

    def note_progress(self, progress: float) -> None:
        """Keep the progress, from 0 to 1, for the next renewal."""
        if 0 <= progress <= 1:
            self.progress = progress

    def free_slot(self) -> None:
        """Note that the engine's slot can serve another generation."""
        self.has_slot = False

    def leave_engine(self) -> None:
        """Note that the engine has nothing more to do for it."""
        self.has_slot = self.is_in_engine = False

    def stop(self, reason: Stop) -> None:
        """Stop it, unless its completion is being written: that write says who owns the row."""
        if self.stopped_for is None and not self.is_completing:
            self.stopped_for = reason
            self.scope.cancel()

    def begin_completion(self) -> None:
        """From here on no stop can win."""
        self.is_completing = True

    def end_completion(self, *, is_done: bool) -> None:
        """Note whether the row is completed; if not, the attempt is over all the same."""
        self.is_completing = False
        if not is_done:
            self.stopped_for = Stop.REFUSED


class Leases:
    """What one worker runs, by lease, and the loops that look after it."""

    def __init__(self, database: Database, settings: Settings, presence: Presence) -> None:
        self.running: dict[Lease, Running] = {}
        self.undecided: set[Lease] = set()
        """Leases whose completion was cancelled while it was written.

        It may still be committed, so they are never released; they expire.
        """
        self.renewed_at: float | None = None
        """When the last renewal succeeded, on this process's clock."""
        self._database = database
        self._settings = settings
        self._presence = presence

    @property
    def worker_id(self) -> str:
        """Whose leases these are."""
        return self._presence.id

    def add(self, claim: Claim) -> Running:
        """Add a claimed generation."""
        running = self.running[claim.lease] = Running(claim)
        return running

    def remove(self, lease: Lease) -> None:
        """Remove a generation that has ended here."""
        del self.running[lease]

    def leave_undecided(self, lease: Lease) -> None:
        """Never release this lease; see ``undecided``."""
        self.undecided.add(lease)

    async def beat(self) -> None:
        """Renew every lease and the worker's own row; an idle worker does so less often."""
        while True:
            pause = self._settings.heartbeat_seconds
            if (self.running or self._has_to_be_heard(pause)) and not await self.renew():
                pause = min(pause, _MISSED_SECONDS)
            await anyio.sleep(pause)

    def _has_to_be_heard(self, pause: float) -> bool:
        """Return True if a third of a lease would have passed unheard before the next beat."""
        last = self.renewed_at
        return last is None or time.monotonic() + pause - last > self._settings.lease_seconds / 3

    async def renew(self) -> bool:
        """Renew, and stop what was lost or cancelled; return False if the database was away."""
        held = {lease: running.progress for lease, running in self.running.items()}

        async def work(session: AsyncSession) -> dict[Lease, bool]:
            await self._presence.renew(session, running_count=len(held))
            renewed = await queue.renew(
                session,
                held,
                lease_seconds=self._settings.lease_seconds,
            )
            await self._presence.count_free_workers(session)
            return renewed

        try:
            renewed = await self._database.transact(work)
        except DatabaseUnavailableError as error:
            logger.warning("worker %s: heartbeat missed: %s", self.worker_id, error)
            return False
        self.renewed_at = time.monotonic()
        for lease in held:
            if lease not in renewed:
                self._stop(lease, Stop.LOST)
            elif renewed[lease]:
                self._stop(lease, Stop.CANCELLED)
        return True

    async def notice_cancels(self) -> None:
        """Look for cancel requests when the database changes, not only at the next heartbeat."""
        hints = Topic.CANCEL, [self.worker_id]
        with self._database.changes.subscribe(*hints) as changes:
            while True:
                await changes.wait(self._settings.poll_seconds)
                if self.running:
                    await self._stop_cancelled()
                    await anyio.sleep(_CANCEL_LOOK_SECONDS)

    async def _stop_cancelled(self) -> None:
        try:
            async with self._database.session(read_only=True) as session:
                wanted = await queue.find_cancel_requests(session, self.worker_id)
        except DatabaseUnavailableError as error:
            logger.warning("worker %s: cannot look for cancels: %s", self.worker_id, error)
            return
        for lease in wanted:
            self._stop(lease, Stop.CANCELLED)

    def _stop(self, lease: Lease, reason: Stop) -> None:
        if lease in self.running:
            self.running[lease].stop(reason)
