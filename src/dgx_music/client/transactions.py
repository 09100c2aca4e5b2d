"""Do the work of a call in the caller's session, or in a transaction of our own."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from dgx_music.config import check_variables
from dgx_music.storage.connection.sessions import check_session, finish
from dgx_music.storage.database import ensure_database

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

T = TypeVar("T")


async def transact(
    session: AsyncSession | None,
    work: Callable[[AsyncSession], Coroutine[Any, Any, T]],
    *,
    read_only: bool = False,
) -> T:
    """Return what the work returns.

    In the caller's session nothing is committed, rolled back or closed. Without one the work is a
    transaction on the default database, which is made from the settings if ``init_db`` was not
    called.
    """
    if session is not None:
        own = check_session(session)
        check_variables()
        return await finish(work(own))
    return await (await ensure_database()).transact(work, read_only=read_only)
