"""What a program does with a generation after enqueue: wait, watch, cancel, retry, estimate.

If a function takes a ``session``, it commits, rolls back and closes nothing in it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import anyio

from dgx_music import validation
from dgx_music.audio.facts import AudioFacts
from dgx_music.client.transactions import transact
from dgx_music.errors import GenerationNotFoundError, WaitTimeoutError
from dgx_music.statuses import GenerationStatus
from dgx_music.storage import due, queue, repository
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.estimates import Estimate, estimate
from dgx_music.storage.models import Generation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_POLL_SECONDS = 1.0


async def cancel_generation(
    generation_id: str,
    *,
    session: AsyncSession | None = None,
) -> GenerationStatus:
    """Cancel a generation and return the status it has now.

    That is ``cancelled``, or ``processing`` while its worker stops it: such a row ends cancelled,
    never completed. Raises ``GenerationNotFoundError``, and ``IllegalTransitionError`` if it has
    already completed or failed.
    """
    validation.check_name("generation_id", generation_id)
    return await transact(session, lambda current: queue.cancel(current, generation_id))


async def retry_generation(generation_id: str, *, session: AsyncSession | None = None) -> None:
    """Make a failed or cancelled generation pending again, with all its attempts before it.

    Raises ``GenerationNotFoundError``, and ``IllegalTransitionError`` if it is pending, running or
    completed.
    """
    validation.check_name("generation_id", generation_id)
    await transact(session, lambda current: queue.retry(current, generation_id))


async def queue_position(generation_id: str, *, session: AsyncSession | None = None) -> int | None:
    """Return the place of a pending generation among those of its model, from 1, else ``None``."""
    validation.check_name("generation_id", generation_id)
    return await transact(
        session,
        lambda current: due.queue_position(current, generation_id),
        read_only=True,
    )


async def estimate_generation(
    generation_id: str,
    *,
    session: AsyncSession | None = None,
) -> Estimate:
    """Return the place in the queue, and when it is likely to start and to be done.

    If nothing is known yet, the ranges are ``None`` and ``unknown_because`` says why. Raises
    ``GenerationNotFoundError``.
    """
    validation.check_name("generation_id", generation_id)
    return await transact(session, lambda current: estimate(current, generation_id), read_only=True)


async def wait_for_generation(generation_id: str, *, timeout: float | None = None) -> Generation:
    """Wait until the generation is completed, failed or cancelled, and return its row.

    Raises ``WaitTimeoutError`` after ``timeout`` seconds; the generation goes on. Raises
    ``GenerationNotFoundError``.
    """
    if timeout is not None:
        validation.check_between("timeout", timeout, 0, 1e9)
    with anyio.move_on_after(timeout):
        async with aclosing(watch_generation(generation_id)) as rows:
            async for latest in rows:
                if latest.is_finished:
                    return latest
    latest = await read_generation(await ensure_database(), generation_id)
    if latest.is_finished:
        return latest
    raise WaitTimeoutError(generation_id, latest.status, timeout or 0.0)


async def watch_generation(generation_id: str) -> AsyncGenerator[Generation, None]:
    """Yield the row now and whenever its status, attempt or progress changes, up to its end.

    Raises ``GenerationNotFoundError``, also if the row is deleted meanwhile.
    """
    validation.check_name("generation_id", generation_id)
    database = await ensure_database()
    seen: tuple[Any, ...] | None = None
    # Subscribe before the first read: a change between the two must not be missed.
    with database.changes.subscribe(Topic.DONE, [generation_id]) as changes:
        while True:
            generation = await read_generation(database, generation_id)
            state = (
                generation.status,
                generation.attempt,
                generation.progress,
                generation.cancel_requested,
            )
            if state != seen:
                seen = state
                yield generation
            if generation.is_finished:
                return
            await changes.wait(_POLL_SECONDS)


def audio_facts(generation: Generation) -> AudioFacts | None:
    """Return duration, peak, loudness, waveform and so on of a completed generation's audio.

    ``None`` if there is no audio yet, or if the row was completed by hand without these facts.
    """
    return AudioFacts.read(generation.get_metadata().get(queue.AUDIO_KEY))


async def read_generation(database: Database, generation_id: str) -> Generation:
    """Return the row; raises ``GenerationNotFoundError``."""
    generation = await database.transact(
        lambda session: repository.get_generation(session, generation_id), read_only=True
    )
    if generation is None:
        raise GenerationNotFoundError(generation_id)
    return generation
