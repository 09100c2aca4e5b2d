"""One claimed generation, in a straight line: infer, store, complete; else fail, or release."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from dgx_music.artifacts import Artifact, Artifacts
from dgx_music.audio import clips
from dgx_music.audio import files as audio
from dgx_music.audio.files import FinishedAudio
from dgx_music.audio.samples import Audio
from dgx_music.audio.tags import Tags, tags_of
from dgx_music.config import Settings
from dgx_music.errors import (
    ArtifactError,
    DatabaseUnavailableError,
    EngineCrashedError,
    EngineError,
    InvalidRequestError,
)
from dgx_music.inference.engine import GenerationRequest
from dgx_music.retrying import for_ever, keep_trying
from dgx_music.sampling import Sampling
from dgx_music.statuses import GenerationStatus
from dgx_music.storage import queue
from dgx_music.storage.clips import clips_of, read_clips
from dgx_music.storage.database import Database
from dgx_music.storage.queue import Claim, Completion, Lease
from dgx_music.storage.retention import find_owners
from dgx_music.validation import AudioFormat, check_audio_format
from dgx_music.worker.completions import Completions
from dgx_music.worker.leases import Leases, Running, Stop
from dgx_music.worker.live_engine import LiveEngine
from dgx_music.worker.lost_files import drop_files
from dgx_music.worker.outcomes import Completed, Failed, Released, outcome_of
from dgx_music.worker.preview import Preview, publishing
from dgx_music.worker.stopping import Stopping
from dgx_music.worker.turns import Turns

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

logger = logging.getLogger(__name__)

_SHORT_SECONDS = 0.4
"""A WAV file of so short a clip takes a tenth of a millisecond, hardly more than the way to a thread."""
_CLIP_RETRY_SECONDS = 1.0


class Performing:
    """Carries claimed generations through, each from its claim to the one write that ends it."""

    def __init__(
        self,
        database: Database,
        artifacts: Artifacts,
        settings: Settings,
        engine: LiveEngine,
        leases: Leases,
        stopping: Stopping,
        rng: random.Random,
    ) -> None:
        self._database = database
        self._artifacts = artifacts
        self._settings = settings
        self._engine = engine
        self._leases = leases
        self._stopping = stopping
        self._rng = rng
        self._turns = Turns()
        self._completions = Completions(database, self._turns)

    async def run(self, running: Running) -> None:
        """Perform one generation; write any other outcome with one call of the storage."""
        logger.info("%s: started", running.lease)
        try:
            outcome = await self._attempt(running)
            if not isinstance(outcome, Completed):
                # First: while the outcome is written, a broken worker must not claim the next one.
                self._note_trouble(running.lease, outcome.error)
                await self._end_lease(running, outcome)
        finally:
            self._leases.remove(running.lease)
            self._stopping.wake()

    async def _attempt(self, running: Running) -> Completed | Released | Failed:
        """Perform it, and return how that ended; raises only if the worker itself is cancelled."""
        try:
            with running.scope:  # a stop ends the block without an error
                await self._perform(running)
        except Exception as error:
            return outcome_of(error)
        except BaseException:
            await self._give_back(running)
            raise
        stop = running.stopped_for
        return Completed() if stop is None else Released(stop.value)

    async def _perform(self, running: Running) -> None:
        """Infer, store, complete."""
        started = time.monotonic()
        made = await self._infer(running)
        device_seconds = time.monotonic() - started
        claim = running.claim
        self._engine.speeds.note(claim.model_name, device_seconds, claim.duration_seconds)
        artifact, facts = await self._store(running, made)
        del made  # its samples: the completion may wait long for a database that is away
        await self._complete(running, artifact, facts, device_seconds)

    # ----------------------------------------------------------------------- infer

    async def _infer(self, running: Running) -> Audio:
        request = _as_request(running.claim, await self._read_clips(running.claim))
        audio.check_format(self._format_of(running.claim), request.sample_rate)
        settings = self._settings
        deadline = settings.deadline_floor_seconds + settings.deadline_factor * request.duration
        rate, channels = request.sample_rate, request.channels
        preview = Preview(self._artifacts, running.lease, sample_rate=rate, channels=channels)
        free_slot = partial(self._free_slot, running)
        try:
            with anyio.move_on_after(deadline):
                async with publishing(preview):
                    return await self._engine.generate(
                        request, running.note_progress, free_slot, preview.hear
                    )
        finally:
            running.leave_engine()
            self._stopping.wake()
        raise TimeoutError(f"The attempt took longer than its deadline of {deadline:g} s.")

    def _free_slot(self, running: Running) -> None:
        running.free_slot()
        self._stopping.wake()

    async def _read_clips(self, claim: Claim) -> dict[str, Audio]:
        """Return the clips of a claimed row by the names of their fields.

        Raises ``GenerationRejectedError`` if one is missing or damaged.
        """
        wanted = clips_of(claim)
        if not wanted:
            return {}
        found = await self._find_clips(claim.lease, wanted.values())
        read = partial(clips.load, duration=claim.duration_seconds)
        return {
            name: await anyio.to_thread.run_sync(read, name, found.get(sha256, b""), sha256)
            for name, sha256 in wanted.items()
        }

    async def _find_clips(self, lease: Lease, sha256s: Collection[str]) -> dict[str, bytes]:
        """Return the stored clips; a lost lease or a stop ends the wait for a database."""

        async def work(session: AsyncSession) -> dict[str, bytes]:
            return await read_clips(session, sha256s)

        def note(error: DatabaseUnavailableError, _wait: float | None) -> None:
            logger.warning("%s: cannot read clips: %s", lease, error)

        return await keep_trying(
            lambda: self._database.transact(work, read_only=True),
            on=DatabaseUnavailableError,
            waits=for_ever(_CLIP_RETRY_SECONDS),
            note=note,
        )

    # ----------------------------------------------------------------------- store

    async def _store(self, running: Running, made: Audio) -> tuple[Artifact, dict[str, object]]:
        """Return the published file, and what is known of its audio."""
        lease = running.lease
        finished = await self._finish(running.claim, made)
        # Files of these names were never completed and never can be: this attempt holds the claim.
        await drop_files(self._artifacts, lease, range(1, lease.attempt + 1))
        artifact = await self._artifacts.publish(
            lease.generation_id,
            lease.attempt,
            finished.extension,
            finished.data,
        )
        return artifact, {**finished.facts, **made.facts}

    async def _finish(self, claim: Claim, made: Audio) -> FinishedAudio:
        """Return the audio as the file that the request asks for; a longer one is made in a thread."""
        audio_format = self._format_of(claim)
        finish = partial(
            audio.finish,
            made,
            sample_rate=claim.sample_rate,
            channels=claim.channels,
            audio_format=audio_format,
            loudness=self._settings.loudness,
            tags=_tags_of(claim, made),
            may_overwrite=True,  # they came from the engine's process: nobody else has them
        )
        if audio_format != "wav" or made.duration >= _SHORT_SECONDS:
            return await anyio.to_thread.run_sync(finish)
        # SQLite works in this process: beside it, this would only wait for Python's lock.
        if self._database.is_embedded:
            return finish()
        return await self._turns.do(finish)

    def _format_of(self, claim: Claim) -> AudioFormat:
        """Return the format that the request asks for, or this worker's own."""
        if claim.audio_format is None:
            return self._settings.audio_format
        return check_audio_format(claim.audio_format)

    # ----------------------------------------------------------------------- complete

    async def _complete(
        self, running: Running, artifact: Artifact, facts: dict[str, object], device_seconds: float
    ) -> None:
        completion = Completion(
            lease=running.lease,
            file_path=artifact.path,
            file_size_bytes=artifact.size_bytes,
            sha256=artifact.sha256,
            model_version=self._engine.info.model_version,
            generation_time_seconds=device_seconds,
            audio=facts,
        )
        await anyio.lowlevel.checkpoint_if_cancelled()  # the last moment at which a stop can win
        running.begin_completion()
        is_done = await self._completions.write(completion)
        running.end_completion(is_done=is_done)
        if is_done:
            self._engine.deaths.note_success()
            logger.info(
                "%s: completed in %.2f s, %d bytes",
                running.lease,
                device_seconds,
                artifact.size_bytes,
            )

    # ----------------------------------------------------------------------- fail, or release

    async def _give_back(self, running: Running) -> None:
        """Release it, unless its completion is being written: nobody knows what becomes of that."""
        if running.is_completing:
            self._leases.leave_undecided(running.lease)
        else:
            await self._end_lease(running, Released(Stop.RELEASED.value))

    async def _end_lease(self, running: Running, outcome: Released | Failed) -> None:
        """Write the outcome, and drop the file of an attempt that can never complete.

        Raises nothing: if the write fails, the lease runs out and a rescue does the rest. A write
        that raised may have been committed all the same: so the row itself is read to find out
        whether to delete the file.
        """
        lease = running.lease
        with anyio.CancelScope(shield=True):
            try:
                async with self._database.session() as session:
                    status = await self._write(session, running, outcome) or "lease lost"
            except DatabaseUnavailableError as error:
                status = str(error)
            except Exception as error:
                logger.exception("%s: unexpected", lease)
                status = str(error) or type(error).__name__
            level = logging.WARNING if isinstance(outcome, Failed) else logging.INFO
            logger.log(level, "%s: %s: %s", lease, status, outcome.why)
            if await self._is_over(lease):
                await drop_files(self._artifacts, lease, [lease.attempt])

    async def _write(
        self,
        session: AsyncSession,
        running: Running,
        outcome: Released | Failed,
    ) -> GenerationStatus | None:
        """Return the row's new status; ``None`` if the lease was lost."""
        lease = running.lease
        if isinstance(outcome, Released):
            return (await queue.release(session, [lease])).get(lease)
        failures, base = running.claim.failures + 1, self._settings.backoff_base_seconds
        wait = queue.backoff_seconds(failures, base, self._rng)
        return await queue.fail(
            session,
            lease,
            outcome.why,
            retry_in_seconds=None if outcome.is_final else wait,
            device_seconds=time.monotonic() - running.started,
        )

    async def _is_over(self, lease: Lease) -> bool:
        """Return True if this attempt has no file and can get none.

        False if nobody can say: then pruning finds the file.
        """
        try:
            owners = await self._database.transact(
                lambda session: find_owners(session, [lease.generation_id]), read_only=True
            )
        except Exception as error:
            logger.warning("%s: its file stays: %s", lease, error)
            return False
        owner = owners.get(lease.generation_id)
        return owner is None or not owner.may_have(lease.attempt)

    def _note_trouble(self, lease: Lease, error: Exception | None) -> None:
        """Stop the worker if its output or its engine is at fault; log what nobody expects."""
        if isinstance(error, ArtifactError):  # the next one's audio would be lost as well
            self._stopping.give_up(error)
        elif isinstance(error, EngineCrashedError):
            self._engine.deaths.on_engine_death(lease.generation_id, error)
        elif not isinstance(error, EngineError | InvalidRequestError | TimeoutError | None):
            logger.error("%s: unexpected", lease, exc_info=error)


def _tags_of(claim: Claim, made: Audio) -> Tags:
    return tags_of(
        generation_id=claim.lease.generation_id,
        prompt=claim.prompt,
        model_name=claim.model_name,
        title=claim.title,
        made_at=datetime.now(UTC),
        facts=made.facts,
    )


def _as_request(claim: Claim, given: Mapping[str, Any]) -> GenerationRequest:
    """Return the request of a claimed row, with its clips.

    Raises ``InvalidRequestError`` for what no engine can do.
    """
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
