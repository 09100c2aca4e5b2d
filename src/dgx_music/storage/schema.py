"""Column types, the parts of statements that differ between databases, and the database's clock."""

from __future__ import annotations

import json
import math
import os
import time
from datetime import UTC, datetime
from typing import Any, cast

from sqlalchemy import (
    JSON,
    Boolean,
    ColumnElement,
    DateTime,
    Dialect,
    Double,
    Float,
    Select,
    String,
    Text,
    bindparam,
    column,
    literal,
    literal_column,
    select,
    table,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NULLTYPE, TypeDecorator, TypeEngine

from dgx_music.errors import InvalidRequestError
from dgx_music.statuses import GenerationStatus
from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE

AGEING_SECONDS = 60
"""One point of priority is worth a minute of waiting."""

DEFAULT_MAX_ATTEMPTS = 10
"""Lost workers also count as failures: with fewer attempts, a machine that dies every second would
make generations fail that are not the cause."""


def check_status(status: GenerationStatus | str) -> str:
    """Return the status as text, or raise ``InvalidRequestError``."""
    try:
        return GenerationStatus(status).value
    except ValueError:
        known = ", ".join(GenerationStatus)
        raise InvalidRequestError("status", f"{status!r} is not one", f"use {known}") from None


JsonObject: TypeEngine[Any] = JSON(none_as_null=True).with_variant(
    JSONB(none_as_null=True), "postgresql"
)
"""``jsonb`` on PostgreSQL: plain ``json`` stores text that it cannot read later."""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC; SQLite stores ``YYYY-MM-DD HH:MM:SS.ffffff``, which sorts by time."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Store in UTC; refuse a time without a zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a time without a zone is ambiguous; use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return it in UTC."""
        if value is None or value.tzinfo is UTC:
            return value
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Real(TypeDecorator[float]):
    """A double that is always read as a float: SQLite's RETURNING gives the integer 16 for 16.0."""

    impl = Double
    cache_ok = True

    def process_result_value(self, value: float | None, dialect: Dialect) -> float | None:
        """Return a float."""
        return None if value is None else float(value)


class now_plus(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock plus a number of seconds, at the moment the statement runs.

    All workers share this one clock: they send durations, never times. On PostgreSQL it is
    ``clock_timestamp()``, since ``now()`` is the transaction's start. On SQLite it is ``strftime``,
    since ``unixepoch('subsec')`` is NULL before 3.42.
    """

    type = UtcDateTime()
    inherit_cache = True

    def __init__(self, seconds: float | ColumnElement[Any] = 0.0) -> None:
        super().__init__(literal(seconds, Float) if isinstance(seconds, int | float) else seconds)


@compiles(now_plus, "sqlite")
def _now_plus_sqlite(element: now_plus, compiler: SQLCompiler, **kwargs: Any) -> str:
    seconds = compiler.process(element.clauses, **kwargs)
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', ({seconds}) || ' seconds') || '000')"


@compiles(now_plus, "postgresql")
def _now_plus_postgresql(element: now_plus, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kwargs)}))"


class now(FunctionElement[datetime]):  # noqa: N801 - reads as the SQL function it is
    """The database's clock at the moment the statement runs; also a column's server default."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **kwargs: Any) -> str:
    return "(strftime('%Y-%m-%d %H:%M:%f', 'now') || '000')"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: SQLCompiler, **kwargs: Any) -> str:
    return "clock_timestamp()"


class unindexed(FunctionElement[Any]):  # noqa: N801 - reads as the SQL term it is
    """A column in a condition by which SQLite must not choose an index.

    SQLite writes it ``+column`` (sqlite.org/optoverview.html).
    """

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        self.type = column.type
        super().__init__(column)


@compiles(unindexed, "sqlite")
def _unindexed_sqlite(element: unindexed, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"+{compiler.process(element.clauses, **kwargs)}"


@compiles(unindexed, "postgresql")
def _unindexed_postgresql(element: unindexed, compiler: SQLCompiler, **kwargs: Any) -> str:
    return compiler.process(element.clauses, **kwargs)


class as_condition(unindexed):  # noqa: N801 - reads as the SQL term it is
    """A boolean column as a condition.

    On SQLite, SQLAlchemy writes ``column = 1`` for what has the type of a boolean, which does not
    fit the condition of an index.
    """

    inherit_cache = True

    def __init__(self, column: ColumnElement[Any]) -> None:
        super().__init__(column)
        self.type = NULLTYPE


@compiles(as_condition)
def _as_condition(element: as_condition, compiler: SQLCompiler, **kwargs: Any) -> str:
    return compiler.process(element.clauses, **kwargs)


class rechecked(unindexed):  # noqa: N801 - reads as the SQL term it is
    """A text in the condition of a statement that finds its rows by their ids, on both databases.

    On PostgreSQL nothing is appended to the text. Without that, old statistics can make it read all
    rows of a status for the few that are meant.
    """

    inherit_cache = True


@compiles(rechecked, "postgresql")
def _rechecked_postgresql(element: rechecked, compiler: SQLCompiler, **kwargs: Any) -> str:
    return f"({compiler.process(element.clauses, **kwargs)} || '')"


class claim_order(FunctionElement[float]):  # noqa: N801 - reads as the SQL function it is
    """The order of claims: the time at which a row became due, minus a minute per priority point.

    Waiting raises a row's rank as priority does, so that nothing starves. All rows age equally, so
    their order never changes and an index can hold it. The index is used only if every statement
    writes the order in the same way.
    """

    type = Double()
    inherit_cache = True

    def __init__(self, run_at: ColumnElement[Any], priority: ColumnElement[Any]) -> None:
        super().__init__(run_at, priority)


@compiles(claim_order, "sqlite")
def _claim_order_sqlite(element: claim_order, compiler: SQLCompiler, **kwargs: Any) -> str:
    run_at, priority = (compiler.process(clause, **kwargs) for clause in element.clauses)
    return f"(julianday({run_at}) * 86400.0 - {priority} * {AGEING_SECONDS})"


@compiles(claim_order, "postgresql")
def _claim_order_postgresql(element: claim_order, compiler: SQLCompiler, **kwargs: Any) -> str:
    run_at, priority = (compiler.process(clause, **kwargs) for clause in element.clauses)
    # The epoch of an interval is immutable, unlike that of a time with a zone.
    since = f"({run_at} - timestamptz '2000-01-01 00:00:00+00')"
    return f"(extract(epoch FROM {since})::double precision - {priority} * {AGEING_SECONDS})"


class with_json_key(FunctionElement[dict[str, Any]]):  # noqa: N801 - reads as the SQL function it is
    """A JSON column with one key added or replaced: ``with_json_key(column, key, json_text)``."""

    type: TypeEngine[Any] = JsonObject
    inherit_cache = True

    def __init__(
        self, column: ColumnElement[Any], key: ColumnElement[str], value: ColumnElement[str]
    ) -> None:
        super().__init__(column, key, value)


@compiles(with_json_key, "sqlite")
def _with_json_key_sqlite(element: with_json_key, compiler: SQLCompiler, **kwargs: Any) -> str:
    column, key, value = (compiler.process(clause, **kwargs) for clause in element.clauses)
    return f"json_set(coalesce({column}, '{{}}'), '$.' || {key}, json({value}))"


@compiles(with_json_key, "postgresql")
def _with_json_key_postgresql(element: with_json_key, compiler: SQLCompiler, **kwargs: Any) -> str:
    column, key, value = (compiler.process(clause, **kwargs) for clause in element.clauses)
    # The object is made as text: jsonb_build_object would go through the parsed value once more.
    added = f"('{{' || to_json({key}::text) || ':' || ({value}) || '}}')::jsonb"
    return f"(coalesce({column}, '{{}}'::jsonb) || {added})"


class has_json_value(FunctionElement[bool]):  # noqa: N801 - reads as the SQL term it is
    """Whether a JSON object has this value under a top-level key.

    The value is text, and means the text itself, and also the number, true, false or null that
    is written so. Numbers are compared by value: ``1.50`` is 1.5.
    """

    type = Boolean()
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any], key: str, text: str) -> None:
        single = literal(json_of(text), Text)
        super().__init__(column, literal(key, Text), literal(text, Text), single)


class is_among(FunctionElement[Any]):  # noqa: N801 - reads as the SQL term it is
    """Whether a column's text is among those of a JSON array, by the column's index.

    One parameter holds any number of texts, so there is one prepared statement for all of them.
    """

    type = NULLTYPE  # as in ``as_condition``
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any], parameter: str) -> None:
        super().__init__(column, bindparam(parameter, type_=Text))


@compiles(is_among, "sqlite")
def _is_among_sqlite(element: is_among, compiler: SQLCompiler, **kwargs: Any) -> str:
    column, texts = (compiler.process(each, **kwargs) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({texts}))"  # noqa: S608 - compiled


@compiles(is_among, "postgresql")
def _is_among_postgresql(element: is_among, compiler: SQLCompiler, **kwargs: Any) -> str:
    column, texts = (compiler.process(each, **kwargs) for each in element.clauses)
    return f"{column} = ANY (ARRAY(SELECT jsonb_array_elements_text(({texts})::jsonb)))"


def json_of(text: str) -> str | None:
    """Return the JSON of the number, true, false or null that the text is; ``None`` if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    is_too_large = isinstance(value, int) and abs(value) >= 2**63
    is_single = (
        value is None
        or isinstance(value, int)
        or (isinstance(value, float) and math.isfinite(value))
    )
    return json.dumps(value) if is_single and not is_too_large else None


@compiles(has_json_value, "sqlite")
def _has_json_value_sqlite(element: has_json_value, compiler: SQLCompiler, **kwargs: Any) -> str:
    column, key, text, single = (compiler.process(each, **kwargs) for each in element.clauses)
    is_number = "IN ('integer', 'real')"
    is_equal = (
        f"CASE WHEN entry.type = 'text' THEN entry.value = {text} WHEN entry.type {is_number}"
        f" THEN json_type({single}) {is_number} AND entry.value = json_extract({single}, '$')"
        f" WHEN entry.type IN ('true', 'false', 'null') THEN entry.type = {single} END"
    )
    # A path of json_extract cannot name every key.
    entries = f"SELECT 1 FROM json_each({column}) AS entry"  # noqa: S608 - compiled columns
    return f"EXISTS ({entries} WHERE entry.key = {key} AND {is_equal})"


@compiles(has_json_value, "postgresql")
def _has_json_value_postgresql(
    element: has_json_value, compiler: SQLCompiler, **kwargs: Any
) -> str:
    column, key, text, single = (compiler.process(each, **kwargs) for each in element.clauses)
    return f"(({column} -> {key}) IN (to_jsonb({text}::text), ({single})::jsonb))"


Id = String(36)
HashText = String(64)
ShortText = String(200)
StatusText = String(20)


class Status(TypeDecorator[GenerationStatus]):
    """A generation's status: text in the database, a ``GenerationStatus`` in Python."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Store the text: drivers do not know enumerations."""
        return None if value is None else str.__str__(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> GenerationStatus | None:
        """Give back a status; the text of one that only a newer version knows."""
        try:
            return None if value is None else GenerationStatus(value)
        except ValueError:
            return cast("GenerationStatus", value)


LongText = Text()


def written(status: str) -> ColumnElement[str]:
    """Return a status as SQL text.

    With a parameter instead PostgreSQL's prepared plans could not use a partial index.
    """
    return literal_column(f"'{GenerationStatus(status)}'", StatusText)


def dialect_of(session: AsyncSession) -> str:
    """Return the kind of the session's database: ``sqlite`` or ``postgresql``."""
    return session.get_bind().dialect.name


def commits_each_statement(session: AsyncSession) -> bool:
    """Return True if each statement of the session, one of our own, is a transaction."""
    options = session.get_bind().get_execution_options()
    return bool(options.get("isolation_level") == "AUTOCOMMIT")


def insert(dialect: str, model: type[Any]) -> Any:
    """Return an INSERT for this kind of database, one that can say ON CONFLICT."""
    return (postgresql.insert if dialect == "postgresql" else sqlite.insert)(model)


_versions = table(VERSION_TABLE, column("version_num", String(32)))


def is_our_schema() -> ColumnElement[bool]:
    """Return the condition that the schema is still this version's; it may be migrated at any time.

    It is evaluated once for each statement. An older version does not know all columns of a row, so
    it must not claim one.
    """
    return (
        select(_versions.c.version_num).where(_versions.c.version_num == SCHEMA_REVISION).exists()
    )


def schema_revision() -> Select[Any]:
    """Return the query for the schema's revision; no row while the tables are being made."""
    return select(_versions.c.version_num)


def new_id() -> str:
    """Return a UUID version 7 as text (RFC 9562, 5.7); a later one sorts later."""
    return new_ids(1)[0]


def new_ids(count: int) -> list[str]:
    """Return so many UUIDs version 7 as text (RFC 9562, 5.7), in order.

    The 12 bits behind the milliseconds are the fraction of the millisecond (RFC 9562, 6.2, method
    3). Each id is a quarter of a microsecond later than the one before: 10,000 of them reach 2.4 ms
    into the future, and another one that is made within that time sorts between them.
    """
    ticks, random = time.time_ns() * _TICKS // 1_000_000, os.urandom(8 * count)
    return [
        _uuid(ticks + number, int.from_bytes(random[8 * number : 8 * number + 8], "big") >> 2)
        for number in range(count)
    ]


def _uuid(ticks: int, random: int) -> str:
    milliseconds, fraction = divmod(ticks, _TICKS)
    digits = f"{milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | random:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


_TICKS = 4096
"""In a millisecond."""
