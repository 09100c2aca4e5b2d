"""The worker: claims generations, has an engine make them, stores the audio, completes the rows.

``Worker.run`` is the table of contents. The claim loop is in ``claiming``, one generation's life in
``performing``, the engine's in ``live_engine``. This process holds the database, the heartbeats and
the files; the engine is in a child process, so that a crash costs one child and never a lease.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
from typing import TYPE_CHECKING

import anyio

from dgx_music.artifacts import Artifacts
from dgx_music.config import Settings
from dgx_music.errors import (
    ArtifactError,
    DatabaseUnavailableError,
    DgxMusicError,
    EngineUnavailableError,
)
from dgx_music.storage import queue
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database
from dgx_music.worker.claiming import Claiming
from dgx_music.worker.leases import Leases, Stop
from dgx_music.worker.live_engine import EngineHost, LiveEngine
from dgx_music.worker.performing import Performing
from dgx_music.worker.presence import Presence, end_reason
from dgx_music.worker.stopping import Stopping
from dgx_music.worker.sweeping import Sweeping

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_LAST_WRITE_SECONDS = 15.0
_LOOK_SECONDS = 0.1


class Worker:
    """Serves one model or several: ``Worker(database, engine, artifacts, settings).run()``."""

    def __init__(
        self,
        database: Database,
        engine: EngineHost,
        artifacts: Artifacts,
        settings: Settings,
        *,
        rng: random.Random | None = None,
    ) -> None:
        self.id = f"{socket.gethostname()[:150]}-{os.getpid()}-{secrets.token_hex(3)}"
        rng = rng or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        stopping = self._stopping = Stopping(self.id)
        live = self._engine = LiveEngine(engine, settings.served_models, stopping, self.id)
        presence = self._presence = Presence(self.id, settings, live)
        leases = self._leases = Leases(database, settings, presence)
        self._claiming = Claiming(database, settings, live, leases, presence, stopping)
        self._performing = Performing(database, artifacts, settings, live, leases, stopping, rng)
        self._sweeping = Sweeping(database, artifacts, settings, live, leases, rng)

    async def run(self, *, drain: bool = False) -> None:
        """Serve until stopped, or with ``drain`` until every generation of the models is finished.

        Raises ``DatabaseNotMigratedError``, ``EngineUnavailableError`` if the engine cannot start,
        and the last error if engine or output folder turn out to be broken; the queue is left as
        it was.
        """
        await self._database.check_migrated()
        reason = "it was stopped"
        try:
            await self._register()
            await self._check_artifacts()
            if await self._load_first_model():
                await self._serve(drain)
            if drain and not self._stopping.is_requested:
                reason = "its queue was empty, as --drain asks for"
            if self._stopping.error is not None:
                raise self._stopping.error
        except Exception as error:
            reason = end_reason(error)
            raise
        finally:
            await self._end(reason)

    def stop(self) -> None:
        """Stop claiming, let what runs finish within the grace, and end.

        Called again, release at once what runs.
        """
        self._stopping.request()

    def give_up(self, error: DgxMusicError) -> None:
        """Stop because of an error that every generation would meet; ``run`` then raises it."""
        self._stopping.give_up(error)

    # ----------------------------------------------------------------------- start

    async def _register(self) -> None:
        """Add the worker's row before the model is loaded: somebody may be waiting for a worker."""
        async with self._database.session() as session:
            await self._presence.register(session)

    async def _check_artifacts(self) -> None:
        problem = await self._artifacts.find_problem()
        if problem is not None:
            raise ArtifactError(problem)

    async def _load_first_model(self) -> bool:
        """Load it, with heartbeats meanwhile, and announce it; False if a stop came first."""
        is_loaded = False
        trouble: EngineUnavailableError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._leases.beat, name="heartbeat while loading")
            try:
                is_loaded = await self._engine.load()
            except EngineUnavailableError as error:  # raised below: a task group would wrap it
                trouble = error
            tasks.cancel_scope.cancel()
        if trouble is not None:
            raise trouble
        if is_loaded:
            await self._announce()
        return is_loaded

    async def _announce(self) -> None:
        """Say that the worker serves its models now."""
        try:
            async with self._database.session() as session:
                await self._presence.renew(session, running_count=0)
                await self._presence.count_free_workers(session)
            await self._sweeping.hasten()
        except DatabaseUnavailableError as error:
            # The first heartbeat and the first sweep do all of it again.
            logger.warning("worker %s: cannot say that it is ready: %s", self.id, error)
        logger.info(
            "worker %s: serves %s on %s, %d slots, pid %d",
            self.id,
            ", ".join(self._engine.models),
            self._engine.info.device,
            self._engine.info.slots,
            os.getpid(),
        )

    # ----------------------------------------------------------------------- serve

    async def _serve(self, drain: bool) -> None:
        # If tenants are limited, what others finish makes room as well.
        is_limited = self._settings.tenant_limit is not None
        hints = () if is_limited else (Topic.WORK, self._engine.models)
        loops = self._leases.beat, self._leases.notice_cancels, self._sweeping.sweep
        with self._database.changes.subscribe(*hints) as changes:
            self._stopping.listen_to(changes)
            async with anyio.create_task_group() as tasks:
                for loop in loops:
                    tasks.start_soon(loop, name=loop.__qualname__)
                await self._claiming.run(tasks, self._performing.run, drain=drain)
                await self._finish()
                tasks.cancel_scope.cancel()

    # ----------------------------------------------------------------------- finish

    async def _finish(self) -> None:
        """Let what runs finish within the grace, then release it; after a second stop, at once."""
        running = self._leases.running
        if not running:
            return
        logger.info(
            "worker %s: stops within %g s, %d running; %s",
            self.id,
            self._settings.grace_seconds,
            len(running),
            "press Ctrl-C or send the signal again to release at once",
        )
        with anyio.move_on_after(self._settings.grace_seconds):
            while running and not self._stopping.is_urgent:
                await self._stopping.wait_for_change(_LOOK_SECONDS)
        for each in tuple(running.values()):
            each.stop(Stop.RELEASED)
        with anyio.move_on_after(_LAST_WRITE_SECONDS):
            while running:
                await self._stopping.wait_for_change(_LOOK_SECONDS)

    async def _end(self, reason: str) -> None:
        """Give back what is still held, record why the worker ended, and end the engine.

        In this order: the end of an engine may take long. The leases refuse what it still makes.
        """

        async def work(session: AsyncSession) -> None:
            await queue.release_all(session, self.id, keep=self._leases.undecided)
            await self._presence.end(session, reason)

        with anyio.CancelScope(shield=True):
            try:
                await self._database.transact(work)
            except DatabaseUnavailableError as error:
                logger.warning("worker %s: %s", self.id, error)
            finally:
                await self._engine.close()
        logger.info("worker %s: stopped", self.id)
