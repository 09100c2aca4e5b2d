"""Statements that are compiled once, and go straight to the driver in sessions of our own.

SQLAlchemy's way from a statement to the driver and back takes several times as long as the database
itself. Only what a burst of requests or a worker repeats for each generation is worth this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

from sqlalchemy import CTE, Dialect, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.connection.direct import DirectSession

_FLOAT8 = 701
"""PostgreSQL's number of the type of doubles; SQLAlchemy asks for it where it reads numbers."""


class Prepared:
    """One Core statement without lists of unknown length; its parameters are given by name.

    ``make`` returns it. It is called at the first use, since most commands use few statements.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._compiled: dict[str, _Compiled] = {}

    @cached_property
    def statement(self) -> Any:
        """The statement."""
        return self._make()

    async def rows(self, session: AsyncSession, values: Mapping[str, Any]) -> Sequence[Any]:
        """Execute it and return the rows; their columns are attributes."""
        if not isinstance(session, DirectSession):
            return (await session.execute(self.statement, values)).all()
        compiled = self._for(session.dialect)
        rows = await session.fetch(compiled.text, compiled.parameters(values))
        return [compiled.row(row) for row in rows]

    async def run_each(self, session: AsyncSession, rows: Sequence[Mapping[str, Any]]) -> None:
        """Execute it once for each of these values, if there are any; it returns no rows."""
        if isinstance(session, DirectSession):
            compiled = self._for(session.dialect)
            await session.fetch_none(compiled.text, [compiled.parameters(row) for row in rows])
        elif rows:
            await session.execute(self.statement, rows)

    def _for(self, dialect: Dialect) -> _Compiled:
        if (found := self._compiled.get(dialect.driver)) is None:
            found = self._compiled[dialect.driver] = _Compiled(self.statement, dialect)
        return found


class _Compiled:
    """The statement as one driver takes it."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.text = str(compiled)
        binds = compiled.binds
        self._names = compiled.positiontup
        self._defaults = {
            name: compiled.params[name] for name in self._names if not binds[name].required
        }
        converters = [_to_driver(binds[name].type, dialect) for name in self._names]
        self._converters = [(place, to) for place, to in enumerate(converters) if to is not None]
        self._columns = [
            (column.key, _from_driver(column.type, dialect))
            for column in statement.exported_columns
        ]

    def parameters(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the parameters in their order, as the driver takes them."""
        if self._defaults:
            values = {**self._defaults, **values}
        found = [values[name] for name in self._names]
        for place, to in self._converters:
            found[place] = to(found[place])
        return found

    def row(self, values: Sequence[Any]) -> SimpleNamespace:
        """Return a row of the driver with its columns as attributes."""
        pairs = zip(self._columns, values, strict=True)
        return SimpleNamespace(
            **{name: value if to is None else to(value) for (name, to), value in pairs}
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
    text: bytes = _to_json()(value, inf_nan_mode="null")
    return text.decode()


@cache
def _to_json() -> Any:
    from pydantic_core import to_json  # not for commands that only read

    return to_json


def _to_driver(kind: Any, dialect: Dialect) -> Callable[[Any], Any] | None:
    found: Callable[[Any], Any] | None = kind.dialect_impl(dialect).bind_processor(dialect)
    return found


def _from_driver(kind: Any, dialect: Dialect) -> Callable[[Any], Any] | None:
    found: Callable[[Any], Any] | None
    found = kind.dialect_impl(dialect).result_processor(dialect, _FLOAT8)
    return found
