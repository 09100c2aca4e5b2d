"""When will it be ready: what producers ask beside ``enqueue``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgx_music import validation
from dgx_music.storage.connection.sessions import check_session, finish
from dgx_music.storage.database import ensure_database
from dgx_music.storage.estimates import Estimate, estimate

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


async def estimate_generation(generation_id: str, *, session: AsyncSession | None = None) -> Estimate:
    """Return the place in the queue, and from when to when the generation starts and is done, in seconds from now.

    Where there is nothing to go by the ranges are ``None`` and ``unknown_because`` says why; what the ranges leave out stands
    at ``storage.estimates.estimate``. Raises ``GenerationNotFoundError``.
    """
    validation.check_name("generation_id", generation_id)
    if session is not None:
        check_session(session)
        return await finish(estimate(session, generation_id))
    database = await ensure_database()
    return await database.transact(lambda own: estimate(own, generation_id), read_only=True)
