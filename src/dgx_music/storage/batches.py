"""The rows of batches: added with their generations, deleted when none is left."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from sqlalchemy import CTE, ColumnElement, column, delete, exists, func, insert, not_, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.generation import g
from dgx_music.storage.models import Batch
from dgx_music.storage.prepared import json_rows
from dgx_music.storage.schema import Id, ShortText


async def add_batches(session: AsyncSession, names: Mapping[str, str | None]) -> None:
    """Add a batch for each of these ids, with its name."""
    if names:
        await session.execute(insert(Batch), [{"id": key, "name": names[key]} for key in names])


def added_batches() -> CTE:
    """Return PostgreSQL's INSERT of the batches in the parameter ``batches``, for a statement.

    That statement may add their generations too: it checks its references at its end.
    """
    given = json_rows("batches", [column("id", Id), column("name", ShortText)])
    chosen = select(given.c.id, given.c.name)
    added = postgresql.insert(Batch).from_select(["id", "name"], chosen, include_defaults=False)
    return added.cte("added_batches")


async def drop_batches(session: AsyncSession, ids: Collection[str]) -> None:
    """Delete these batches again, to which no generation was added."""
    if ids:
        await session.execute(delete(Batch).where(Batch.id.in_(ids)))


async def find_named_batches(session: AsyncSession, name: str, limit: int = 20) -> list[str]:
    """Return the id of the batch with this id, else of at most ``limit`` of this name, newest first."""
    if (found := await session.get(Batch, name.lower())) is not None:
        return [found.id]
    query = select(Batch.id).where(Batch.name == name).order_by(Batch.id.desc())
    return list(await session.scalars(query.limit(limit)))


async def count_empty_batches(session: AsyncSession) -> int:
    """Return how many batches ``prune_batches`` would delete."""
    return await session.scalar(select(func.count()).select_from(Batch).where(_is_empty())) or 0


async def prune_batches(
    session: AsyncSession, *, limit: int, among: Collection[str] | None = None
) -> int:
    """Delete at most ``limit`` batches that have no generation left; return how many.

    ``among`` names the batches to look at; all if not given. One that another transaction has
    locked stays.
    """
    empty = select(Batch.id).where(_is_empty()).order_by(Batch.id)
    if among is not None:
        empty = empty.where(Batch.id.in_(among))
    unlocked = empty.limit(limit).with_for_update(skip_locked=True)
    found = list(await session.scalars(unlocked))
    statement = delete(Batch).where(Batch.id.in_(found), _is_empty()).returning(Batch.id)
    options = {"synchronize_session": False}
    return len((await session.execute(statement, execution_options=options)).all())


def _is_empty() -> ColumnElement[bool]:
    return not_(exists().where(g.batch_id == Batch.id))
