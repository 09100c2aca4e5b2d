"""What a worker does from time to time for the whole fleet: rescue, record measured speeds, tidy.

One loop beside the work; a step that finds no database leaves the rest to the next sweep.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

import anyio

from dgx_music.artifacts import Artifacts
from dgx_music.config import Settings
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import due, prompts, queue, statistics, workers
from dgx_music.storage.database import Database
from dgx_music.storage.estimates import record_speed
from dgx_music.storage.queue import Held, Lease
from dgx_music.worker.leases import Leases
from dgx_music.worker.live_engine import LiveEngine
from dgx_music.worker.lost_files import drop_files

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_TIDY_SECONDS = 60.0
_SILENCE = 0.6
_LEAST_PAUSE_SECONDS = 0.05


class Watch:
    """Until when the leases of the fleet hold, on this process's own clock.

    The database's clock may be set back or forward. So a lease holds for its whole length after it
    was first seen as it is; if the database's clock is to be trusted, for what that says is left of
    it. A lease that was renewed is another lease.
    """

    def __init__(self, length_seconds: float) -> None:
        self._length_seconds = length_seconds
        self._until: dict[tuple[Lease, datetime], float] = {}

    def look(
        self,
        held: Mapping[Lease, Held],
        clock: float,
        now: datetime | None,
    ) -> dict[Lease, datetime]:
        """Return which of these leases have lapsed, each with its end on the database's clock.

        ``clock`` is this process's; ``now`` is the database's, ``None`` if that is not to be
        trusted.
        """
        left = {(lease, each.expires_at): self._left(each, now) for lease, each in held.items()}
        self._until = {key: self._until.get(key, clock + left[key]) for key in left}
        return {lease: end for (lease, end), until in self._until.items() if until <= clock}

    def forget(self) -> None:
        """Forget all leases: live workers could not renew theirs."""
        self._until.clear()

    def next_after(self, clock: float) -> float:
        """Return when the next of these leases lapses, unless it is renewed."""
        return min((until for until in self._until.values() if until > clock), default=math.inf)

    def _left(self, held: Held, now: datetime | None) -> float:
        length = held.length_seconds or self._length_seconds
        if now is None:
            return length
        return min(max((held.expires_at - now).total_seconds(), 0.0), length)


class Sweeping:
    """The loop that rescues what lost workers left, records this worker's speeds, and tidies."""

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        settings: Settings,
        engine: LiveEngine,
        leases: Leases,
        rng: random.Random,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._engine = engine
        self._leases = leases
        self._rng = rng
        self._watch = Watch(settings.lease_seconds)
        self._looked_at: float | None = None
        self._last_now: datetime | None = None
        self._last_tidying = -math.inf

    async def sweep(self) -> None:
        """Rescue a few times in each lease, and when another worker's lease lapses; for ever."""
        while True:
            try:
                await self.record_speeds()
                await self.hasten()
                await self.rescue()
                await self.tidy()
            except DatabaseUnavailableError as error:
                logger.warning("worker %s: cannot rescue: %s", self._leases.worker_id, error)
            clock = time.monotonic()
            pause = self._settings.lease_seconds / 4 * self._rng.uniform(0.8, 1.2)
            next_lapse = self._watch.next_after(clock) - clock
            await anyio.sleep(max(_LEAST_PAUSE_SECONDS, min(pause, next_lapse)))

    async def record_speeds(self) -> None:
        """Store what was measured since the last time.

        Never with the heartbeat: no other worker's write may hold that up.
        """
        device = self._engine.info.device
        news = self._engine.speeds.take()
        try:
            for model in [*news]:
                async with self._database.session() as session:
                    await record_speed(session, model, device, *news[model])
                del news[model]
        finally:
            self._engine.speeds.put_back(news)

    async def hasten(self) -> None:
        """Make due what was due at once before the database's clock went back.

        Looking for it takes no lock.
        """
        models = self._engine.models
        overtaken = await self._database.transact(
            lambda session: due.find_overtaken(session, models),
            read_only=True,
        )
        for model in overtaken:
            logger.warning(
                "worker %s: the database's clock has gone back; what waited of %s is due",
                self._leases.worker_id,
                model,
            )
            while await self._hasten(model) == queue.RESCUE_CHUNK:
                pass

    async def _hasten(self, model: str) -> int:
        return await self._database.transact(lambda session: queue.hasten(session, model))

    async def rescue(self) -> None:
        """Take the rows of lost workers, and delete the files of their attempts."""
        lapsed = [*(await self._find_lapsed()).items()]
        for start in range(0, len(lapsed), queue.RESCUE_CHUNK):
            async with self._database.session() as session:
                chunk = dict(lapsed[start : start + queue.RESCUE_CHUNK])
                rescued = await queue.rescue(session, chunk)
            for item in rescued:
                logger.warning("%s: worker lost, now %s", item.lease, item.status)
                await drop_files(self._artifacts, item.lease, [item.lease.attempt])

    async def _find_lapsed(self) -> dict[Lease, datetime]:
        """Return the leases of others that have lapsed, each with its end."""
        async with self._database.session(read_only=True) as session:
            now = await queue.read_clock(session)
            if self._looked_at is None and not self._database.is_embedded:
                await self._note_silence(session)
            held = await queue.find_leases(session)
        running = self._leases.running
        others = {lease: each for lease, each in held.items() if lease not in running}
        return self.look(others, time.monotonic(), now)

    def look(
        self,
        held: Mapping[Lease, Held],
        clock: float,
        now: datetime,
    ) -> dict[Lease, datetime]:
        """Return which of these leases have lapsed, each with its end on the database's clock.

        ``clock`` is this process's, ``now`` the database's, both of this moment.

        If this worker could not renew or look for long, everybody gets a whole lease more: a
        database that was away, or took no writes, has kept the living from renewing as well. And if
        the database's clock has jumped ahead, or the machine has slept, leases only look dead by
        it. A worker that lived at the last look had renewed at most a third of a lease before it
        (the longest heartbeat allowed), so no living lease can have run out within two thirds.
        """
        longest = _SILENCE * self._settings.lease_seconds
        last_times = self._leases.renewed_at, self._looked_at
        is_silenced = any(clock - last > longest for last in last_times if last is not None)
        has_jumped = self._last_now is not None and (now - self._last_now).total_seconds() > longest
        if is_silenced:
            self._watch.forget()
        self._looked_at, self._last_now = clock, now
        return self._watch.look(held, clock, None if is_silenced or has_jumped else now)

    async def _note_silence(self, session: AsyncSession) -> None:
        """Let a new worker wait one lease if another is silent: its server may have been away.

        The workers hear of a server that is back one after another: one of them may have renewed
        its leases already while the others have not had the time to.
        """
        since = await workers.longest_silent(session, other_than=self._leases.worker_id)
        if since is not None:
            self._last_now = since

    async def tidy(self) -> None:
        """Once a minute, do what enqueues and triggers have left to be done."""
        if time.monotonic() - self._last_tidying < _TIDY_SECONDS:
            return
        while await self._database.transact(statistics.compact_tallies) == statistics.TALLY_CHUNK:
            pass
        await self._database.transact(prompts.count_overlooked_prompts)
        self._last_tidying = time.monotonic()
