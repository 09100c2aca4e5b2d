"""The claim loop: what to claim, of which model, and how long to wait before the next claim."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
from dgx_music.worker.model_choice import ModelChoice
from dgx_music.worker.presence import Presence
from dgx_music.worker.stopping import Stopping

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Perform = Callable[[Running], Coroutine[Any, Any, None]]

logger = logging.getLogger(__name__)

_MOST_GATHER_TURNS = 8
"""Of the event loop, for the slots that are about to be free: one claim of many rows costs hardly
more than of one. A worker waits no more turns than it has slots."""
_SPREAD_SECONDS = 0.05


class Doubt:
    """Whether this worker may hold rows that it does not know of.

    - *None*: every claim was answered.
    - *Unanswered*: a claim raised, which does not say whether it was committed.
    - *Late*: the rows were given back, but the commit may still be on its way and take them again.
    """

    def __init__(self) -> None:
        self._is_unanswered = False
        self._late_until = -math.inf

    @property
    def is_open(self) -> bool:
        """True if a claim is unanswered, or may be late."""
        return self._is_unanswered or time.monotonic() < self._late_until

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Open the doubt for one claim, and close it if the block raises nothing."""
        self._is_unanswered = True
        yield
        # Not reached if the claim raised or was cancelled: nobody knows then what it took.
        self._is_unanswered = False

    def note_given_back(self, lease_seconds: float) -> None:
        """Note that the unknown rows were given back: the commit may be late by a whole lease."""
        if self._is_unanswered:
            self._is_unanswered = False
            self._late_until = time.monotonic() + lease_seconds


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
        self._models = ModelChoice(database, settings, engine)
        self._doubt = Doubt()
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
        free = await self._gather_slots()
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
            return await self._database.transact(
                lambda session: due.has_work(session, self._engine.models), read_only=True
            )
        except DatabaseUnavailableError:
            return True

    async def _gather_slots(self) -> int:
        """Return how many slots are free, after those that are about to be free."""
        if self._leases.running:
            for _ in range(min(_MOST_GATHER_TURNS, self._engine.info.slots)):
                await asyncio.sleep(0)
        return self.free_slots()

    def free_slots(self) -> int:
        """Return how many generations may be claimed for the engine's free slots.

        At most twice as many generations as it has slots are in the engine: some only wait for
        their audio to be made. With those that are stored and completed, it is three times as many.
        """
        slots, running = self._engine.info.slots, self._leases.running.values()
        in_slots = sum(each.has_slot for each in running)
        in_engine = sum(each.is_in_engine for each in running)
        return min(slots - in_slots, 2 * slots - in_engine, 3 * slots - len(running))

    async def _try_to_claim(self, limit: int) -> list[Claim]:
        try:
            await self._engine.start()
            if self._doubt.is_open:
                await self._give_back_unknown()
            if self._stopping.is_requested or not await self._load_wanted():
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

        is_single = self._settings.tenant_limit is None
        with self._doubt.asking():
            claims = await self._database.transact(work, is_single=is_single)
        self._models.note_claim(model, is_empty=not claims)
        return claims

    async def _give_back_unknown(self) -> None:
        """Give back what an unanswered claim may have taken; else it would wait for a rescue."""
        known = self._leases.undecided | self._leases.running.keys()
        await self._database.transact(
            lambda session: queue.release_all(session, self._presence.id, keep=known),
        )
        self._doubt.note_given_back(self._settings.lease_seconds)

    # ----------------------------------------------------------------------- of which model

    async def _load_wanted(self) -> bool:
        """Load the model that is next; return False if there is nothing to claim now.

        A worker that found all there was looks first: on SQLite each commit of another process
        wakes it, and a claim that finds nothing would take the write lock each time.
        """
        has_to_look = self._found_fewer and self._database.is_embedded
        if len(self._engine.models) == 1 and not has_to_look:
            return True
        waits = await self._models.find_waits()
        wanted = self._models.choose(waits)
        if wanted is None:
            return False
        # What runs finishes before a switch, and nothing more is claimed meanwhile.
        if wanted != self._engine.model and not self._leases.running:
            await self._switch(wanted, waits[wanted])
        return self._engine.model == wanted and not self._stopping.is_requested

    async def _switch(self, model: str, waited_seconds: float) -> None:
        logger.info(
            "worker %s: loads %s, which has waited %.0f s",
            self._presence.id,
            model,
            waited_seconds,
        )
        await self._engine.switch(model)

    # ----------------------------------------------------------------------- waiting, and giving up

    async def _wait_for_work(self) -> None:
        """Wait for a change of the database, a free slot or a stop, at most the poll interval."""
        if not self._stopping.is_requested:
            seconds = min(self._settings.poll_seconds, self._models.shortest_skip())
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
