"""How far batches are: list them, look at one, or watch it to its end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING

import anyio

from dgx_music import validation
from dgx_music.client.transactions import transact
from dgx_music.storage import batch_progress
from dgx_music.storage.batch_progress import BatchPage, BatchProgress

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_POLL_SECONDS = 1.0


async def get_batch(batch_id: str, *, session: AsyncSession | None = None) -> BatchProgress:
    """Return how far a batch is, and when it is likely to be done.

    Raises ``BatchNotFoundError``.
    """
    validation.check_name("batch_id", batch_id)
    read = partial(batch_progress.read_batch, batch_id=batch_id)
    return await transact(session, read, read_only=True)


async def list_batches(
    *,
    limit: int = 100,
    after: str | None = None,
    session: AsyncSession | None = None,
) -> BatchPage:
    """Return a page of at most ``limit`` batches, newest first, without estimates.

    ``after`` is the ``next`` of an earlier page. Raises ``InvalidRequestError``.
    """
    read = partial(batch_progress.list_batches, limit=limit, after=after)
    return await transact(session, read, read_only=True)


async def watch_batch(batch_id: str) -> AsyncGenerator[BatchProgress, None]:
    """Yield the batch now and, once a second, whenever it has changed, until all are finished.

    The estimate changes too. Raises ``BatchNotFoundError``, also if it is deleted meanwhile.
    """
    seen: BatchProgress | None = None
    while True:
        batch = await get_batch(batch_id)
        if batch != seen:
            seen = batch
            yield batch
        if batch.is_finished:
            return
        await anyio.sleep(_POLL_SECONDS)
