"""A read replica of a PostgreSQL database, for reads that may lag; without it, the primary answers.

Nothing depends on it. If it is away, or does not have this version's tables yet, it is skipped for
ten seconds; then one caller tries again.
"""

from __future__ import annotations

import logging
import time

from sqlalchemy import URL, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from dgx_music.errors import ConfigurationError, DatabaseError, DatabaseNotMigratedError
from dgx_music.storage.connection import postgres
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.connection.postgres_errors import message_line
from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE
from dgx_music.storage.connection.sessions import NoAnswerError, Session
from dgx_music.storage.connection.urls import normalise_url, shown

logger = logging.getLogger(__name__)

_SETTING = "DGX_MUSIC_REPLICA_URL"
_LEAVE_SECONDS = 10.0
"""How long a replica is skipped after it could not be used."""


class Replica:
    """The replica's engine, and whether it can be used now."""

    def __init__(self, url: URL, limits: Limits) -> None:
        self.url = url
        _, self.engine = postgres.create_engines(self.url, limits)
        self._sessions = async_sessionmaker(self.engine, class_=Session, expire_on_commit=False)
        self._is_left = False
        self._try_at = 0.0

    def __str__(self) -> str:
        return shown(self.url)

    async def begin(self) -> AsyncSession | None:
        """Return a session that has begun; ``None`` if the replica cannot be used now."""
        if time.monotonic() < self._try_at:
            return None
        if self._is_left:
            self._try_at = time.monotonic() + _LEAVE_SECONDS  # the others skip it meanwhile
        session = self._sessions()
        try:
            await _check_migrated(session)
        except BaseException as error:
            await session.invalidate()
            if not isinstance(error, DatabaseError | NoAnswerError | SQLAlchemyError):
                raise
            self._leave(error)
            return None
        self._return()
        return session

    def _leave(self, error: BaseException) -> None:
        if isinstance(error, PoolTimeoutError):  # it is busy, not away
            return
        if not self._is_left:
            logger.warning(
                "read replica: left for the primary (%s)",
                message_line(getattr(error, "orig", error)),
            )
        self._is_left, self._try_at = True, time.monotonic() + _LEAVE_SECONDS

    def _return(self) -> None:
        if self._is_left:
            logger.info("read replica: %s answers again", self)
        self._is_left, self._try_at = False, 0.0


async def _check_migrated(session: AsyncSession) -> None:
    """Raise unless the tables have this version's form: they arrive as late as the rows do.

    Checked each time, since it also finds a dead connection while the primary can still answer.
    """
    found = await session.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 - a constant
    if found != SCHEMA_REVISION:
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)


def check_replica_url(given: str, primary: URL) -> URL:
    """Return the URL of a replica of the primary; raises ``ConfigurationError``."""
    try:
        url = normalise_url(given)
    except ConfigurationError as error:
        remedy = (
            "use something like postgresql://user@host/name"
            if "sqlite:" in error.remedy
            else error.remedy
        )
        raise ConfigurationError(_SETTING, error.problem, remedy) from None
    if "sqlite" in (url.get_backend_name(), primary.get_backend_name()):
        raise ConfigurationError(
            _SETTING, "needs PostgreSQL", "leave it out: SQLite has no replicas"
        )
    return url
