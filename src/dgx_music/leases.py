"""The leases of what a worker runs: renewed while it lives, rescued where another worker has died.

Three loops beside the work, none of which can be held up by it: the model is in another process.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import anyio

from dgx_music.artifacts import Artifacts
from dgx_music.config import Settings
from dgx_music.errors import ArtifactError, DatabaseUnavailableError
from dgx_music.forecast import Speedometer
from dgx_music.storage import queue, repository, workers
from dgx_music.storage.changes import Topic
from dgx_music.storage.database import Database
from dgx_music.storage.estimates import record_speed
from dgx_music.storage.queue import Claim, Lease

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_CANCEL_LOOK_SECONDS = 0.1
_TIDY_SECONDS = 60.0
_MISSED_SECONDS = 1.0
_SILENCE = 0.6


class Stop(Enum):
    """Why a running generation is stopped from outside."""

    CANCELLED = "cancel requested"
    LOST = "lease lost"
    RELEASED = "worker stops"
    REFUSED = "completion refused"


@dataclass
class Running:
    """One generation in hand."""

    claim: Claim
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    progress: float = 0.0
    stopped_for: Stop | None = None
    has_slot: bool = True
    is_completing: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def lease(self) -> Lease:
        """What lets us write the row."""
        return self.claim.lease

    def stop(self, reason: Stop) -> None:
        """Stop it, unless its completion is being written: then that write says who owns the row."""
        if self.stopped_for is None and not self.is_completing:
            self.stopped_for = reason
            self.scope.cancel()


class Leases:
    """What one worker has in hand, by lease, and the loops that look after it."""

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        settings: Settings,
        rng: random.Random,
        describe: Callable[[], dict[str, Any]],
    ) -> None:
        self.running: dict[Lease, Running] = {}
        self.free_workers = 1
        """How many workers, this one included, would claim what is due now, as the last heartbeat has found."""
        self.speeds = Speedometer()
        self._describe = describe
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._rng = rng
        self._last_sweep: float | None = None
        self._last_tidying = -math.inf
        self._no_rescue_before = 0.0

    @property
    def _worker_id(self) -> str:
        return str(self._describe()["id"])

    @property
    def loops(self) -> tuple[Callable[[], Coroutine[Any, Any, None]], ...]:
        """What has to run beside the work, for ever."""
        return self.beat, self.notice_cancels, self.sweep

    def add(self, claim: Claim) -> Running:
        """Take a claimed generation in hand."""
        running = self.running[claim.lease] = Running(claim)
        return running

    async def beat(self) -> None:
        """Renew every lease and the worker's own row; an idle worker says only now and then that it lives."""
        last = -math.inf
        while True:
            pause = self._settings.heartbeat_seconds
            if self.running or time.monotonic() - last > self._settings.lease_seconds / 3:
                if not await self._renew():
                    pause = min(pause, _MISSED_SECONDS)
                last = time.monotonic()
            await anyio.sleep(pause)

    async def _renew(self) -> bool:
        """Renew, and stop what was lost or cancelled; return False where the database could not be asked."""
        held = {lease: running.progress for lease, running in self.running.items()}
        try:
            async with self._database.session() as session:
                own = self._describe()
                await workers.heartbeat_worker(session, **own, running_count=len(held))
                renewed = await queue.renew(session, held, lease_seconds=self._settings.lease_seconds)
                self.free_workers = await workers.count_free_workers(session, own["model_name"])
        except DatabaseUnavailableError as error:
            logger.warning("worker %s: heartbeat missed: %s", self._worker_id, error)
            return False
        for lease in held:
            if lease not in renewed:
                self._stop(lease, Stop.LOST)
            elif renewed[lease]:
                self._stop(lease, Stop.CANCELLED)
        return True

    async def notice_cancels(self) -> None:
        """Look for cancel requests whenever the database changes, not only at the next heartbeat."""
        with self._database.changes.subscribe(Topic.CANCEL, [self._worker_id]) as changes:
            while True:
                await changes.wait(self._settings.poll_seconds)
                if self.running:
                    await self._stop_cancelled()
                    await anyio.sleep(_CANCEL_LOOK_SECONDS)

    async def _stop_cancelled(self) -> None:
        try:
            async with self._database.session(read_only=True) as session:
                wanted = await queue.find_cancel_requests(session, self._worker_id)
        except DatabaseUnavailableError as error:
            logger.warning("worker %s: cannot look for cancels: %s", self._worker_id, error)
            return
        for lease in wanted:
            self._stop(lease, Stop.CANCELLED)

    def _stop(self, lease: Lease, reason: Stop) -> None:
        if lease in self.running:
            self.running[lease].stop(reason)

    async def sweep(self) -> None:
        """Rescue what lost workers left, a few times in each lease."""
        while True:
            try:
                await self._record_speeds()
                await self._rescue()
                await self._tidy()
            except (DatabaseUnavailableError, ArtifactError) as error:
                logger.warning("worker %s: cannot rescue: %s", self._worker_id, error)
            await anyio.sleep(self._settings.lease_seconds / 4 * self._rng.uniform(0.8, 1.2))

    async def _record_speeds(self) -> None:
        """Tell what was measured since the last time; never with the heartbeat, which nobody else's write may hold up."""
        device = str(self._describe()["device"])
        for model, measured in self.speeds.take().items():
            async with self._database.session() as session:
                await record_speed(session, model, device, *measured)

    async def _rescue(self) -> None:
        rescued = None
        while rescued is None or len(rescued) == queue.RESCUE_CHUNK:
            async with self._database.session() as session:
                now = await queue.read_clock(session)
                if self._last_sweep is None and not self._database.is_embedded:
                    await self._note_silence(session)
                rescued = await queue.rescue(session) if self.may_rescue(now.timestamp()) else []
            for item in rescued:
                lease = item.lease
                logger.warning(
                    "generation %s attempt %d: worker lost, now %s", lease.generation_id, lease.attempt, item.status
                )
                await self._artifacts.delete(lease.generation_id, [lease.attempt])

    async def _note_silence(self, session: AsyncSession) -> None:
        """Let a new worker wait one lease where another is silent: a server that was away may have silenced it.

        That of all but one, and a third who was quick to be heard again says nothing of the rest.
        """
        since = await workers.longest_silent(session, but=self._worker_id)
        if since is not None:
            self._last_sweep = since.timestamp()

    async def _tidy(self) -> None:
        """Once a minute, make up for what enqueues and triggers left to be done."""
        if time.monotonic() - self._last_tidying < _TIDY_SECONDS:
            return
        self._last_tidying = time.monotonic()
        while await self._database.transact(repository.compact_tallies) == repository.TALLY_CHUNK:
            pass
        await self._database.transact(repository.count_overlooked_prompts)

    def may_rescue(self, now: float) -> bool:
        """Return False for one lease after too long without a sweep; ``now`` is what the database's clock has just said.

        A database that was away, or a machine that slept, makes leases look dead: give the living time to renew. Who lived at
        the last sweep had renewed at most a third of a lease before it (the longest heartbeat allowed), so that no living
        lease can have run out within two thirds. The leases are of that clock, so the gap is measured on it too; a
        monotonic one would stand still in sleep.
        """
        if self._last_sweep is not None and now - self._last_sweep > _SILENCE * self._settings.lease_seconds:
            self._no_rescue_before = now + self._settings.lease_seconds
        self._last_sweep = now
        return now >= self._no_rescue_before
