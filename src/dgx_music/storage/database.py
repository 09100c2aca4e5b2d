"""Engines, sessions, and the schema's life: init, migrate, reset."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, NullPool, inspect, text
from sqlalchemy.exc import DatabaseError as DriverError
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from dgx_music.config import Settings, load_settings
from dgx_music.errors import (
    DatabaseNotInitializedError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
    is_newer,
)
from dgx_music.modes import make_folders
from dgx_music.storage.connection import postgres, sqlite
from dgx_music.storage.connection.changes import Changes
from dgx_music.storage.connection.connections import ConnectionsByLoop
from dgx_music.storage.connection.notifications import Notifications
from dgx_music.storage.connection.postgres import Limits
from dgx_music.storage.connection.replica import Replica, check_replica_url
from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE
from dgx_music.storage.connection.sessions import NoAnswerError, finish
from dgx_music.storage.connection.sqlite_file import GONE, DatabaseFile
from dgx_music.storage.connection.urls import file_of, normalise_url
from dgx_music.storage.models import Base

T = TypeVar("T")

_MIGRATION_LOCK = (
    0x6467_786D  # "dgxm": an advisory lock's number, so that two migrations at once are one after the other
)
_LOCK_SECONDS = 5.0
"""How long a migration waits for a table that others are using: whoever comes to use it meanwhile waits behind it."""
_REPEATS = 3


class Database:
    """One database: its engines, and sessions on it.

    Event loops and threads may share it, and it may be used on both sides of a fork: each event loop has connections of its own.
    ``limits`` are PostgreSQL's; ``replica_url`` names a read replica of it, for what may be a little behind. A SQLite file that
    ``is_private`` is made for its owner alone.
    """

    def __init__(
        self, url: str, *, replica_url: str | None = None, limits: Limits | None = None, is_private: bool = True
    ) -> None:
        self.is_private = is_private
        self.url = normalise_url(url)
        self.limits = limits or Limits()
        self.is_embedded = self.url.get_backend_name() == "sqlite"
        replica = check_replica_url(replica_url, self.url) if replica_url else None
        self._file = None if self.path is None else DatabaseFile(self.path, is_private=is_private)
        self._connections = ConnectionsByLoop(self.url, replica, self.limits, self._file)

    @classmethod
    def from_settings(cls, settings: Settings) -> Database:
        """Return the database that the settings name."""
        limits = Limits(
            pool_size=settings.pool_size,
            connect_seconds=settings.connect_timeout_seconds,
            statement_seconds=settings.statement_timeout_seconds,
            command_seconds=settings.command_timeout_seconds,
            idle_seconds=settings.idle_transaction_timeout_seconds,
        )
        return cls(
            settings.database_url,
            replica_url=settings.replica_url,
            limits=limits,
            is_private=settings.is_private,
        )

    def __str__(self) -> str:
        return postgres.shown(self.url)

    @property
    def engine(self) -> AsyncEngine:
        """The SQLAlchemy engine of writing sessions, on the running event loop."""
        return self._connections.here().engine

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        """The engines with connections of their own: of writing sessions, of reading ones, of the replica."""
        return self._connections.here().engines

    @property
    def changes(self) -> Changes | Notifications:
        """What wakes those that wait for something in the database, on the running event loop."""
        return self._connections.here().changes

    @property
    def replica(self) -> Replica | None:
        """The read replica, where there is one, as the running event loop sees it."""
        return self._connections.here().replica

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database, ``None`` where there is none."""
        return file_of(self.url)

    def check_file(self) -> None:
        """Raise where the file of a SQLite database is gone."""
        if self._file is not None and self._file.is_gone:
            raise DatabaseUnavailableError(str(self), GONE)

    @asynccontextmanager
    async def session(self, *, read_only: bool = False, may_lag: bool = False) -> AsyncIterator[AsyncSession]:
        """Give a session that commits on success, rolls back on any exception, and always closes.

        A writing one holds SQLite's write lock from its first statement on: keep it short. A reading one sees one moment of
        the database, never waits for a writer, and must not write. It sees all that was committed before, unless it
        ``may_lag``: then the read replica answers, where there is one and it can.

        PostgreSQL ends a session whose transaction is idle for ``Limits.idle_seconds``: do nothing slow inside.
        """
        session = await self._begin(read_only=read_only, may_lag=may_lag)
        try:
            yield session
            await session.commit()
        except BaseException as error:
            if not self._is_unavailable(error) or (read_only and _is_refused_write(error)):
                await self._roll_back(session)
                raise
            await session.invalidate()  # on a dead connection a rollback would wait as long again
            self._explain(error, at_replica=self.replica is not None and session.bind is self.replica.engine)
        finally:
            await session.close()

    async def _roll_back(self, session: AsyncSession) -> None:
        """Roll back; where the database is away nothing is left to roll back, and the caller's own error is what counts."""
        try:
            await session.rollback()
        except Exception as error:
            if not self._is_unavailable(error):
                raise
            await session.invalidate()

    async def _begin(self, *, read_only: bool, may_lag: bool) -> AsyncSession:
        if may_lag and not read_only:
            raise ValueError("a session that writes cannot lag; add read_only=True")
        here = self._connections.here()
        at_replica = await here.replica.begin() if may_lag and here.replica is not None else None
        return at_replica or (here.reading() if read_only else here.writing())

    async def transact(
        self, work: Callable[[AsyncSession], Awaitable[T]], *, read_only: bool = False, may_lag: bool = False
    ) -> T:
        """Return what ``work`` returns, done in a transaction of its own that is finished whoever is cancelled.

        It is done again where it was a deadlock's victim, and on the primary where the read replica fails in the middle: one
        may also end a query that is in the way of what it copies.
        """

        async def run(*, may_lag: bool) -> T:
            async with self.session(read_only=read_only, may_lag=may_lag) as session:
                return await work(session)

        for _ in range(_REPEATS - 1):
            try:
                return await finish(run(may_lag=may_lag))
            except DatabaseUnavailableError as error:
                is_victim = error.__cause__ is not None and postgres.is_worth_repeating(error.__cause__)
                if not is_victim and not (may_lag and error.url == str(self.replica)):
                    raise
                may_lag = False
        return await finish(run(may_lag=may_lag))

    async def prepare(self) -> None:
        """Make the database ready for use: an embedded one is migrated, a server is only looked at.

        A server is never migrated silently: others use it too. Raises ``DatabaseNotMigratedError``.
        """
        await (self.migrate() if self.is_embedded else self.check_migrated())

    async def migrate(self) -> None:
        """Bring the schema to this version's; does nothing, and imports nothing heavy, where it is there already."""
        self.create_folder()
        if await self.revision() != SCHEMA_REVISION:
            await self._change(_upgrade)

    async def revision(self) -> str | None:
        """Return the schema's revision, without waiting for a writer; ``None`` where there are none of our tables."""
        revision: str | None = await self._run(self._connections.here().reading_engine, _read_revision)
        return revision

    async def check_migrated(self) -> None:
        """Raise ``DatabaseNotMigratedError`` unless the schema is this version's."""
        found = await self.revision()
        if found != SCHEMA_REVISION:
            raise DatabaseNotMigratedError(found, SCHEMA_REVISION)

    async def reset(self) -> None:
        """Drop all our tables with all they hold, and create them empty: for everybody else at one moment."""
        self.create_folder()
        await self._change(_recreate)

    @asynccontextmanager
    async def migrating(self) -> AsyncIterator[AsyncEngine]:
        """Give an engine for changes of the schema, which take as long as they take."""
        if self.is_embedded:
            yield self.engine
            return
        connect = postgres.creator(self.url, self.limits, is_patient=True)
        engine = create_async_engine(
            self.url.set(query={}), poolclass=NullPool, connect_args={"async_creator_fn": connect}
        )
        postgres.prepare(engine, self.url)
        try:
            yield engine
        finally:
            await engine.dispose()

    async def dispose(self) -> None:
        """Close every connection, those of other event loops too."""
        await self._connections.close()

    async def _change(self, work: Callable[[Connection], Any]) -> None:
        """Change the schema in one transaction; again where it was a deadlock's victim: it takes more locks than anybody."""
        async with self.migrating() as engine:
            for is_last in (*[False] * (_REPEATS - 1), True):
                try:
                    await self._run(engine, work)
                    return
                except DatabaseUnavailableError as error:
                    if is_last or error.__cause__ is None or not postgres.is_worth_repeating(error.__cause__):
                        raise

    async def _run(self, engine: AsyncEngine, work: Callable[[Connection], Any]) -> Any:
        async def run() -> Any:
            async with engine.begin() as connection:
                return await connection.run_sync(work)

        try:
            return await finish(run())
        except Exception as error:
            if self._is_unavailable(error) or isinstance(error, OSError | EOFError):
                self._explain(error)
            raise

    def create_folder(self) -> None:
        """Create the folder of a SQLite database."""
        if self.path is None:
            return
        try:
            make_folders(self.path.parent, is_private=self.is_private)
            self.path.parent.mkdir(exist_ok=True)  # a file of that name is no folder
        except OSError as error:
            raise DatabaseUnavailableError(str(self), f"its folder cannot be created ({error.strerror})") from error

    def _is_unavailable(self, error: BaseException) -> bool:
        """Tell a database that cannot be used from a mistake in using it."""
        if isinstance(error, DatabaseUnavailableError | NoAnswerError | PoolTimeoutError):
            return True
        if not self.is_embedded:
            return postgres.is_unavailable(error) or postgres.is_of_another_schema(error, Base.metadata)
        is_wrapped = isinstance(error, OperationalError) or type(error) is DriverError
        return is_wrapped or sqlite.is_unavailable(error)

    def _explain(self, error: BaseException, *, at_replica: bool = False) -> NoReturn:
        """Raise the ``DatabaseUnavailableError`` that the error amounts to."""
        if isinstance(error, DatabaseUnavailableError):
            raise error
        why = self._known_reason(error) or postgres.first_line(getattr(error, "orig", error))
        if isinstance(error, PoolTimeoutError):
            why = "all its connections are in use; is a session opened inside another one?"
            if self._file is not None and self._file.waits_for_lock:
                why = "another process has it locked, and others of this one wait before us"
        elif isinstance(error, TimeoutError):
            why = str(NoAnswerError())
        raise DatabaseUnavailableError(str(self.replica if at_replica else self), why) from error

    def _known_reason(self, error: BaseException) -> str | None:
        return postgres.known_reason(error, self.limits) if self.path is None else sqlite.known_reason(error, self.path)


def _is_refused_write(error: BaseException) -> bool:
    """Tell a write in a session that only reads; elsewhere the same error is of a server that has become a replica."""
    if not isinstance(error, DBAPIError):
        return False
    return postgres.sqlstate(error) == "25006" or getattr(error.orig, "sqlite_errorname", "") == "SQLITE_READONLY"


def _read_revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 - a constant
    return version


def _upgrade(connection: Connection) -> None:
    from dgx_music.storage import migrations

    if connection.dialect.name == "postgresql":
        take_turn(connection)
        encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding != "UTF8":  # no other one holds every prompt and every JSON text
            why = f"its encoding is {encoding}; create it with: CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
            raise DatabaseUnavailableError(postgres.shown(connection.engine.url), why)
    _check_ours(connection)
    migrations.upgrade(connection)


def _recreate(connection: Connection) -> None:
    _drop(connection)
    _upgrade(connection)


def take_turn(connection: Connection) -> None:
    """Wait for whoever migrates, as long as it takes; from then on for nobody who holds a table for long."""
    connection.execute(text(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"))
    connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_SECONDS * 1000:.0f}"))


def _drop(connection: Connection) -> None:
    if _check_ours(connection):
        from dgx_music.storage import migrations

        if connection.dialect.name == "postgresql":
            take_turn(connection)
            _lock_all(connection)
        migrations.downgrade(connection, "base")
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))


def _lock_all(connection: Connection) -> None:
    """Lock every table of ours, without a deadlock: wait for one only while holding none, for the one that was in the way."""
    tables = sorted(set(Base.metadata.tables) & set(inspect(connection).get_table_names()))
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        savepoint = connection.begin_nested()
        try:
            for table in tables:
                wait = "" if table == tables[0] else " NOWAIT"
                connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE{wait}"))
            savepoint.commit()
            return
        except DBAPIError as error:
            savepoint.rollback()
            if not postgres.is_locked(error) or time.monotonic() > deadline:
                raise
            tables.remove(table)
            tables.insert(0, table)


def _check_ours(connection: Connection) -> bool:
    """Return whether our tables are there; raise where a newer version made them, or somebody else's have their names."""
    found = _read_revision(connection)
    if is_newer(found, SCHEMA_REVISION):
        raise DatabaseNotMigratedError(found, SCHEMA_REVISION)
    is_ours = found is not None
    foreign = set(Base.metadata.tables) & set(inspect(connection).get_table_names())
    if foreign and not is_ours:
        raise DatabaseUnavailableError(postgres.shown(connection.engine.url), f"its table {min(foreign)} is not ours")
    return is_ours


_default: Database | None = None


async def init_db(database_url: str | None = None) -> Database:
    """Make the default database: engine, schema at this version, session factory; a SQLite file's folder is created.

    A PostgreSQL server's schema is only looked at: ``DatabaseNotMigratedError`` says what to run.
    The URL is the one given, else ``DGX_MUSIC_DATABASE_URL``, else ``DATABASE_URL``, else ``sqlite:///data/generations.db``.
    Calling it again replaces the default database and closes the former one's connections.
    """
    global _default
    database = await _open(database_url)
    former, _default = _default, database
    if former is not None:
        await former.dispose()
    return database


async def _open(url: str | None) -> Database:
    database = Database.from_settings(load_settings(**({} if url is None else {"database_url": url})))
    try:
        await database.prepare()
    except BaseException:
        await database.dispose()
        raise
    return database


async def close_db() -> None:
    """Close the default database's connections; ``init_db`` opens it again."""
    global _default
    former, _default = _default, None
    if former is not None:
        await former.dispose()


def get_database() -> Database:
    """Return the default database; raises ``DatabaseNotInitializedError`` before ``init_db``."""
    if _default is None:
        raise DatabaseNotInitializedError
    return _default


async def ensure_database() -> Database:
    """Return the default database, made from the settings where ``init_db`` was not called."""
    return _default or await _open_default()


async def _open_default() -> Database:
    global _default
    database = await _open(None)
    if _default is None:
        _default = database
    if _default is not database:  # another task was quicker, and may be using its own already
        await database.dispose()
    return _default


@asynccontextmanager
async def get_session(*, read_only: bool = False, may_lag: bool = False) -> AsyncIterator[AsyncSession]:
    """Give a session on the default database: commits on success, rolls back on any exception, always closes.

    A ``read_only`` one sees all that was committed before; one that ``may_lag`` too asks the read replica, if it can.
    """
    async with get_database().session(read_only=read_only, may_lag=may_lag) as session:
        yield session


async def reset_database() -> None:
    """Drop and recreate all tables of the default database. Everything in them is lost."""
    await get_database().reset()
