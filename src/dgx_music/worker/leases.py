"""The leases of what a worker runs: renewed while it lives, rescued where another worker has died.

Three loops beside the work, none of which can be held up by it: the model is in another process.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

import anyio

from dgx_music.artifacts import Artifacts
from dgx_music.config import Settings
from dgx_music.errors import ArtifactError, DatabaseUnavailableError
from dgx_music.forecast import Speedometer
from dgx_music.storage import due, prompts, queue, statistics, workers
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database
from dgx_music.storage.estimates import record_speed
from dgx_music.storage.queue import Claim, Held, Lease

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_CANCEL_LOOK_SECONDS = 0.1
_TIDY_SECONDS = 60.0
_MISSED_SECONDS = 1.0
_SILENCE = 0.6
_LEAST_PAUSE_SECONDS = 0.05


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


class Watch:
    """Until when the leases of the fleet hold, on this process's own clock: the database's may be set back or forward.

    A lease holds for its whole length after it was first seen as it is; where the database's clock is to be trusted, for
    what that says is left of it. One that was renewed is another lease.
    """

    def __init__(self, length_seconds: float) -> None:
        self._length_seconds = length_seconds
        self._until: dict[tuple[Lease, datetime], float] = {}

    def look(self, held: Mapping[Lease, Held], clock: float, now: datetime | None) -> dict[Lease, datetime]:
        """Return which of the leases that are held have lapsed, each with its end on the database's clock.

        ``clock`` is this process's; ``now`` is the database's, ``None`` where that is not to be trusted.
        """
        former = self._until
        self._until = {
            (lease, each.expires_at): former.get((lease, each.expires_at), clock + self._left(each, now))
            for lease, each in held.items()
        }
        return {lease: expires_at for (lease, expires_at), until in self._until.items() if until <= clock}

    def forget(self) -> None:
        """Have every lease seen anew: the living could not renew them."""
        self._until.clear()

    def next_after(self, clock: float) -> float:
        """Return when the next of these leases lapses, unless it is renewed."""
        return min((until for until in self._until.values() if until > clock), default=math.inf)

    def _left(self, held: Held, now: datetime | None) -> float:
        length = held.length_seconds or self._length_seconds
        return length if now is None else min(max((held.expires_at - now).total_seconds(), 0.0), length)


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
        self._watch = Watch(settings.lease_seconds)
        self._renewed_at: float | None = None
        self._looked_at: float | None = None
        self._last_now: datetime | None = None
        self._last_tidying = -math.inf

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
        while True:
            pause = self._settings.heartbeat_seconds
            if (self.running or self._has_to_be_heard(pause)) and not await self._renew():
                pause = min(pause, _MISSED_SECONDS)
            await anyio.sleep(pause)

    def _has_to_be_heard(self, pause: float) -> bool:
        """Return True where a third of a lease would have passed unheard before the next beat."""
        last = self._renewed_at
        return last is None or time.monotonic() + pause - last > self._settings.lease_seconds / 3

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
        self._renewed_at = time.monotonic()
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
        """Rescue what lost workers left, a few times in each lease, and whenever one of their leases lapses."""
        while True:
            try:
                await self._record_speeds()
                await self.hasten()
                await self._rescue()
                await self._tidy()
            except DatabaseUnavailableError as error:
                logger.warning("worker %s: cannot rescue: %s", self._worker_id, error)
            clock = time.monotonic()
            pause = self._settings.lease_seconds / 4 * self._rng.uniform(0.8, 1.2)
            await anyio.sleep(max(_LEAST_PAUSE_SECONDS, min(pause, self._watch.next_after(clock) - clock)))

    async def _record_speeds(self) -> None:
        """Tell what was measured since the last time; never with the heartbeat, which nobody else's write may hold up."""
        device = str(self._describe()["device"])
        news = self.speeds.take()
        try:
            for model in [*news]:
                async with self._database.session() as session:
                    await record_speed(session, model, device, *news[model])
                del news[model]
        finally:
            self.speeds.put_back(news)

    async def hasten(self) -> None:
        """Make due what was due at once before the database's clock went back; looking for it takes no lock."""
        models = self._describe()["models"]
        for model in await self._database.transact(lambda session: due.find_overtaken(session, models), read_only=True):
            logger.warning(
                "worker %s: the database's clock has gone back; what waited of %s is due", self._worker_id, model
            )
            while await self._hasten(model) == queue.RESCUE_CHUNK:
                pass

    async def _hasten(self, model: str) -> int:
        return await self._database.transact(lambda session: queue.hasten(session, model))

    async def _rescue(self) -> None:
        lapsed = [*(await self._find_lapsed()).items()]
        for start in range(0, len(lapsed), queue.RESCUE_CHUNK):
            async with self._database.session() as session:
                rescued = await queue.rescue(session, dict(lapsed[start : start + queue.RESCUE_CHUNK]))
            for item in rescued:
                lease = item.lease
                logger.warning(
                    "generation %s attempt %d: worker lost, now %s", lease.generation_id, lease.attempt, item.status
                )
                await self.drop_files(lease, [lease.attempt])

    async def drop_files(self, lease: Lease, attempts: Iterable[int]) -> None:
        """Delete the files of attempts that can never complete; where that fails, the next attempt or a prune does."""
        try:
            await self._artifacts.delete(lease.generation_id, attempts)
        # Python raises RuntimeError for a thread that it cannot start.
        except (ArtifactError, MemoryError, RuntimeError) as error:
            logger.warning("generation %s attempt %d: %s", lease.generation_id, lease.attempt, error)

    async def _find_lapsed(self) -> dict[Lease, datetime]:
        """Return the leases that have lapsed, but for those in hand, each with its end."""
        async with self._database.session(read_only=True) as session:
            now = await queue.read_clock(session)
            if self._looked_at is None and not self._database.is_embedded:
                await self._note_silence(session)
            held = await queue.find_leases(session)
        others = {lease: each for lease, each in held.items() if lease not in self.running}
        return self.look(others, time.monotonic(), now)

    def look(self, held: Mapping[Lease, Held], clock: float, now: datetime) -> dict[Lease, datetime]:
        """Return which leases have lapsed; ``clock`` is this process's, ``now`` the database's, both of this moment.

        Whoever could not renew or look for long gives everybody a whole lease more: a database that was away, or took no
        writes, has kept the living from renewing as well. And where the database's clock has jumped ahead, or the machine has
        slept, leases only look dead by it. Who lived at the last look had renewed at most a third of a lease before it
        (the longest heartbeat allowed), so that no living lease can have run out within two thirds.
        """
        longest = _SILENCE * self._settings.lease_seconds
        is_silenced = any(clock - last > longest for last in (self._renewed_at, self._looked_at) if last is not None)
        has_jumped = self._last_now is not None and (now - self._last_now).total_seconds() > longest
        if is_silenced:
            self._watch.forget()
        self._looked_at, self._last_now = clock, now
        return self._watch.look(held, clock, None if is_silenced or has_jumped else now)

    async def _note_silence(self, session: AsyncSession) -> None:
        """Let a new worker wait one lease where another is silent: a server that was away may have silenced it.

        A server that is back is heard of by one worker after another: that one of them has renewed its leases already does
        not mean that the others have had the time to.
        """
        since = await workers.longest_silent(session, but=self._worker_id)
        if since is not None:
            self._last_now = since

    async def _tidy(self) -> None:
        """Once a minute, make up for what enqueues and triggers left to be done."""
        if time.monotonic() - self._last_tidying < _TIDY_SECONDS:
            return
        while await self._database.transact(statistics.compact_tallies) == statistics.TALLY_CHUNK:
            pass
        await self._database.transact(prompts.count_overlooked_prompts)
        self._last_tidying = time.monotonic()
