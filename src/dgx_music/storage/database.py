"""Engines, sessions, and the schema's life: init, migrate, reset.

SQLite needs a recipe, applied by ``configure_sqlite``. A deferred transaction that reads and then writes fails at once with
"database is locked" whatever the timeout, so writing transactions start with BEGIN IMMEDIATE; ``synchronous=FULL`` because
NORMAL loses acknowledged rows when the power fails; WAL so that readers never wait.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import anyio
from sqlalchemy import URL, Connection, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import DatabaseError as DriverError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    AsyncSessionTransaction,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import AsyncAdaptedQueuePool

from dgx_music.config import load_settings
from dgx_music.errors import (
    ConfigurationError,
    DatabaseNotInitializedError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
)
from dgx_music.storage.changes import Changes
from dgx_music.storage.models import Base
from dgx_music.storage.schema import SCHEMA_REVISION, VERSION_TABLE

T = TypeVar("T")

READ_ONLY = "dgx_music_read_only"
"""Execution option of a connection whose transactions only read: they begin deferred and never wait for a writer."""

_BUSY_TIMEOUT_SECONDS = 30
_READERS = 4
_LONGEST_NAME_BYTES = 240  # 255 is the file system's limit; SQLite's own files have longer names than the database


_is_finishing: ContextVar[bool] = ContextVar("dgx_music_is_finishing", default=False)


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run the work to its end even if the caller is cancelled, then let the cancellation through.

    Cancelling a statement of SQLAlchemy + aiosqlite in mid-flight leaves the database write-locked until garbage
    collection, and a commit's fate unknown. A shielded scope keeps anyio's cancellations out, a task of its own asyncio's.
    Inside such work another ``finish`` is a plain await: a transaction that is finished as a whole pays once.
    """
    if _is_finishing.get():
        return await work
    task = asyncio.create_task(_finishing(work))
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:  # it comes only once: a caller who survives an error of the work must not miss it
        raise cancelled from (None if task.cancelled() else task.exception())
    return task.result()


async def _finishing(work: Coroutine[Any, Any, T]) -> T:
    _is_finishing.set(True)  # in this task's own context
    return await work


def _finished(method: Any) -> Any:
    """Return the coroutine method with each call run to its end, whoever is cancelled meanwhile."""

    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return await finish(method(*args, **kwargs))

    return call


class _Transaction(AsyncSessionTransaction):
    start = _finished(AsyncSessionTransaction.start)
    commit = _finished(AsyncSessionTransaction.commit)
    rollback = _finished(AsyncSessionTransaction.rollback)
    __aexit__ = _finished(AsyncSessionTransaction.__aexit__)


class Session(AsyncSession):
    """An ``AsyncSession`` whose database calls each run to their end; not those made on a ``stream`` or ``connection``."""

    execute = _finished(AsyncSession.execute)
    scalar = _finished(AsyncSession.scalar)
    get = _finished(AsyncSession.get)
    get_one = _finished(AsyncSession.get_one)
    refresh = _finished(AsyncSession.refresh)
    merge = _finished(AsyncSession.merge)
    merge_all = _finished(AsyncSession.merge_all)
    delete = _finished(AsyncSession.delete)
    delete_all = _finished(AsyncSession.delete_all)
    flush = _finished(AsyncSession.flush)
    run_sync = _finished(AsyncSession.run_sync)
    connection = _finished(AsyncSession.connection)
    commit = _finished(AsyncSession.commit)
    rollback = _finished(AsyncSession.rollback)
    close = _finished(AsyncSession.close)
    reset = _finished(AsyncSession.reset)
    invalidate = _finished(AsyncSession.invalidate)

    def begin(self) -> AsyncSessionTransaction:
        """Like ``AsyncSession.begin``."""
        return _Transaction(self)

    def begin_nested(self) -> AsyncSessionTransaction:
        """Like ``AsyncSession.begin_nested``."""
        return _Transaction(self, nested=True)


class Database:
    """One database: its engine, and sessions on it.

    On SQLite one connection writes, so that this process's writers queue fairly instead of polling each other's lock, and a
    few others read.
    """

    def __init__(self, url: str) -> None:
        self.url = normalise_url(url)
        self.is_file = self.url.database not in (None, "", ":memory:")
        self.engine = _create_engine(self.url, connections=1)
        self._reading_engine = _create_engine(self.url, _READERS, read_only=True) if self.is_file else self.engine
        self.changes = Changes(self.path)
        self._writing = async_sessionmaker(self.engine, class_=Session, expire_on_commit=False)
        reading = self._reading_engine.execution_options(**{READ_ONLY: True}) if self.is_file else self.engine
        self._reading = async_sessionmaker(reading, class_=Session, expire_on_commit=False)

    def __str__(self) -> str:
        shown = self.url.set(drivername=self.url.get_backend_name())
        return shown.render_as_string(hide_password=True)

    @property
    def engines(self) -> tuple[AsyncEngine, ...]:
        """The SQLAlchemy engines: of writing sessions, and of reading ones where they have their own."""
        return (self.engine, self._reading_engine) if self.is_file else (self.engine,)

    @property
    def path(self) -> Path | None:
        """The file of a SQLite database, ``None`` where there is none."""
        return Path(str(self.url.database)) if self.is_file else None

    @asynccontextmanager
    async def session(self, *, read_only: bool = False) -> AsyncIterator[AsyncSession]:
        """Give a session that commits on success, rolls back on any exception, and always closes.

        A writing one holds SQLite's write lock from its first statement on: keep it short. A reading one sees one moment of
        the database, never waits for a writer, and must not write.
        """
        session = self._reading() if read_only else self._writing()
        try:
            yield session
            await session.commit()
        except BaseException as error:
            await session.rollback()
            if _is_unavailable(error):
                raise self._explained(error) from error
            raise
        finally:
            await session.close()

    async def transact(self, work: Callable[[AsyncSession], Awaitable[T]], *, read_only: bool = False) -> T:
        """Return what ``work`` returns, done in a transaction of its own that is finished whoever is cancelled."""

        async def run() -> T:
            async with self.session(read_only=read_only) as session:
                return await work(session)

        return await finish(run())

    async def migrate(self) -> None:
        """Bring the schema to this version's; does nothing, and imports nothing heavy, where it is there already."""
        self.create_folder()
        found = await self.revision()
        if found is not None and found > SCHEMA_REVISION:
            why = f"its revision {found} is newer than this version's, {SCHEMA_REVISION}; upgrade dgx-music"
            raise DatabaseUnavailableError(str(self), why)
        if found != SCHEMA_REVISION:
            await self._run(_upgrade)

    async def revision(self) -> str | None:
        """Return the schema's revision, without waiting for a writer; ``None`` where there are none of our tables."""
        revision: str | None = await self._run(_read_revision, read_only=True)
        return revision

    async def check_migrated(self) -> None:
        """Raise ``DatabaseNotMigratedError`` unless the schema is this version's."""
        found = await self.revision()
        if found != SCHEMA_REVISION:
            raise DatabaseNotMigratedError(found, SCHEMA_REVISION)

    async def reset(self) -> None:
        """Drop all our tables with all they hold, and create them empty."""
        self.create_folder()
        await self._run(_drop)
        await self._run(_upgrade)

    async def dispose(self) -> None:
        """Close every connection."""
        await finish(self.engine.dispose())
        await finish(self._reading_engine.dispose())

    async def _run(self, work: Any, *, read_only: bool = False) -> Any:
        engine = self._reading_engine.execution_options(**{READ_ONLY: True}) if read_only else self.engine

        async def run() -> Any:
            async with engine.begin() as connection:
                return await connection.run_sync(work)

        try:
            return await finish(run())
        except (SQLAlchemyError, sqlite3.DatabaseError) as error:
            if _is_unavailable(error):
                raise self._explained(error) from error
            raise

    def create_folder(self) -> None:
        """Create the folder of a SQLite database."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseUnavailableError(str(self), f"its folder cannot be created ({error.strerror})") from error

    def _explained(self, error: BaseException) -> DatabaseUnavailableError:
        nested = "all its connections are in use; is a session opened inside another one?"
        if isinstance(error, PoolTimeoutError):
            return DatabaseUnavailableError(str(self), nested)
        return DatabaseUnavailableError(str(self), str(getattr(error, "orig", error)))


def _is_unavailable(error: BaseException) -> bool:
    """Tell a database that cannot be used from a mistake in using it; the plain class is SQLite's for a damaged file."""
    known = (OperationalError, PoolTimeoutError, sqlite3.OperationalError)  # the last from _begin, which nothing wraps
    return isinstance(error, known) or type(error) in (DriverError, sqlite3.DatabaseError)


def normalise_url(url: str) -> URL:
    """Return the URL with the driver this library uses; ``sqlite:///file.db`` is all that a user need write."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # a ValueError would quote a part of the URL, maybe of its password
        raise ConfigurationError(
            "DGX_MUSIC_DATABASE_URL", "is not a database URL", "use something like sqlite:///data/generations.db"
        ) from None
    if parsed.get_backend_name() == "sqlite" and parsed.host is not None:
        raise ConfigurationError(
            "DGX_MUSIC_DATABASE_URL", "names a host, which a SQLite file has not", "write sqlite:/// with three slashes"
        )
    if parsed.drivername in ("sqlite", "sqlite+aiosqlite"):
        _check_file_name(parsed, has_options="?" in url)
        return parsed.set(drivername="sqlite+aiosqlite")
    raise ConfigurationError(
        "DGX_MUSIC_DATABASE_URL",
        f"names the database kind {parsed.drivername!r}, which this version does not support",
        "use sqlite:///path/to/file.db",
    )


def _check_file_name(url: URL, *, has_options: bool) -> None:
    name = url.database or ""
    if has_options:
        raise ConfigurationError("DGX_MUSIC_DATABASE_URL", "has options behind a ?", "leave them out; none is needed")
    is_text = name.isprintable() and all(len(part.encode()) <= _LONGEST_NAME_BYTES for part in name.split("/"))
    if not is_text:
        raise ConfigurationError(
            "DGX_MUSIC_DATABASE_URL",
            "names a file that cannot be",
            f"use printable names of at most {_LONGEST_NAME_BYTES} bytes",
        )


def configure_sqlite(engine: AsyncEngine) -> None:
    """Give an engine of the caller's own the settings that a SQLite database of ours needs."""
    event.listen(engine.sync_engine, "connect", _set_up_connection)
    event.listen(engine.sync_engine, "begin", _begin)


def _create_engine(url: URL, connections: int, *, read_only: bool = False) -> AsyncEngine:
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=connections,
        max_overflow=0,
        connect_args={"timeout": _BUSY_TIMEOUT_SECONDS},
    )
    event.listen(engine.sync_engine, "do_connect", _open_once)
    configure_sqlite(engine)
    if read_only:
        event.listen(engine.sync_engine, "connect", _refuse_writes)
    return engine


def _refuse_writes(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA query_only = ON")
    cursor.close()


def _open_once(_dialect: Any, _record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
    """Let a file that cannot be opened fail here: the driver's thread would report it to an event loop closed by then."""
    sqlite3.connect(arguments[0], uri=options.get("uri", False)).close()


def _set_up_connection(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver opens no transactions of its own; _begin does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT_SECONDS * 1000}")
    _switch_to_wal(connection, cursor)
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA mmap_size = 0")  # SQLite before 3.51.3 can corrupt a memory-mapped WAL database
    cursor.close()


def _switch_to_wal(connection: Any, cursor: Any) -> None:
    """Switch, as patiently as for any lock: of two that switch a new file at once, SQLite refuses one without waiting."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            connection.run_async(lambda _driver: asyncio.sleep(0.01))


def _begin(connection: Connection) -> None:
    """Begin on the driver's own connection: one trip to its thread where a statement takes three."""
    statement = "BEGIN" if connection.get_execution_options().get(READ_ONLY, False) else "BEGIN IMMEDIATE"
    driver: Any = connection.connection.dbapi_connection
    driver.run_async(lambda raw: raw.execute(statement))


def _read_revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    version: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 - a constant
    return version


def _upgrade(connection: Connection) -> None:
    from dgx_music.storage import migrations

    migrations.upgrade(connection)


def _drop(connection: Connection) -> None:
    foreign = set(Base.metadata.tables) & set(inspect(connection).get_table_names())
    if foreign and _read_revision(connection) is None:
        raise DatabaseUnavailableError(
            connection.engine.url.database or "", f"its table {min(foreign)} is not one of ours"
        )
    Base.metadata.drop_all(connection)
    connection.execute(text(f"DROP TABLE IF EXISTS {VERSION_TABLE}"))


_default: Database | None = None


async def init_db(database_url: str | None = None) -> Database:
    """Make the default database: engine, schema at this version, session factory; a SQLite file's folder is created.

    The URL is the one given, else ``DGX_MUSIC_DATABASE_URL``, else ``DATABASE_URL``, else ``sqlite:///data/generations.db``.
    Calling it again replaces the default database and closes the former one's connections.
    """
    global _default
    database = await _open(database_url or load_settings().database_url)
    former, _default = _default, database
    if former is not None:
        await former.dispose()
    return database


async def _open(url: str) -> Database:
    database = Database(url)
    try:
        await database.migrate()
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
    database = await _open(load_settings().database_url)
    if _default is None:
        _default = database
    if _default is not database:  # another task was quicker, and may be using its own already
        await database.dispose()
    return _default


@asynccontextmanager
async def get_session(*, read_only: bool = False) -> AsyncIterator[AsyncSession]:
    """Give a session on the default database: commits on success, rolls back on any exception, always closes."""
    async with get_database().session(read_only=read_only) as session:
        yield session


async def reset_database() -> None:
    """Drop and recreate all tables of the default database. Everything in them is lost."""
    await get_database().reset()


def warn_of_old_sqlite() -> str | None:
    """Return a sentence where the SQLite library has the WAL-reset bug, fixed in 3.51.3; ``None`` where it has not."""
    if sqlite3.sqlite_version_info >= (3, 51, 3):
        return None
    return f"SQLite {sqlite3.sqlite_version} is older than 3.51.3, which fixed a rare WAL bug; memory mapping is off."
