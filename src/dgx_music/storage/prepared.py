"""Statements that are compiled once, and go straight to SQLite's driver where that is at hand.

SQLAlchemy's way from a statement to the driver and back takes many times as long as SQLite itself.
Only what a burst of requests or a worker repeats for each generation is worth this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from pydantic_core import to_json
from sqlalchemy import CTE, Text, bindparam, cast, func, select
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.connection.sqlite_thread import ThreadSession

_DIALECT = sqlite.dialect()
_DIALECT.insert_returning = _DIALECT.update_returning = True


class Prepared:
    """One Core statement without lists of unknown length; its parameters are given by name."""

    def __init__(self, statement: Any) -> None:
        self.statement = statement

    async def rows(self, session: AsyncSession, values: Mapping[str, Any]) -> Sequence[Any]:
        """Execute it and return the rows; their columns are attributes."""
        if not isinstance(session, ThreadSession):
            return (await session.execute(self.statement, values)).all()
        cursor = session.driver.execute(self._text, self._parameters(values))
        return [self._row(row) for row in cursor.fetchall()]

    async def run_each(self, session: AsyncSession, rows: Sequence[Mapping[str, Any]]) -> None:
        """Execute it once for each of these values, if there are any; it returns no rows."""
        if isinstance(session, ThreadSession):
            session.driver.executemany(self._text, map(self._parameters, rows))
        elif rows:
            await session.execute(self.statement, rows)

    @cached_property
    def _compiled(self) -> Any:
        return self.statement.compile(dialect=_DIALECT)

    @cached_property
    def _text(self) -> str:
        return str(self._compiled)

    @cached_property
    def _names(self) -> tuple[tuple[str, Callable[[Any], Any] | None, Any], ...]:
        """The parameters in their order: the name, what the driver's value is made with, the default."""
        compiled = self._compiled
        return tuple(
            (name, _binding(compiled.binds[name].type), compiled.params[name])
            for name in compiled.positiontup
        )

    def _parameters(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        found = ((values.get(name, default), bind) for name, bind, default in self._names)
        return tuple(value if bind is None else bind(value) for value, bind in found)

    @cached_property
    def _readers(self) -> tuple[tuple[str, Callable[[Any], Any] | None], ...]:
        """The columns in their order: the name, and what makes Python's value."""
        return tuple((each.key, _reading(each.type)) for each in self.statement.exported_columns)

    def _row(self, values: tuple[Any, ...]) -> SimpleNamespace:
        pairs = zip(self._readers, values, strict=True)
        return SimpleNamespace(
            **{name: value if read is None else read(value) for (name, read), value in pairs}
        )


def json_rows(parameter: str, columns: Sequence[Any]) -> CTE:
    """Return PostgreSQL's rows of these columns that one parameter holds, as a JSON array.

    One parameter serves any number of rows, so there is one prepared statement for all of them.
    """
    rows = func.jsonb_to_recordset(cast(bindparam(parameter, type_=Text), JSONB))
    given = rows.table_valued(*columns, name="given").render_derived(with_types=True)
    return select(given).cte(f"given_{parameter}").prefix_with("MATERIALIZED")


def as_json(value: Any) -> str:
    """Return the value as JSON, with null for NaN; ``json`` takes four times as long."""
    return to_json(value, inf_nan_mode="null").decode()


def _binding(kind: Any) -> Any:
    return kind.dialect_impl(_DIALECT).bind_processor(_DIALECT)


def _reading(kind: Any) -> Any:
    return kind.dialect_impl(_DIALECT).result_processor(_DIALECT, None)
