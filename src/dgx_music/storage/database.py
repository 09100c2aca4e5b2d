"""One database: its engines, its sessions, and the life of its schema; and the default one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, NullPool
from sqlalchemy.exc import DatabaseError as DriverError
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from dgx_music.config import Settings, load_settings
from dgx_music.errors import (
    DatabaseNotInitializedError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
)
from dgx_music.files import make_folders
from dgx_music.storage import schema_changes
from dgx_music.storage.connection import postgres, postgres_errors, sqlite
from dgx_music.storage.connection.changes import Changes
from dgx_music.storage.connection.connections import ConnectionsByLoop
from dgx_music.storage.connection.postgres_drivers import Limits, creator
from dgx_music.storage.connection.replica import Replica, check_replica_url
from dgx_music.storage.connection.revision import SCHEMA_REVISION
from dgx_music.storage.connection.sessions import Ending, NoAnswerError, finish
from dgx_music.storage.connection.sqlite_file import GONE, DatabaseFile
from dgx_music.storage.connection.urls import file_of, normalise_url, shown
from dgx_music.storage.gathering import Gathering
from dgx_music.storage.generation import Generation
from dgx_music.storage.insertion_postgres import is_single
from dgx_music.storage.models import Base
from dgx_music.storage.new_rows import Row
from dgx_music.storage.room import QueueLimits, inserting

T = TypeVar("T")

_REPEATS = 3


class Database:
    """One database: its engines, and sessions on it.

    Event loops and threads may share it, and both sides of a fork may use it: each event loop has
    its own connections. ``limits`` are for PostgreSQL; ``replica_url`` names a read replica, for
    reads that may lag. A SQLite file that ``is_private`` is made for its owner alone.
    """

    def __init__(
        self,
        url: str,
        *,
        replica_url: str | None = None,
        limits: Limits | None = None,
        is_private: bool = True,
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
        return shown(self.url)

    @property
    def engine(self) -> AsyncEngine:
        """The SQLAlchemy engine of writing sessions, on the running event loop."""
        return self._connections.here().engine

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        """The engines with their own connections: for writing, for reading, for the replica."""
        return self._connections.here().engines

    @property
    def changes(self) -> Changes:
        """What wakes the tasks that wait for a change, on the running event loop."""
        return self._connections.here().changes

    @property
    def replica(self) -> Replica | None:
        """The read replica, if there is one, as the running event loop sees it."""
        return self._connections.here().replica

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database; ``None`` if there is none."""
        return file_of(self.url)

    def check_file(self) -> None:
        """Raise ``DatabaseUnavailableError`` if the file of a SQLite database is gone."""
        if self._file is not None and self._file.is_gone:
            raise DatabaseUnavailableError(str(self), GONE)

    @asynccontextmanager
    async def session(
        self, *, read_only: bool = False, may_lag: bool = False
    ) -> AsyncIterator[AsyncSession]:
        """Give a session that commits on success, rolls back on any exception, and always closes.

        A writing session holds SQLite's write lock from its first statement on: keep it short. A
        reading session sees one moment of the database, never waits for a writer, and must not
        write. It sees all that was committed before, unless it ``may_lag``: then the read replica
        answers, if there is one that can.

        PostgreSQL ends a session whose transaction is idle for ``Limits.idle_seconds``: do nothing
        slow in it.
        """
        begun = await self._begin(read_only=read_only, may_lag=may_lag)
        async with Ending(begun, partial(self._undo, read_only=read_only)) as session:
            yield session

    async def _undo(self, session: AsyncSession, error: BaseException, *, read_only: bool) -> None:
        """Roll back after this error of the session's work.

        Raises ``DatabaseUnavailableError`` if that is what the error means.
        """
        if not self._is_unavailable(error) or (read_only and _is_refused_write(error)):
            await self._roll_back(session)
            return
        if postgres_errors.is_of_one_statement(error):
            await self._roll_back(session)
        else:  # on a dead connection a rollback would wait as long again
            await session.invalidate()
        at_replica = (
            self.replica is not None and session.get_bind() is self.replica.engine.sync_engine
        )
        self._explain(error, at_replica=at_replica)

    async def _roll_back(self, session: AsyncSession) -> None:
        """Roll back, unless the database is away: the caller's own error is more important."""
        try:
            await session.rollback()
        except Exception as error:
            if not self._is_unavailable(error):
                raise
            await session.invalidate()

    async def _begin(
        self, *, read_only: bool, may_lag: bool, is_single: bool = False
    ) -> AsyncSession:
        if may_lag and not read_only:
            raise ValueError("a session that writes cannot lag; add read_only=True")
        here = self._connections.here()
        at_replica = await here.replica.begin() if may_lag and here.replica is not None else None
        if is_single:
            return here.writing_once()
        return at_replica or (here.reading() if read_only else here.writing())

    async def transact(
        self,
        work: Callable[[AsyncSession], Awaitable[T]],
        *,
        read_only: bool = False,
        may_lag: bool = False,
        is_single: bool = False,
    ) -> T:
        """Return what ``work`` returns, done in its own transaction, which a cancel does not stop.

        The work may only await the calls of its session (on PostgreSQL also other tasks of its
        own), and leaves commit and rollback to us. It is repeated if it was a deadlock's victim,
        and repeated on the primary if the read replica fails: a replica also ends a query that
        delays what it copies. A transaction that ``is_single`` writes with one statement:
        PostgreSQL then needs no BEGIN and no COMMIT, and an error undoes nothing else.
        """

        async def run(*, may_lag: bool) -> T:
            if self.is_embedded:
                return await self._run_on_thread(work, read_only=read_only)
            begun = await self._begin(read_only=read_only, may_lag=may_lag, is_single=is_single)
            async with Ending(begun, partial(self._undo, read_only=read_only)) as session:
                return await work(session)

        for _ in range(_REPEATS - 1):
            try:
                return await finish(run(may_lag=may_lag))
            except DatabaseUnavailableError as error:
                is_replicas = may_lag and error.url == str(self.replica)
                if not is_replicas and not _is_worth_repeating(error):
                    raise
                may_lag = False
        return await finish(run(may_lag=may_lag))

    async def insert(
        self,
        rows: Sequence[Row],
        clips: Mapping[str, tuple[bytes, float]],
        limits: QueueLimits | None = None,
    ) -> list[Generation]:
        """Insert generations in a transaction, which calls at the same time share; return them.

        See ``insert_generations`` for the rows and the clips, ``inserting`` for the limits. On
        PostgreSQL what needs several statements shares none: the others would wait for it.
        """
        if not (self.is_embedded or is_single(rows)):
            return await self.transact(inserting(rows, clips, limits))
        here = self._connections.here()
        if here.inserts is None:
            here.inserts = Gathering(self.transact)
        made: list[Generation] = await here.inserts.insert(rows, clips, limits)
        return made

    async def _run_on_thread(
        self, work: Callable[[AsyncSession], Awaitable[T]], *, read_only: bool
    ) -> T:
        def must_drop(error: BaseException) -> bool:
            return self._is_unavailable(error) and not (read_only and _is_refused_write(error))

        try:
            here = self._connections.here()
            return await here.run_on_thread(work, read_only=read_only, must_drop=must_drop)
        except BaseException as error:
            if must_drop(error):
                self._explain(error)
            raise

    async def prepare(self) -> None:
        """Make the database ready for use: migrate a SQLite file, only check a server.

        A server is never migrated silently, since others use it too. Raises
        ``DatabaseNotMigratedError``.
        """
        await (self.migrate() if self.is_embedded else self.check_migrated())

    async def migrate(self) -> None:
        """Migrate to this version's schema; if it is there already, imports nothing heavy."""
        self.create_folder()
        if await self.revision() != SCHEMA_REVISION:
            await self._change(schema_changes.upgrade)

    async def revision(self) -> str | None:
        """Return the schema's revision, without waiting for writers; ``None`` without our tables."""
        engine = self._connections.here().reading_engine
        revision: str | None = await self._run(engine, schema_changes.read_revision)
        return revision

    async def check_migrated(self) -> None:
        """Raise ``DatabaseNotMigratedError`` unless the schema is this version's."""
        found = await self.revision()
        if found != SCHEMA_REVISION:
            raise DatabaseNotMigratedError(found, SCHEMA_REVISION)

    async def reset(self) -> None:
        """Drop all our tables with their rows, and create them empty, in one transaction."""
        self.create_folder()
        await self._change(schema_changes.recreate)

    @asynccontextmanager
    async def migrating(self) -> AsyncIterator[AsyncEngine]:
        """Give an engine without time limits, for changes of the schema."""
        if self.is_embedded:
            yield self.engine
            return
        connect = creator(self.url, self.limits, is_patient=True)
        engine = create_async_engine(
            self.url.set(query={}), poolclass=NullPool, connect_args={"async_creator_fn": connect}
        )
        postgres.prepare(engine, self.url)
        try:
            yield engine
        finally:
            await engine.dispose()

    async def dispose(self) -> None:
        """Close every connection, also those of other event loops."""
        await self._connections.close()

    async def _change(self, work: Callable[[Connection], Any]) -> None:
        """Change the schema in one transaction; repeat it if it was a deadlock's victim."""
        async with self.migrating() as engine:
            for is_last in (*[False] * (_REPEATS - 1), True):
                try:
                    await self._run(engine, work)
                    return
                except DatabaseUnavailableError as error:
                    if is_last or not _is_worth_repeating(error):
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
            why = f"its folder cannot be created ({error.strerror})"
            raise DatabaseUnavailableError(str(self), why) from error

    def _is_unavailable(self, error: BaseException) -> bool:
        """Return True if the database cannot be used, False for a mistake in using it."""
        if isinstance(error, DatabaseUnavailableError | NoAnswerError | PoolTimeoutError):
            return True
        if not self.is_embedded:
            return postgres_errors.is_unavailable(error) or postgres_errors.is_of_another_schema(
                error, Base.metadata
            )
        is_wrapped = isinstance(error, OperationalError) or type(error) is DriverError
        return is_wrapped or sqlite.is_unavailable(error)

    def _explain(self, error: BaseException, *, at_replica: bool = False) -> NoReturn:
        """Raise the ``DatabaseUnavailableError`` that this error means."""
        if isinstance(error, DatabaseUnavailableError):
            raise error
        why = self._known_reason(error) or postgres_errors.message_line(
            getattr(error, "orig", error)
        )
        if isinstance(error, PoolTimeoutError):
            why = "all its connections are in use; is a session opened inside another one?"
            if self._file is not None and self._file.waits_for_lock:
                why = "another process has it locked, and others of this one wait before us"
        elif isinstance(error, TimeoutError):
            why = str(NoAnswerError())
        raise DatabaseUnavailableError(str(self.replica if at_replica else self), why) from error

    def _known_reason(self, error: BaseException) -> str | None:
        if self.path is not None:
            return sqlite.known_reason(error, self.path)
        return postgres_errors.known_reason(error, self.limits.idle_seconds)


def _is_worth_repeating(error: DatabaseUnavailableError) -> bool:
    return error.__cause__ is not None and postgres_errors.is_worth_repeating(error.__cause__)


def _is_refused_write(error: BaseException) -> bool:
    """Return True for a write in a session that only reads.

    In a writing session the same error means that the server has become a replica.
    """
    if not isinstance(error, DBAPIError):
        return False
    is_sqlites = getattr(error.orig, "sqlite_errorname", "") == "SQLITE_READONLY"
    return is_sqlites or postgres_errors.sqlstate(error) == "25006"


_default: Database | None = None


async def init_db(database_url: str | None = None) -> Database:
    """Make the default database: engine, schema at this version, session factory.

    A SQLite file and its folder are created. The schema of a PostgreSQL server is only checked:
    ``DatabaseNotMigratedError`` says what to run. The URL is the one given, else
    ``DGX_MUSIC_DATABASE_URL``, else ``DATABASE_URL``, else ``sqlite:///data/generations.db``. A
    second call replaces the default database and closes the connections of the first.
    """
    global _default
    database = await _open(database_url)
    former, _default = _default, database
    if former is not None:
        await former.dispose()
    return database


async def _open(url: str | None) -> Database:
    given = {} if url is None else {"database_url": url}
    database = Database.from_settings(load_settings(**given))
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
    """Return the default database; make it from the settings if ``init_db`` was not called."""
    return _default or await _open_default()


async def _open_default() -> Database:
    global _default
    database = await _open(None)
    if _default is None:
        _default = database
    if _default is not database:  # another task was faster, and may use its own already
        await database.dispose()
    return _default


@asynccontextmanager
async def get_session(
    *, read_only: bool = False, may_lag: bool = False
) -> AsyncIterator[AsyncSession]:
    """Give a session on the default database: commits on success, rolls back on any exception.

    It always closes. A ``read_only`` session sees all that was committed before; one that also
    ``may_lag`` asks the read replica, if there is one.
    """
    async with get_database().session(read_only=read_only, may_lag=may_lag) as session:
        yield session


async def reset_database() -> None:
    """Drop and recreate all tables of the default database. Everything in them is lost."""
    await get_database().reset()
