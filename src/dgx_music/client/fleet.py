"""What an operator asks of all workers at once: pause and resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dgx_music import validation
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.pauses import get_pauses, pause_model, resume_model

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession


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


def _model_name(model: str | None) -> str:
    return ALL_MODELS if model is None else validation.check_model(model).name
