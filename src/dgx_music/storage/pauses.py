"""Pausing: no worker claims anything of a paused model; running generations go on."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.schema import dialect_of, insert


async def pause_model(session: AsyncSession, model_name: str = ALL_MODELS) -> None:
    """Stop the claims of this model, or of all models; a second call changes nothing."""
    statement = insert(dialect_of(session), Pause).values(model_name=model_name)
    await session.execute(statement.on_conflict_do_nothing(index_elements=["model_name"]))


async def resume_model(session: AsyncSession, model_name: str = ALL_MODELS) -> bool:
    """Allow the claims of this model, or of all; return False if it was not paused itself."""
    name = Pause.model_name
    is_meant = name == model_name if model_name != ALL_MODELS else name.is_not(None)
    return bool(list(await session.scalars(delete(Pause).where(is_meant).returning(name))))


async def get_pauses(session: AsyncSession) -> list[Pause]:
    """Return the pauses, oldest first."""
    return list(await session.scalars(select(Pause).order_by(Pause.paused_at, Pause.model_name)))
