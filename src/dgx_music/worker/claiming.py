"""The claim loop: what to claim, of which model, and how long to wait before the next claim."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskGroup

from dgx_music.config import Settings
from dgx_music.errors import (
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
    EngineUnavailableError,
)
from dgx_music.storage import due, queue
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Claim
from dgx_music.worker.leases import Leases, Running
from dgx_music.worker.live_engine import LiveEngine
from dgx_music.worker.presence import Presence
from dgx_music.worker.stopping import Stopping

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Perform = Callable[[Running], Coroutine[Any, Any, None]]

logger = logging.getLogger(__name__)

_GATHER_SECONDS = 0.002
"""For the slots that are about to be free: one claim of many rows costs hardly more than of one."""
_SKIP_SECONDS = 1.0
_SPREAD_SECONDS = 0.05


class Claiming:
    """Claims for one worker what is due, as much as its engine has slots for."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        engine: LiveEngine,
        leases: Leases,
        presence: Presence,
        stopping: Stopping,
    ) -> None:
        self._database = database
        self._settings = settings
        self._engine = engine
        self._leases = leases
        self._presence = presence
        self._stopping = stopping
        self._found_fewer = False
        """True if the last claim found fewer than there were free slots."""
        self._skip_until: dict[str, float] = {}
        self._in_doubt_until = -math.inf
        self._file_gone_since: float | None = None

    async def run(self, tasks: TaskGroup, perform: Perform, *, drain: bool) -> None:
        """Claim and start performing until stopped, or with ``drain`` until no work is left."""
        while not self._stopping.is_requested:
            claims = await self._claim()
            for claim in claims:
                name = f"generation {claim.lease.generation_id}"
                tasks.start_soon(perform, self._leases.add(claim), name=name)
            if drain and not self._leases.running and not await self._has_work():
                return
            await self._pause(claims)

    async def _claim(self) -> list[Claim]:
        """Return what was claimed: nothing if no slot is free, or database or engine is away."""
        self._notice_lost_file()
        if self._leases.running and self._engine.info.slots > 1:
            await anyio.sleep(_GATHER_SECONDS)
        free = self.free_slots()
        claims = await self._try_to_claim(free) if free else []
        self._found_fewer = len(claims) < free
        return claims

    async def _pause(self, claims: list[Claim]) -> None:
        """Wait before the next claim, given what the last one returned."""
        if not claims:
            await self._wait_for_work()
        elif self._found_fewer and self._presence.free_workers > 1:
            # The rest is the other workers' share, and they are waking up.
            await self._stopping.wait(_SPREAD_SECONDS)

    async def _has_work(self) -> bool:
        """Return True while work of the served models is left, or if the database is away."""
        try:
            async with self._database.session(read_only=True) as session:
                return await due.has_work(session, self._engine.models)
        except DatabaseUnavailableError:
            return True

    def free_slots(self) -> int:
        """Return how many slots the engine has free.

        At most as many generations as it has slots may wait for their audio to be made and stored.
        """
        slots, running = self._engine.info.slots, self._leases.running
        in_slots = sum(each.has_slot for each in running.values())
        return min(slots - in_slots, 2 * slots - len(running))

    async def _try_to_claim(self, limit: int) -> list[Claim]:
        try:
            await self._engine.start()
            if time.monotonic() < self._in_doubt_until:
                await self._give_back_unknown()
            if self._stopping.is_requested or not await self._is_ready_for_work():
                return []
            free = min(limit, self.free_slots())  # the engine may have fewer by now
            return await self._claim_up_to(free) if free > 0 else []
        except DatabaseUnavailableError as error:
            logger.warning("worker %s: cannot claim: %s", self._presence.id, error)
            await self._notice_another_schema()
        except (EngineUnavailableError, DatabaseNotMigratedError) as error:
            self._stopping.give_up(error)
        return []

    async def _claim_up_to(self, limit: int) -> list[Claim]:
        """Claim what is due of the loaded model, no more than this worker's share of it."""
        model = self._engine.model

        async def work(session: AsyncSession) -> list[Claim]:
            return await queue.claim(
                session,
                worker_id=self._presence.id,
                model_name=model,
                limit=await due.fair_share(session, model, limit, self._presence.free_workers),
                lease_seconds=self._settings.lease_seconds,
                tenant_limit=self._settings.tenant_limit,
            )

        former, self._in_doubt_until = self._in_doubt_until, math.inf
        claims = await self._database.transact(work)
        self._in_doubt_until = former
        if len(self._engine.models) > 1:
            self._skip_until[model] = -math.inf if claims else time.monotonic() + _SKIP_SECONDS
        return claims

    async def _give_back_unknown(self) -> None:
        """Give back what a claim whose commit was not answered may have taken.

        Else it would wait for a rescue. For a whole lease: the commit may still be on its way.
        """
        known = self._leases.undecided | self._leases.running.keys()
        await self._database.transact(
            lambda session: queue.release_all(session, self._presence.id, keep=known),
        )
        lease_end = time.monotonic() + self._settings.lease_seconds
        self._in_doubt_until = min(self._in_doubt_until, lease_end)

    # ----------------------------------------------------------------------- of which model

    async def _is_ready_for_work(self) -> bool:
        """Return True if the loaded model is the one to claim; load another if it is its turn.

        A worker that found all there was looks first: on SQLite each commit of another process
        wakes it, and a claim that finds nothing would take the write lock each time.
        """
        has_to_look = self._found_fewer and self._database.is_embedded
        if len(self._engine.models) == 1 and not has_to_look:
            return True
        waits = await self._database.transact(self._find_waits, read_only=True)
        skipped = {model for model in waits if self._seconds_to_skip(model)}
        wanted = self._choose_model({m: wait for m, wait in waits.items() if m not in skipped})
        if wanted is None or wanted == self._engine.model:
            return wanted is not None
        if self._leases.running:  # they finish first, and nothing more is claimed meanwhile
            return False
        logger.info(
            "worker %s: loads %s, which has waited %.0f s",
            self._presence.id,
            wanted,
            waits[wanted],
        )
        await self._engine.switch(wanted)
        # A stop may have come while the model was loaded.
        return self._engine.model == wanted and not self._stopping.is_requested

    async def _find_waits(self, session: AsyncSession) -> dict[str, float]:
        # An idle worker may not claim for days, and is counted on meanwhile.
        await queue.check_schema(session)
        return await due.find_waits(session, self._engine.models)

    def _choose_model(self, waits: Mapping[str, float]) -> str | None:
        """Return the model to claim next, given for how many seconds each has waited.

        That is the loaded one, unless it has nothing due or another has waited too long. A model
        just loaded is served for as long as another may have to wait, or a worker with two backlogs
        would do nothing but load.
        """
        if not waits:
            return None
        loaded, bound = self._engine.model, self._settings.model_switch_seconds
        overdue = [model for model, wait in waits.items() if model != loaded and wait > bound]
        if overdue and time.monotonic() - self._engine.loaded_at > bound:
            return max(overdue, key=lambda model: waits[model])
        return loaded if loaded in waits else max(waits, key=lambda model: waits[model])

    def _seconds_to_skip(self, model: str) -> float:
        """Return for how many seconds the other models go first.

        This one has due rows, and a claim found none to take: its tenants may have enough in hand,
        or somebody has the rows locked.
        """
        return max(0.0, self._skip_until.get(model, -math.inf) - time.monotonic())

    # ----------------------------------------------------------------------- waiting, and giving up

    async def _wait_for_work(self) -> None:
        """Wait for a change of the database, a free slot or a stop, at most the poll interval."""
        if not self._stopping.is_requested:
            skips = map(self._seconds_to_skip, self._engine.models)
            seconds = min([self._settings.poll_seconds, *filter(None, skips)])
            await self._stopping.wait_for_change(seconds)

    async def _notice_another_schema(self) -> None:
        """Give up if the tables have changed so that the claim itself fails on them."""
        try:
            await self._database.transact(queue.check_schema, read_only=True)
        except DatabaseNotMigratedError as error:
            self._stopping.give_up(error)
        except DatabaseUnavailableError:
            pass

    def _notice_lost_file(self) -> None:
        """Give up if a SQLite file is gone for longer than a lease.

        A file that is put back sooner is opened anew.
        """
        try:
            self._database.check_file()
            self._file_gone_since = None
        except DatabaseUnavailableError as error:
            self._file_gone_since = self._file_gone_since or time.monotonic()
            if time.monotonic() - self._file_gone_since > self._settings.lease_seconds:
                self._stopping.give_up(error)
