"""Room in the queue: whether more generations may wait than wait now.

What waits is counted as the statistics count it, from an index of the waiting rows. The count ends
at the limit, so no queue is too long for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import Integer, Select, bindparam, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import QueueFullError
from dgx_music.statuses import PENDING
from dgx_music.storage.generation import Generation, g, generations
from dgx_music.storage.insertion import find_by_key, insert_generations
from dgx_music.storage.new_rows import Row
from dgx_music.storage.prepared import Prepared
from dgx_music.storage.schema import written


@dataclass(frozen=True)
class QueueLimits:
    """How many generations may wait, in all and of each tenant; ``None``: any number."""

    pending: int | None = None
    pending_per_tenant: int | None = None


def inserting(
    rows: Sequence[Row],
    clips: Mapping[str, tuple[bytes, float]],
    limits: QueueLimits | None,
    lock_timeout: str | None = None,
) -> Callable[[AsyncSession], Coroutine[Any, Any, list[Generation]]]:
    """Return the work that inserts these rows if the queue has room for all of them.

    Its transaction counts first. So on SQLite, where writers take turns, no limit is ever passed.
    On PostgreSQL, transactions that run at the same moment do not see each other's rows: together
    they can pass a limit by the rows of all of them but one.
    """
    insert = partial(insert_generations, rows=rows, clips=clips, lock_timeout=lock_timeout)
    if limits is None:
        return insert

    async def insert_if_room(session: AsyncSession) -> list[Generation]:
        await _check_room(session, rows, limits)
        return await insert(session)

    return insert_if_room


async def _check_room(session: AsyncSession, rows: Sequence[Row], limits: QueueLimits) -> None:
    """Raise ``QueueFullError`` unless all rows fit; rows that are stored already need no room."""
    try:
        await _count_and_check(session, rows, limits)
    except QueueFullError:
        stored = await find_by_key(session, rows)
        if not stored:
            raise
        fresh = {row["idempotency_key"] or row["id"]: row for row in rows}
        await _count_and_check(
            session, [fresh[key] for key in fresh.keys() - stored.keys()], limits
        )


async def _count_and_check(session: AsyncSession, rows: Sequence[Row], limits: QueueLimits) -> None:
    if limits.pending is not None and rows:
        waiting = await _count(session, _WAITING, limits.pending)
        _check(waiting, len(rows), limits.pending)
    if limits.pending_per_tenant is not None:
        for tenant, count in sorted(
            Counter(row["tenant"] for row in rows if row["tenant"]).items()
        ):
            waiting = await _count(session, _OF_TENANT, limits.pending_per_tenant, tenant=tenant)
            _check(waiting, count, limits.pending_per_tenant, tenant)


def _check(waiting: int, count: int, limit: int, tenant: str | None = None) -> None:
    if waiting + count > limit:
        raise QueueFullError(limit, count, tenant)


async def _count(session: AsyncSession, query: Prepared, limit: int, **values: str) -> int:
    """Return how many rows wait; the limit if there are more."""
    (row,) = await query.rows(session, {"most": limit, **values})
    return int(row.count)


def _waiting(*conditions: Any) -> Select[Any]:
    """Return the query for so many waiting rows with these conditions as are to be counted."""
    some: Select[Any] = select(literal_column("1")).where(g.status == written(PENDING), *conditions)
    return some.limit(bindparam("most", type_=Integer)).correlate_except(generations)


def _count_of(waiting: Select[Any]) -> Select[Any]:
    return select(func.count().label("count")).select_from(waiting.subquery())


def _count_of_tenant() -> Select[Any]:
    """Return the query for one tenant, whose rows of each model are side by side in an index."""
    models = _waiting_models()
    own = _waiting(g.model_name == models.c.name, g.tenant == bindparam("tenant"))
    count = _count_of(own).correlate(models).scalar_subquery()
    return select(func.coalesce(func.sum(count), 0).label("count")).select_from(models)


def _waiting_models() -> Any:
    """Return the models of which something waits, by one step in an index for each.

    A "loose index scan" (PostgreSQL wiki, "Loose indexscan").
    """

    def next_model(*beyond: Any) -> Any:
        first = select(func.min(g.model_name)).where(g.status == written(PENDING), *beyond)
        return first.scalar_subquery()

    models = select(next_model().label("name")).cte("models", recursive=True)
    following = select(next_model(g.model_name > models.c.name))
    return models.union_all(following.where(models.c.name.is_not(None)))


_WAITING = Prepared(lambda: _count_of(_waiting()))
_OF_TENANT = Prepared(_count_of_tenant)
