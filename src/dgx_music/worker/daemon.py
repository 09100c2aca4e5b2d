"""The worker as a daemon: builds it from the settings, and turns signals into a graceful stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

import anyio

from dgx_music import logs
from dgx_music.artifacts import open_output
from dgx_music.audio import files as audio
from dgx_music.config import Settings
from dgx_music.early import stopping_signals
from dgx_music.errors import ArtifactError, DgxMusicError
from dgx_music.garbage import spare_collections
from dgx_music.inference import tone
from dgx_music.inference.engine import EngineSettings
from dgx_music.inference.process import EngineProcess
from dgx_music.storage.database import Database
from dgx_music.worker.worker import Worker

logger = logging.getLogger(__name__)


async def run_worker(settings: Settings, *, drain: bool = False) -> None:
    """Run one worker until a signal stops it, or with ``drain`` until its queue is empty.

    The first SIGTERM, SIGINT, SIGHUP or SIGQUIT lets running generations finish within the grace; a
    second releases them at once. Embedded SQLite is migrated first. Raises what ``Worker.run``
    raises, and ``ConfigurationError`` before anything is started.
    """
    audio.check_setting(settings.audio_format)
    if settings.engine == "tone":
        tone.check_environment()
    database = Database.from_settings(within_lease(settings))
    engine = EngineProcess(engine_settings(settings))
    output = open_output(settings.output, is_private=settings.is_private)
    worker = Worker(database, engine, output, settings)
    trouble: DgxMusicError | None = None
    # Signals are received to the very end, so that none cuts it short.
    with anyio.open_signal_receiver(*stopping_signals()) as signals:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_stop_on_signals, worker, signals, name="signals")
                tasks.start_soon(_warm_up, worker, name="audio warm-up")
                try:
                    await database.prepare()
                    await worker.run(drain=drain)
                except DgxMusicError as error:  # raised below: a task group would wrap it
                    trouble = error
                tasks.cancel_scope.cancel()
        finally:
            await engine.close()
            await database.dispose()
    if trouble is not None:
        raise trouble


def within_lease(settings: Settings) -> Settings:
    """Return the settings with no wait for the database longer than a quarter of the lease.

    Else a connection that a network has forgotten, and making a new one, could cost a healthy
    worker its leases. So could the locks that the server keeps for that connection: it undoes an
    idle transaction within half of the lease, when the worker has given it up.
    """
    waits = {"connect": 4, "statement": 4, "command": 4, "idle_transaction": 2}
    names = {f"{wait}_timeout_seconds": part for wait, part in waits.items()}
    lease = settings.lease_seconds
    limits = {name: min(getattr(settings, name), lease / part) for name, part in names.items()}
    return replace(settings, **limits)


def engine_settings(settings: Settings) -> EngineSettings:
    """Return what the engine's process needs to know."""
    return EngineSettings(
        engine=settings.engine,
        model=settings.served_models[0],
        device=settings.device,
        dtype=settings.dtype,
        slots=None if settings.slots == "auto" else settings.slots,
        revision=settings.revision,
        weights=settings.weights,
        kv_cache=settings.kv_cache,
        kernels=settings.kernels,
        model_count=len(settings.served_models),
    )


def configure_logging(level: str) -> None:
    """Log one line for each event to stderr; only the daemon does this, the library never."""
    logs.configure_logging(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)


async def _warm_up(worker: Worker) -> None:
    """Load the libraries that finish audio; a worker without them stops before it claims."""
    try:
        await anyio.to_thread.run_sync(audio.warm_up)
    except ArtifactError as error:
        worker.give_up(error)
    # Python raises RuntimeError for a thread that it cannot start.
    except (ImportError, MemoryError, RuntimeError) as error:
        logger.warning("worker %s: the audio's libraries are not loaded yet: %s", worker.id, error)
    spare_collections()  # all that a worker imports is there now


async def _stop_on_signals(worker: Worker, signals: AsyncIterator[signal.Signals]) -> None:
    async for number in signals:
        logger.info("worker %s: received %s", worker.id, signal.Signals(number).name)
        worker.stop()
