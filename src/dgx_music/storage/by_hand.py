"""The transitions that people and programs ask for: cancel, retry, and a row worked on by hand.

``update_generation_status`` and ``complete_generation`` are for a row that its caller works on
without a worker; they refuse a row that a worker holds. Each coroutine works in the session that it
is given and leaves the commit to whoever opened it.
"""

from __future__ import annotations

from typing import Any, NoReturn

from sqlalchemy import ColumnElement, case, not_, null, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music import validation
from dgx_music.errors import GenerationNotFoundError, IllegalTransitionError
from dgx_music.statuses import (
    CANCELLED,
    COMPLETED,
    FAILED,
    FINISHED,
    PENDING,
    PROCESSING,
    GenerationStatus,
    sources_of,
)
from dgx_music.storage.generation import CANCEL_REQUESTED, Generation, g, generations
from dgx_music.storage.schema import check_status, now, rechecked


async def cancel(session: AsyncSession, generation_id: str) -> GenerationStatus:
    """Cancel a pending generation, or ask the worker of a running one to stop; return its status.

    ``processing`` means that the request is noted: the row ends cancelled, whatever its attempt
    returns. Raises ``GenerationNotFoundError``, or ``IllegalTransitionError`` if it has already
    completed or failed.
    """
    moved = (await session.execute(cancelling().where(g.id == generation_id))).one_or_none()
    if moved is None:
        await _refuse(session, generation_id, CANCELLED)
    return GenerationStatus(moved.status)


async def retry(session: AsyncSession, generation_id: str) -> None:
    """Make a failed or cancelled generation pending again, without failures.

    The count of its attempts goes on. Raises ``GenerationNotFoundError``, or
    ``IllegalTransitionError`` if it is pending, running or completed.
    """
    moved = (await session.execute(retrying().where(g.id == generation_id))).one_or_none()
    if moved is None:
        await _refuse(session, generation_id, PENDING)


def cancelling() -> Any:
    """Return the UPDATE that cancels rows or asks for it; it returns their ids and statuses."""
    is_pending = g.status == PENDING
    return (
        update(generations)
        .where(rechecked(g.status).in_([PENDING, PROCESSING, CANCELLED]))
        .values(
            status=case((is_pending, CANCELLED), else_=g.status),
            completed_at=case((is_pending, now()), else_=g.completed_at),
            cancel_requested=True,
        )
        .returning(g.id, g.status)
    )


def retrying() -> Any:
    """Return the UPDATE that makes rows pending again; it returns their ids and statuses."""
    return (
        update(generations)
        .where(rechecked(g.status).in_([FAILED, CANCELLED]))
        .values(
            status=PENDING,
            failures=0,
            cancel_requested=False,
            run_at=now(),
            completed_at=null(),
            progress=0.0,
        )
        .returning(g.id, g.status)
    )


async def update_generation_status(
    session: AsyncSession,
    generation_id: str,
    status: GenerationStatus | str,
    error_message: str | None = None,
) -> Generation | None:
    """Move a row by hand and return it; ``None`` if the id is unknown.

    If its cancel was requested while it ran, it becomes cancelled instead of failed. Raises
    ``IllegalTransitionError`` if its status does not allow the change, or if a worker holds it.
    """
    wanted = check_status(status)
    changes: dict[str, Any] = {"status": wanted}
    if error_message is not None:
        changes["error_message"] = validation.tidy_text(error_message)
    if wanted == PROCESSING:
        changes |= {"attempt": Generation.attempt + 1, "started_at": now(), "progress": 0.0}
    if wanted == PENDING:
        failures = case((Generation.status == PROCESSING, Generation.failures), else_=0)
        changes |= {
            "run_at": now(),
            "failures": failures,
            "cancel_requested": False,
            "progress": 0.0,
        }
    if wanted == FAILED:
        changes["status"] = case((Generation.cancel_requested, CANCELLED), else_=FAILED)
    changes["completed_at"] = now() if wanted in FINISHED else None
    return await _move_by_hand(session, generation_id, wanted, changes)


async def complete_generation(
    session: AsyncSession,
    generation_id: str,
    generation_time: float,
    file_size_bytes: int,
    metadata: dict[str, Any] | None = None,
) -> Generation | None:
    """Complete a row worked on by hand and return it; ``None`` if the id is unknown.

    ``generation_time`` is in seconds; ``metadata`` is merged into the row's. Raises
    ``IllegalTransitionError`` if the row is not processing, or if a worker holds it.
    """
    changes = {
        "status": COMPLETED,
        "completed_at": now(),
        "generation_time_seconds": validation.check_between(
            "generation_time", generation_time, 0, 1e9
        ),
        "file_size_bytes": validation.check_integer(
            "file_size_bytes", file_size_bytes, 0, validation.MAX_SEED
        ),
        "progress": 1.0,
        "error_message": None,
    }
    more = validation.check_metadata(metadata or {})
    generation = await _move_by_hand(session, generation_id, COMPLETED, changes)
    if generation is not None and more:
        generation.set_metadata(generation.get_metadata() | more)
        await session.flush()
    return generation


async def _move_by_hand(
    session: AsyncSession, generation_id: str, wanted: str, changes: dict[str, Any]
) -> Generation | None:
    statement = (
        update(Generation)
        .where(
            Generation.id == generation_id,
            Generation.status.in_(sources_of(wanted)),
            Generation.worker_id.is_(None),
            _may_leave(wanted),
        )
        .values(changes)
        .returning(Generation)
    )
    options = {"populate_existing": True}
    moved: Generation | None = await session.scalar(statement, execution_options=options)
    if moved is None:
        await _refuse_by_hand(session, generation_id, wanted)
    return moved


def _may_leave(wanted: str) -> ColumnElement[bool]:
    """Keep a row whose cancel was requested from becoming pending again or completed."""
    if wanted not in (PENDING, COMPLETED):
        return true()
    return or_(not_(Generation.cancel_requested), Generation.status != PROCESSING)


async def _refuse_by_hand(session: AsyncSession, generation_id: str, wanted: str) -> None:
    """Raise ``IllegalTransitionError`` with the reason; return if there is no such row."""
    current = await session.get(Generation, generation_id, populate_existing=True)
    if current is None:
        return
    reason = f"worker {current.worker_id} holds it" if current.worker_id else ""
    if current.cancel_requested and current.is_processing and wanted in (PENDING, COMPLETED):
        reason = CANCEL_REQUESTED
    raise IllegalTransitionError(generation_id, current.status, GenerationStatus(wanted), reason)


async def _refuse(session: AsyncSession, generation_id: str, wanted: str) -> NoReturn:
    current = await session.scalar(select(g.status).where(g.id == generation_id))
    if current is None:
        raise GenerationNotFoundError(generation_id)
    raise IllegalTransitionError(generation_id, current, GenerationStatus(wanted))
