"""Pausing: while a model is paused nothing of it is claimed, by any worker; what runs goes on."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.models import ALL_MODELS, Pause
from dgx_music.storage.schema import dialect_of, insert


async def pause_model(session: AsyncSession, model_name: str = ALL_MODELS) -> None:
    """Let nothing of this model be claimed, or nothing at all; saying it again changes nothing."""
    statement = insert(dialect_of(session), Pause).values(model_name=model_name)
    await session.execute(statement.on_conflict_do_nothing(index_elements=["model_name"]))


async def resume_model(session: AsyncSession, model_name: str = ALL_MODELS) -> bool:
    """Let this model be claimed again, or all of them; return False where it was not paused by itself."""
    is_meant = Pause.model_name == model_name if model_name != ALL_MODELS else Pause.model_name.is_not(None)
    return bool(list(await session.scalars(delete(Pause).where(is_meant).returning(Pause.model_name))))


async def get_pauses(session: AsyncSession) -> list[Pause]:
    """Return what is paused, longest first."""
    return list(await session.scalars(select(Pause).order_by(Pause.paused_at, Pause.model_name)))
