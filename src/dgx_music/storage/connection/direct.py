"""Sessions through which a ``Prepared`` statement reaches the driver without SQLAlchemy's layers.

For whatever else the work asks, they make SQLAlchemy's own session. Whoever opened them commits:
the work does not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import Dialect, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session as SyncSession
from sqlalchemy.util import greenlet_spawn

from dgx_music.storage.connection.postgres import is_trusted, note_rest
from dgx_music.storage.connection.postgres_errors import is_of_one_statement, is_unavailable
from dgx_music.storage.connection.sessions import Session
from dgx_music.storage.connection.warm_pool import WarmPool, give_back


class DirectSession(Session):
    """A session with a way to the driver; ``engine`` is the one of SQLAlchemy's own session."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._made: SyncSession | None = None

    @property
    def sync_session(self) -> SyncSession:  # type: ignore[override]  # there it is an attribute
        """SQLAlchemy's own session."""
        if self._made is None:
            self._made = SyncSession(self._engine, expire_on_commit=False)
        return self._made

    _proxied = sync_session

    @property
    def dialect(self) -> Dialect:
        """The dialect of the statements."""
        return self._engine.dialect

    def get_bind(self, *_arguments: Any, **_options: Any) -> Engine:
        """Return the engine, whatever is asked for: there is one."""
        return self._engine

    @abstractmethod
    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Execute the text, and return its rows as the driver gives them."""

    @abstractmethod
    async def fetch_none(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute the text once for each of these parameters; it returns no rows."""


class AsyncpgSession(DirectSession):
    """Each statement is a transaction of its own, on a connection of the pool.

    So an error undoes nothing that was executed before it.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine.sync_engine)

    async def fetch(self, statement: str, parameters: Sequence[Any]) -> Sequence[Sequence[Any]]:
        """Execute the text, and return its rows as the driver gives them."""
        await self.commit()  # or SQLAlchemy's own session would keep a second connection

        connection = await self._connect()
        adapted: Any = connection.dbapi_connection
        driver = adapted.driver_connection
        try:
            found: Sequence[Sequence[Any]] = await driver.fetch(statement, *parameters)
        except Exception as error:
            is_lost = driver.is_closed()
            told = DBAPIError(statement, None, error, connection_invalidated=is_lost)
            if is_lost:  # as SQLAlchemy does: the others are not to be trusted either
                await greenlet_spawn(self._engine.pool._invalidate, connection, error)
            elif is_unavailable(told) and not is_of_one_statement(told):
                # the server is a replica now, or forgot a statement
                await greenlet_spawn(connection.invalidate)
            raise told from error
        finally:
            await give_back(connection)
        return found

    async def _connect(self) -> Any:
        """Return a connection of the pool, as SQLAlchemy's own or a ``WarmConnection``."""
        warm = cast("WarmPool", self._engine.pool).take(is_trusted, note_rest)
        return await greenlet_spawn(self._engine.raw_connection) if warm is None else warm

    async def fetch_none(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute the text once for each of these parameters; it returns no rows."""
        for parameters in rows:
            await self.fetch(statement, parameters)

    async def commit(self) -> None:
        """Commit what SQLAlchemy's own session has begun."""
        if self._made is not None:
            await super().commit()

    async def rollback(self) -> None:
        """Roll back what SQLAlchemy's own session has begun."""
        if self._made is not None:
            await super().rollback()

    async def close(self) -> None:
        """Close SQLAlchemy's own session."""
        if self._made is not None:
            await super().close()

    async def invalidate(self) -> None:
        """Drop the connection of SQLAlchemy's own session."""
        if self._made is not None:
            await super().invalidate()
