"""The worker: claims generations, has an engine make them, stores the audio, completes the rows.

``Worker.perform`` is the table of contents. This process holds the database, the heartbeats and the files; the engine is in
a child process, so that whatever happens there costs one child and never a lease.
"""

from __future__ import annotations

import logging
import math
import os
import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from dgx_music.artifacts import Artifact, Artifacts
from dgx_music.audio import clips
from dgx_music.audio import files as audio
from dgx_music.audio.samples import Audio
from dgx_music.config import Settings
from dgx_music.errors import (
    ArtifactError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
    DgxMusicError,
    EngineCrashedError,
    EngineError,
    EngineReplacedError,
    EngineUnavailableError,
    GenerationRejectedError,
    InvalidRequestError,
)
from dgx_music.groups import unwrap
from dgx_music.inference.engine import GenerationRequest
from dgx_music.inference.process import EngineInfo
from dgx_music.sampling import Sampling
from dgx_music.storage import due, queue, workers
from dgx_music.storage.clips import clips_of, read_clips
from dgx_music.storage.connection.changes import Subscription, Topic
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Claim, Completion, Lease
from dgx_music.storage.retention import find_owners
from dgx_music.storage.schema import WorkerState
from dgx_music.validation import tidy_text
from dgx_music.worker.completions import Completions
from dgx_music.worker.leases import Leases, Running, Stop

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

BROKEN_AFTER = 4
"""The engine died so often, and of so many different generations, without one success: it is not the generations."""
_ENGINE_STARTS = 5
_LAST_WRITE_SECONDS = 15.0
_GATHER_SECONDS = 0.002
"""For the slots that are about to be free: one claim of many rows costs hardly more than one of one."""
_AT_ONCE_SECONDS = 0.4
"""So short a clip takes a tenth of a millisecond to finish: less than the way to a thread and back."""
_BARREN_SECONDS = 1.0
_SPREAD_SECONDS = 0.05
_CLIP_RETRY_SECONDS = 1.0
_MOST_OF_A_REASON = 500


class EngineHost(Protocol):
    """What the worker needs of an engine: ``inference.process.EngineProcess``, or an imitation in a test."""

    async def start(self, model: str) -> EngineInfo:
        """Return what the engine with this model loaded says of itself, after starting it where it is not alive."""

    async def generate(
        self, request: GenerationRequest, on_progress: Callable[[float], None], on_slot_free: Callable[[], None]
    ) -> Audio:
        """Return the audio of one request; cancelling the call stops the generation.

        ``on_slot_free`` is called where the slot is free before the audio is made.
        """

    async def close(self) -> None:
        """End the engine."""


class Worker:
    """Serves one model or several: ``await Worker(database, engine, artifacts, settings).run()``."""

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
        self._database = database
        self._engine = engine
        self._artifacts = artifacts
        self._settings = settings
        self._rng = rng or random.Random()  # noqa: S311 - spreads retries, guards nothing
        self._completions = Completions(database)
        self._leases = Leases(database, artifacts, settings, self._rng, self._describe)
        self._running = self._leases.running
        self._models = list(settings.served_models)
        self._model = self._models[0]
        self._state = WorkerState.LOADING
        self._loaded_at = time.monotonic()
        self._barren_until: dict[str, float] = {}
        self._slots = 1
        self._device = ""
        self._model_version = ""
        self._stopping = anyio.Event()
        self._releasing = anyio.Event()
        self._loading: anyio.CancelScope | None = None
        self._wake: Subscription | None = None
        self._victims: set[str] = set()
        self._engine_pid: int | None = None
        self._engine_deaths = 0
        self._undecided: set[Lease] = set()
        self._in_doubt_until = -math.inf
        self._broken: DgxMusicError | None = None
        self._file_gone_since: float | None = None

    async def run(self, *, drain: bool = False) -> None:
        """Serve until stopped, or with ``drain`` until every generation of the model is finished.

        Raises ``DatabaseNotMigratedError``, ``EngineUnavailableError`` where the engine cannot start, and the last trouble
        where engine or output folder turn out to be broken; the queue is left as it was.
        """
        await self._database.check_migrated()
        reason = "it was stopped"
        try:
            await self._register()
            await self._check_artifacts()
            if await self._load_first_model():
                await self._serve(drain)
            if drain and not self._stopping.is_set():
                reason = "its queue was empty, as --drain asks for"
            if self._broken is not None:
                raise self._broken
        except Exception as error:
            reason = _in_one_line(error)
            raise
        finally:
            await self._unregister(reason)

    def stop(self) -> None:
        """Stop claiming, let what runs finish within the grace, and end; called again, release it at once."""
        if self._stopping.is_set():
            self._releasing.set()
        self._stopping.set()
        if self._loading is not None:
            self._loading.cancel()
        if self._wake is not None:
            self._wake.wake()

    async def perform(self, running: Running) -> None:
        """Carry one claimed generation through: infer, store, complete."""
        started = time.monotonic()
        made = await self._infer(running)
        device_seconds = time.monotonic() - started
        self._leases.speeds.note(running.claim.model_name, device_seconds, running.claim.duration_seconds)
        artifact, facts = await self._store(running, made)
        await self._complete(running, artifact, facts, device_seconds)

    async def _serve(self, drain: bool) -> None:
        # Where tenants are limited, what others finish makes room as well.
        hints = (Topic.WORK, self._models) if self._settings.tenant_limit is None else ()
        with self._database.changes.subscribe(*hints) as self._wake:
            async with anyio.create_task_group() as tasks:
                for loop in self._leases.loops:
                    tasks.start_soon(loop, name=loop.__qualname__)
                await self._claim_until_stopped(tasks, drain)
                await self._finish_running()
                tasks.cancel_scope.cancel()

    # ---------------------------------------------------------------------------------------------------- claiming

    async def _claim_until_stopped(self, tasks: TaskGroup, drain: bool) -> None:
        look_first = False
        while not self._stopping.is_set():
            self._notice_lost_file()
            if self._running and self._slots > 1:
                await anyio.sleep(_GATHER_SECONDS)
            free = self._free_slots()
            claims = await self._claim(free, look_first=look_first) if free else []
            look_first = len(claims) < free
            for claim in claims:
                tasks.start_soon(self._run, self._leases.add(claim), name=f"generation {claim.lease.generation_id}")
            if drain and not self._running and not await self._has_work():
                return
            if not claims:
                await self._wait()
            elif look_first and self._leases.free_workers > 1:
                await self._wait_at_most(_SPREAD_SECONDS)  # the rest is the others' share, and they are waking up

    def _free_slots(self) -> int:
        """Slots that the engine has free, while no more than as many again wait for their audio to be made and stored."""
        in_slots = sum(running.has_slot for running in self._running.values())
        return min(self._slots - in_slots, 2 * self._slots - len(self._running))

    async def _claim(self, limit: int, *, look_first: bool) -> list[Claim]:
        """Claim what is due; ``look_first`` spares an idle worker SQLite's write lock at each commit of somebody else's."""
        try:
            await self._start_engine()
            if time.monotonic() < self._in_doubt_until:
                await self._give_back_unknown()
            if self._stopping.is_set() or not await self._is_ready_for_work(look_first):
                return []
            free = min(limit, self._free_slots())  # fewer where the engine has come to have fewer
            return await self._claim_up_to(free) if free > 0 else []
        except DatabaseUnavailableError as error:
            logger.warning("worker %s: cannot claim: %s", self.id, error)
            await self._notice_another_schema()
        except (EngineUnavailableError, DatabaseNotMigratedError) as error:
            self.give_up(error)
        return []

    async def _notice_another_schema(self) -> None:
        """Give up where the tables have become such that the claim itself fails on them."""
        try:
            await self._database.transact(queue.check_schema, read_only=True)
        except DatabaseNotMigratedError as error:
            self.give_up(error)
        except DatabaseUnavailableError:
            pass

    def _notice_lost_file(self) -> None:
        """Give up where a SQLite file is gone for longer than a lease; one that is put back sooner is opened anew."""
        try:
            self._database.check_file()
            self._file_gone_since = None
        except DatabaseUnavailableError as error:
            self._file_gone_since = self._file_gone_since or time.monotonic()
            if time.monotonic() - self._file_gone_since > self._settings.lease_seconds:
                self.give_up(error)

    async def _claim_up_to(self, limit: int) -> list[Claim]:
        """Claim what is due of the loaded model, no more than this worker's share of it."""

        async def work(session: AsyncSession) -> list[Claim]:
            return await queue.claim(
                session,
                worker_id=self.id,
                model_name=self._model,
                limit=await due.fair_share(session, self._model, limit, self._leases.free_workers),
                lease_seconds=self._settings.lease_seconds,
                tenant_limit=self._settings.tenant_limit,
            )

        former, self._in_doubt_until = self._in_doubt_until, math.inf
        claims = await self._database.transact(work)
        self._in_doubt_until = former
        if len(self._models) > 1:
            self._barren_until[self._model] = -math.inf if claims else time.monotonic() + _BARREN_SECONDS
        return claims

    async def _give_back_unknown(self) -> None:
        """Give back what a claim whose commit was not answered may have taken, or it would wait for a rescue.

        For a whole lease: the network may still be on its way with the commit.
        """
        known = self._undecided | self._running.keys()
        await self._database.transact(lambda session: queue.release_all(session, self.id, but=known))
        self._in_doubt_until = min(self._in_doubt_until, time.monotonic() + self._settings.lease_seconds)

    async def _is_ready_for_work(self, look_first: bool) -> bool:
        """Return True where the loaded model is the one to claim; loads another one where that is its turn."""
        if len(self._models) == 1 and not (look_first and self._database.is_embedded):
            return True
        waits = await self._database.transact(self._find_waits, read_only=True)
        wanted = self._choose_model({model: wait for model, wait in waits.items() if not self._barren_for(model)})
        if wanted in (None, self._model):
            return wanted is not None
        if self._running:  # they finish first, and nothing more is claimed meanwhile
            return False
        logger.info("worker %s: loads %s, which has waited %.0f s", self.id, wanted, waits[str(wanted)])
        await self._switch(str(wanted))
        return self._model == wanted

    async def _find_waits(self, session: AsyncSession) -> dict[str, float]:
        await queue.check_schema(session)  # an idle worker may not claim for days, and is counted on meanwhile
        return await due.find_waits(session, self._models)

    def _choose_model(self, waits: Mapping[str, float]) -> str | None:
        """Return the model to claim next: the loaded one, unless another has waited too long or it has nothing due.

        A model just loaded is served for as long as another may have to wait, or two backlogs would only ever be loaded.
        """
        if not waits:
            return None
        bound = self._settings.model_switch_seconds
        overdue = [model for model, wait in waits.items() if model != self._model and wait > bound]
        if overdue and time.monotonic() - self._loaded_at > bound:
            return max(overdue, key=lambda model: waits[model])
        return self._model if self._model in waits else max(waits, key=lambda model: waits[model])

    def _barren_for(self, model: str) -> float:
        """Return for how many seconds to let the others go first: it has due rows, and a claim found none to take.

        Its tenants may have enough in hand, or somebody has the rows locked.
        """
        return max(0.0, self._barren_until.get(model, -math.inf) - time.monotonic())

    async def _switch(self, model: str) -> None:
        """Load another model; one that cannot be loaded here is no longer served, while there are others."""
        former, self._model = self._model, model
        self._state = WorkerState.LOADING
        try:
            info = await self._load_engine()
        except EngineUnavailableError as error:
            logger.error("worker %s: no longer serves %s: %s", self.id, model, error)
            self._models.remove(model)
            self._model, self._state = former, WorkerState.SERVING
            return
        if info is not None:
            self._note_engine(info)

    async def _start_engine(self) -> None:
        """Have a living engine, a fresh one where the last has died; raises after several that could not start."""
        for start in range(_ENGINE_STARTS):
            try:
                info = await self._load_engine()
                if info is not None:
                    self._note_change(info)
                return
            except EngineUnavailableError as error:
                self._state = WorkerState.LOADING
                logger.warning("worker %s: engine start %d of %d failed: %s", self.id, start + 1, _ENGINE_STARTS, error)
                if start + 1 == _ENGINE_STARTS:
                    raise
                await self._wait_at_most(2.0**start)

    def _note_change(self, info: EngineInfo) -> None:
        """Count a fresh process as a death of the former, and believe the engine how many slots it has now."""
        self._state = WorkerState.SERVING
        if info.pid != self._engine_pid:
            self._engine_pid = info.pid
            self._engine_deaths += 1
        if info.slots != self._slots:
            logger.warning("worker %s: %s has %d slots now, not %d", self.id, self._model, info.slots, self._slots)
            self._slots = info.slots

    async def _has_work(self) -> bool:
        try:
            async with self._database.session(read_only=True) as session:
                return await due.has_work(session, self._models)
        except DatabaseUnavailableError:
            return True

    async def _wait(self) -> None:
        """Wait for a change of the database, a free slot or a stop, at most the poll interval."""
        if self._wake is not None and not self._stopping.is_set():
            barren = [seconds for model in self._models if (seconds := self._barren_for(model))]
            await self._wake.wait(min([self._settings.poll_seconds, *barren]))

    async def _wait_at_most(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._stopping.wait()

    # --------------------------------------------------------------------------------------------- one generation

    async def _run(self, running: Running) -> None:
        """Perform, and turn whatever else happens into one storage call."""
        lease = running.lease
        logger.info("generation %s attempt %d: started", lease.generation_id, lease.attempt)
        try:
            with running.scope:
                await self.perform(running)
        except EngineReplacedError as error:
            await self._release(running, str(error))
        except ArtifactError as error:  # the next one's audio would be lost as well
            await self._release(running, str(error))
            self.give_up(error)
        except (GenerationRejectedError, InvalidRequestError) as error:
            await self._fail(running, error, is_permanent=True)
        except Exception as error:
            await self._fail(running, error)
            self._note_trouble(running, error)
        except BaseException:  # the worker itself is cancelled; a completion under way is left to the lease
            if running.is_completing:
                self._undecided.add(lease)
            else:
                await self._release(running, Stop.RELEASED.value)
            raise
        else:
            if running.stopped_for is not None:
                await self._release(running, running.stopped_for.value)
        finally:
            del self._running[lease]
            self._free(running)

    async def _infer(self, running: Running) -> Audio:
        request = _as_request(running.claim, await self._read_clips(running.claim))
        audio.check_format(self._settings.audio_format, request.sample_rate)
        deadline = self._settings.deadline_floor_seconds + self._settings.deadline_factor * request.duration

        def note(progress: float) -> None:
            if 0 <= progress <= 1:
                running.progress = progress

        try:
            with anyio.fail_after(deadline):
                return await self._engine.generate(request, note, partial(self._free, running))
        except TimeoutError:
            raise TimeoutError(f"The attempt took longer than its deadline of {deadline:g} s.") from None
        finally:
            self._free(running)

    async def _read_clips(self, claim: Claim) -> dict[str, Audio]:
        """Return the clips of a claimed row by the names of their fields; waits for a database that is away.

        Raises ``GenerationRejectedError`` where one is missing or damaged.
        """
        wanted = clips_of(claim)
        if not wanted:
            return {}
        found = await self._find_clips(wanted.values())
        read = {name: partial(clips.load, name, found.get(sha256, b""), sha256) for name, sha256 in wanted.items()}
        return {name: await anyio.to_thread.run_sync(load) for name, load in read.items()}

    async def _find_clips(self, sha256s: Collection[str]) -> dict[str, bytes]:
        while True:
            try:
                return await self._database.transact(lambda session: read_clips(session, sha256s), read_only=True)
            except DatabaseUnavailableError as error:  # the lease, or a stop, ends this wait
                logger.warning("worker %s: cannot read clips: %s", self.id, error)
                await anyio.sleep(_CLIP_RETRY_SECONDS)

    async def _store(self, running: Running, made: Audio) -> tuple[Artifact, dict[str, object]]:
        claim, lease = running.claim, running.lease
        finish = partial(
            audio.finish,
            made,
            sample_rate=claim.sample_rate,
            channels=claim.channels,
            audio_format=self._settings.audio_format,
            loudness=self._settings.loudness,
        )
        finished = finish() if made.duration < _AT_ONCE_SECONDS else await anyio.to_thread.run_sync(finish)
        # Whatever is there by these names was never completed and never can be: this attempt holds the claim.
        await self._leases.drop_files(lease, range(1, lease.attempt + 1))
        artifact = await self._artifacts.publish(lease.generation_id, lease.attempt, finished.extension, finished.data)
        return artifact, {**finished.facts, **made.facts}

    async def _complete(
        self, running: Running, artifact: Artifact, facts: dict[str, object], device_seconds: float
    ) -> None:
        completion = Completion(
            lease=running.lease,
            file_path=artifact.path,
            file_size_bytes=artifact.size_bytes,
            sha256=artifact.sha256,
            model_version=self._model_version,
            generation_time_seconds=device_seconds,
            audio=facts,
        )
        await anyio.lowlevel.checkpoint_if_cancelled()  # the last moment at which a stop can win
        running.is_completing = True
        is_done = await self._completions.write(completion)
        running.is_completing = False
        if not is_done:
            running.stopped_for = Stop.REFUSED
            return
        self._victims.clear()
        self._engine_deaths = 0
        logger.info(
            "generation %s attempt %d: completed in %.2f s, %d bytes",
            running.lease.generation_id,
            running.lease.attempt,
            device_seconds,
            artifact.size_bytes,
        )

    async def _fail(self, running: Running, error: Exception, *, is_permanent: bool = False) -> None:
        lease, message = running.lease, tidy_text(str(error) or type(error).__name__)
        wait = queue.backoff_seconds(running.claim.failures + 1, self._settings.backoff_base_seconds, self._rng)

        async def fail(session: AsyncSession) -> str | None:
            return await queue.fail(
                session,
                lease,
                message,
                retry_in_seconds=None if is_permanent else wait,
                device_seconds=time.monotonic() - running.started,
            )

        await self._let_go(lease, fail, message, logging.WARNING)

    async def _release(self, running: Running, why: str) -> None:
        """Give the row back where it is still ours, cancelled where that was requested, and drop the file."""
        lease = running.lease

        async def release(session: AsyncSession) -> str | None:
            return (await queue.release(session, [lease])).get(lease)

        await self._let_go(lease, release, why, logging.INFO)

    async def _let_go(
        self, lease: Lease, write: Callable[[AsyncSession], Awaitable[str | None]], why: str, level: int
    ) -> None:
        """End the claim by this write, and drop the file of an attempt that can never complete.

        Nothing is raised: where the write cannot be made, the lease runs out and a rescue does the rest. What was raised after a
        commit may have taken effect: so what to delete is not concluded from an error, but read from the row.
        """
        with anyio.CancelScope(shield=True):
            try:
                async with self._database.session() as session:
                    status = await write(session) or "lease lost"
            except DatabaseUnavailableError as error:
                status = str(error)
            except Exception as error:
                logger.exception("generation %s attempt %d: unexpected", *_named(lease))
                status = str(error) or type(error).__name__
            logger.log(level, "generation %s attempt %d: %s: %s", *_named(lease), status, why)
            if await self._is_over(lease):
                await self._leases.drop_files(lease, [lease.attempt])

    async def _is_over(self, lease: Lease) -> bool:
        """Return True where this attempt has no file and can get none; False where nobody can say: pruning finds that."""
        try:
            owner = await self._database.transact(
                lambda session: find_owners(session, [lease.generation_id]), read_only=True
            )
        except Exception as error:
            logger.warning("generation %s attempt %d: its file stays: %s", *_named(lease), error)
            return False
        found = owner.get(lease.generation_id)
        return found is None or not found.may_have(lease.attempt)

    def _free(self, running: Running) -> None:
        running.has_slot = False
        if self._wake is not None:
            self._wake.wake()

    def _note_trouble(self, running: Running, error: Exception) -> None:
        """Stop when the engine dies of one generation after another: the whole queue would fail with them.

        One death may have many victims, and one poison prompt may cause many deaths: neither alone says much.
        """
        if isinstance(error, EngineCrashedError):
            self._victims.add(running.lease.generation_id)
            if min(self._engine_deaths, len(self._victims)) >= BROKEN_AFTER:
                self.give_up(error)
        elif not isinstance(error, EngineError | TimeoutError):
            logger.error("generation %s attempt %d: unexpected", *_named(running.lease), exc_info=error)

    def give_up(self, error: DgxMusicError) -> None:
        """Stop because of an error that every generation would meet; ``run`` raises it once what runs has ended."""
        if self._broken is None:
            logger.error("worker %s: stops: %s", self.id, error)
            self._broken = error
            if not self._stopping.is_set():
                self.stop()

    async def _finish_running(self) -> None:
        """Let what runs finish within the grace, then release it; a second stop releases at once."""
        if not self._running:
            return
        logger.info(
            "worker %s: stops within %g s, %d running; press Ctrl-C or send the signal again to release at once",
            self.id,
            self._settings.grace_seconds,
            len(self._running),
        )
        with anyio.move_on_after(self._settings.grace_seconds):
            while self._running and not self._releasing.is_set():
                await self._wait_for_end()
        for running in tuple(self._running.values()):
            running.stop(Stop.RELEASED)
        with anyio.move_on_after(_LAST_WRITE_SECONDS):
            while self._running:
                await self._wait_for_end()

    async def _wait_for_end(self) -> None:
        if self._wake is not None:
            await self._wake.wait(0.1)

    # ------------------------------------------------------------------------------------------- start and end

    async def _load_first_model(self) -> bool:
        """Load it, alive to everybody meanwhile, and say that it is there; return False where a stop came first."""
        info: EngineInfo | None = None
        trouble: EngineUnavailableError | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._leases.beat, name="heartbeat while loading")
            try:
                info = await self._load_engine()
            except EngineUnavailableError as error:  # raised below: a task group would wrap it
                trouble = error
            tasks.cancel_scope.cancel()
        if trouble is not None:
            raise trouble
        if info is not None:
            await self._say_ready(info)
        return info is not None

    async def _load_engine(self) -> EngineInfo | None:
        """Return what the engine says of itself, or ``None`` where a stop came first: loading may take minutes."""
        with anyio.CancelScope() as self._loading:
            return None if self._stopping.is_set() else await self._engine.start(self._model)
        return None

    async def _check_artifacts(self) -> None:
        problem = await self._artifacts.find_problem()
        if problem is not None:
            raise ArtifactError(problem)

    async def _register(self) -> None:
        """Say who is coming, before the model is loaded: that may take minutes, and somebody may be waiting."""
        async with self._database.session() as session:
            await workers.register_worker(session, **self._describe())

    async def _say_ready(self, info: EngineInfo) -> None:
        self._note_engine(info)
        try:
            async with self._database.session() as session:
                await workers.heartbeat_worker(session, **self._describe(), running_count=0)
                self._leases.free_workers = await workers.count_free_workers(session, self._model)
            await self._leases.hasten()
        except DatabaseUnavailableError as error:  # the first heartbeat and the first sweep do all of it again
            logger.warning("worker %s: cannot say that it is ready: %s", self.id, error)
        served = ", ".join(self._models)
        logger.info(
            "worker %s: serves %s on %s, %d slots, pid %d", self.id, served, info.device, info.slots, os.getpid()
        )

    def _note_engine(self, info: EngineInfo) -> None:
        self._slots, self._device, self._model_version = info.slots, info.device, info.model_version
        self._engine_pid, self._loaded_at = info.pid, time.monotonic()
        self._state = WorkerState.SERVING
        if info.notice:
            logger.warning("worker %s: %s", self.id, info.notice)

    def _describe(self) -> dict[str, Any]:
        """Return the worker's own row."""
        return {
            "id": self.id,
            "host": socket.gethostname()[:200],
            "pid": os.getpid(),
            "state": self._state.value,
            "model_name": self._model,
            "models": self._models,
            "device": self._device,
            "slots": self._slots,
            "lease_seconds": self._settings.lease_seconds,
        }

    async def _unregister(self, reason: str) -> None:
        """Give back what is still held, leave word of why there is one worker less, and end the engine.

        In this order: an engine that a driver holds may not end for long. What it still makes is refused by its lease.
        """

        async def work(session: AsyncSession) -> None:
            await queue.release_all(session, self.id, but=self._undecided)
            await workers.end_worker(session, **self._describe(), reason=reason)

        with anyio.CancelScope(shield=True):
            try:
                await self._database.transact(work)
            except DatabaseUnavailableError as error:
                logger.warning("worker %s: %s", self.id, error)
            finally:
                await self._engine.close()
        logger.info("worker %s: stopped", self.id)


def _as_request(claim: Claim, given: Mapping[str, Any]) -> GenerationRequest:
    """Return the request of a claimed row; raises ``InvalidRequestError`` for what no engine can do."""
    return GenerationRequest(
        generation_id=claim.lease.generation_id,
        attempt=claim.lease.attempt,
        prompt=claim.prompt,
        duration=claim.duration_seconds,
        model=claim.model_name,
        channels=claim.channels,
        sample_rate=claim.sample_rate,
        **Sampling.pick(claim.sampling),
        **given,
    )


def _in_one_line(error: Exception) -> str:
    """Return what others are told of the error, and keep that short; a task group's is what it wraps."""
    alone = unwrap(error)
    told = str(alone) if isinstance(alone, DgxMusicError) else f"{type(alone).__name__}: {alone}"
    return " ".join(tidy_text(told).split())[:_MOST_OF_A_REASON]


def _named(lease: Lease) -> tuple[str, int]:
    return lease.generation_id, lease.attempt
