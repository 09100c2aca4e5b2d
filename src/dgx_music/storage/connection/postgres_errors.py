"""What an error of PostgreSQL or of its drivers means: away, busy, locked, or a mistake."""

from __future__ import annotations

import re

from sqlalchemy import MetaData
from sqlalchemy.exc import DBAPIError, OperationalError

from dgx_music.storage.connection.revision import VERSION_TABLE

_TRANSIENT = {
    *("40001", "40P01", "40003", "55P03", "55006", "57014"),
    *("57P01", "57P02", "57P03", "57P04", "57P05", "25P03", "25P04", "25006"),
}
"""Serialisation, deadlock, timeouts, shutdown; 25006: the server has become a replica."""
_FORBIDDEN, _NOT_UNIQUE = "42501", "23505"
_LOCK_NOT_HAD, _IDLE_TOO_LONG = "55P03", "25P03"
_FAREWELL = "another operation (2) is in progress"
"""asyncpg's words after the server's farewell was read, and before the connection ends."""
_ASYNCPGS_IDLE_TOO_LONG = (
    "underlying connection is closed",
    "idle-in-transaction timeout",
    _FAREWELL,
)
_WORTH_REPEATING = {"40001", "40P01"}
_STALE_PLAN = ("cached plan must not change result type", "cached statement plan is invalid")
_NOT_THERE, _NO_COLUMN, _NO_SCHEMA = "42P01", "42703", "3F000"
_BEHIND_A_POOLER = {"26000", "42P05"}
_UNAVAILABLE_CLASSES = ("08", "53", "58", "XX")
"""Connections, resources, the server's own disk, and what it calls an internal error."""
_LOST = (
    "connection is closed",
    "connection was closed",
    "connection has been closed",
    _FAREWELL,
)


def is_unavailable(error: BaseException) -> bool:
    """Return True if the server is away or too busy, False for a mistake in using it."""
    if isinstance(error, DBAPIError):
        code = sqlstate(error)
        return error.connection_invalidated or _is_passing(code) or _is_lost(error, code)
    return _is_drivers_own(error) and (
        _is_passing(code := getattr(error, "sqlstate", None) or "") or not code
    )


def _is_passing(code: str) -> bool:
    passing = _TRANSIENT | _BEHIND_A_POOLER | {_FORBIDDEN, _NO_SCHEMA}
    return code in passing or code.startswith(_UNAVAILABLE_CLASSES)


def _is_lost(error: DBAPIError, code: str) -> bool:
    """Return True if the driver says that its connection is lost and the server says nothing."""
    is_psycopgs = isinstance(error, OperationalError) and not code
    return has_stale_plan(error) or is_psycopgs or any(words in str(error.orig) for words in _LOST)


def _is_drivers_own(error: BaseException) -> bool:
    """Return True for a driver's own error: while SQLAlchemy connects first, nothing wraps it."""
    return type(error).__module__.partition(".")[0] in ("asyncpg", "psycopg")


def is_of_another_schema(error: BaseException, metadata: MetaData) -> bool:
    """Return True if one of these tables or columns is missing: the schema was changed."""
    if not isinstance(error, DBAPIError):
        return False
    tables = {VERSION_TABLE, *metadata.tables}
    columns = {column.name for table in metadata.tables.values() for column in table.columns}
    ours = {_NOT_THERE: tables, _NO_COLUMN: columns}.get(sqlstate(error), set())
    # The words around the name, and the quotation marks, are in the server's language.
    return not ours.isdisjoint(re.findall(r"\w+", message_line(error.orig or error)))


def is_worth_repeating(error: BaseException) -> bool:
    """Return True if the same transaction may succeed when it is repeated at once.

    It was a deadlock's victim, has lost a race, or had a stale plan.
    """
    return isinstance(error, DBAPIError) and (
        sqlstate(error) in _WORTH_REPEATING or has_stale_plan(error)
    )


def has_stale_plan(error: BaseException) -> bool:
    """Return True if a migration has changed the result of a prepared statement.

    Repeated, it succeeds. The server's message is in its own language, but the name of its function
    is not. asyncpg's message is always the same.
    """
    if not isinstance(error, DBAPIError):
        return False
    told_by = getattr(getattr(error.orig, "diag", None), "source_function", None)
    return told_by == "RevalidateCachedQuery" or any(
        words in str(error.orig) for words in _STALE_PLAN
    )


def is_of_one_statement(error: BaseException | None) -> bool:
    """Return True if the server ended one statement for its own sake: it waited too long."""
    return isinstance(error, DBAPIError) and sqlstate(error) in ("57014", "55P03")


def is_taken(error: DBAPIError, constraint: str) -> bool:
    """Return True if a row was refused because this unique constraint has its value already."""
    told = error.orig, getattr(error.orig, "diag", None), getattr(error.orig, "__cause__", None)
    names = {getattr(each, "constraint_name", None) for each in told}  # each driver has its place
    return sqlstate(error) == _NOT_UNIQUE and constraint in names


def is_locked(error: BaseException | None) -> bool:
    """Return True if a lock was not free in time."""
    return isinstance(error, DBAPIError) and sqlstate(error) == _LOCK_NOT_HAD


def known_reason(error: BaseException, idle_seconds: float) -> str | None:
    """Return why the server gave up, and what to do; ``None`` if only its own message says it."""
    if not isinstance(error, DBAPIError):
        return None
    if is_locked(error):
        return "others are using its tables; try again when they are quieter"
    if sqlstate(error) in _BEHIND_A_POOLER:
        return f"{message_line(error.orig or error)}; if a pooler is in front of it, add ?pgbouncer=true to its URL"
    if has_stale_plan(error):
        return "its tables were changed meanwhile; try again"
    has_no_code = any(words in str(error.orig) for words in _ASYNCPGS_IDLE_TOO_LONG)
    if sqlstate(error) == _IDLE_TOO_LONG or has_no_code:
        why = f"its connection ended in an idle transaction, which the server allows for {idle_seconds:g} s"
        return f"{why}; finish it sooner, or raise DGX_MUSIC_IDLE_TRANSACTION_TIMEOUT_SECONDS"
    return None


def sqlstate(error: DBAPIError) -> str:
    """Return PostgreSQL's five characters for the error; empty if it is not the server's error."""
    return getattr(error.orig, "sqlstate", None) or ""


def message_line(error: BaseException) -> str:
    """Return the first line of the error's message without its full stop, or its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].removesuffix(".")
