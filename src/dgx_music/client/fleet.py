"""What an operator asks of all workers at once: pause, resume, and how things stand."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dgx_music import validation
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.overview import QueueOverview, read_overview
from dgx_music.storage.pauses import get_pauses, pause_model, resume_model

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

_MOST_ROWS = 10_000


async def pause(model: str | None = None) -> list[Pause]:
    """Stop all claims of this model, or of all models, and return all pauses that hold now.

    That holds at once, for each worker, until ``resume``; what runs goes on. Raises
    ``InvalidRequestError``.
    """
    name = _model_name(model)

    async def work(session: AsyncSession) -> list[Pause]:
        await pause_model(session, name)
        return await get_pauses(session)

    return await (await ensure_database()).transact(work)


async def resume(model: str | None = None) -> list[Pause]:
    """Allow claims of this model again, or of all if none is named; return the pauses that remain.

    A pause of all models outlasts the resumption of one. Raises ``InvalidRequestError``.
    """
    name = _model_name(model)

    async def work(session: AsyncSession) -> list[Pause]:
        await resume_model(session, name)
        return await get_pauses(session)

    return await (await ensure_database()).transact(work)


async def queue_overview(*, waiting_limit: int = 20, finished_limit: int = 10) -> QueueOverview:
    """Return the workers, the queue of each model, and what runs, waits and has finished.

    Of what waits these are the next ``waiting_limit``, of what has finished the last
    ``finished_limit``. All of it is of one moment, and a read replica may answer. It never reads
    all finished rows, so it may be asked every second. Raises ``InvalidRequestError``.
    """
    work = partial(
        read_overview,
        waiting_limit=validation.check_integer("waiting_limit", waiting_limit, 0, _MOST_ROWS),
        finished_limit=validation.check_integer("finished_limit", finished_limit, 0, _MOST_ROWS),
    )
    return await (await ensure_database()).transact(work, read_only=True, may_lag=True)


def _model_name(model: str | None) -> str:
    return ALL_MODELS if model is None else validation.check_model(model).name
