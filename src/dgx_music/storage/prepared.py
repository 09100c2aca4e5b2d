"""Statements that are compiled once, and go straight to the driver in sessions of our own.

SQLAlchemy's way from a statement to the driver and back takes several times as long as the database
itself. Only what a burst of requests or a worker repeats for each generation is worth this.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import chain
from typing import Any

from sqlalchemy import CTE, Dialect, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage.connection.direct import DirectSession

_FLOAT8 = 701
"""PostgreSQL's number of the type of doubles; SQLAlchemy asks for it where it reads numbers."""


_ROWS_OF_A_STATEMENT = (50, 8, 1)
"""With more rows, SQLite's compiler takes longer than is saved."""


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

    async def rows_of_each(
        self, session: AsyncSession, each: Sequence[Mapping[str, Any]]
    ) -> list[Any]:
        """Execute SQLite's INSERT of each of these, many at a time, and return the rows.

        In sessions of our own, one statement inserts up to 50 of them. For each statement SQLite
        keeps a copy of the pages that it changes, so one for each row takes three times as long.
        """
        if not isinstance(session, DirectSession):
            return [row for values in each for row in await self.rows(session, values)]
        compiled = self._for(session.dialect)
        given = compiled.parameters_of_each(each)
        found: list[Any] = []
        for start, count in _shares(len(given)):
            parameters = list(chain.from_iterable(given[start : start + count]))
            found += await session.fetch(compiled.text_of(count), parameters)
        return [compiled.row(row) for row in found]

    async def insert_each(self, session: AsyncSession, each: Sequence[Mapping[str, Any]]) -> None:
        """Do the same with an INSERT that returns no rows."""
        if isinstance(session, DirectSession):
            await self.rows_of_each(session, each)
        else:
            await self.run_each(session, each)

    async def run_each(self, session: AsyncSession, each: Sequence[Mapping[str, Any]]) -> None:
        """Execute it once for each of these values, if there are any; it returns no rows."""
        if isinstance(session, DirectSession):
            compiled = self._for(session.dialect)
            await session.fetch_none(compiled.text, compiled.parameters_of_each(each))
        elif each:
            await session.execute(self.statement, each)

    def _for(self, dialect: Dialect) -> _Compiled:
        if (found := self._compiled.get(dialect.driver)) is None:
            found = self._compiled[dialect.driver] = _Compiled(self.statement, dialect)
        return found


class _Compiled:
    """The statement as one driver takes it."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled = statement.compile(dialect=dialect)
        self.text = str(compiled)
        self._texts: dict[int, str] = {}
        binds = compiled.binds
        self._names = compiled.positiontup
        self._defaults = {
            name: compiled.params[name] for name in self._names if not binds[name].required
        }
        converters = [_to_driver(binds[name].type, dialect) for name in self._names]
        self._converters = [(place, to) for place, to in enumerate(converters) if to is not None]
        columns = list(statement.exported_columns)
        self._make_row = _row_of(*(column.key for column in columns))
        readers = [_from_driver(column.type, dialect) for column in columns]
        self._readers = [(place, read) for place, read in enumerate(readers) if read is not None]

    def parameters(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the parameters in their order, as the driver takes them."""
        found = self._in_order(values)
        for place, to in self._converters:
            found[place] = to(found[place])
        return found

    def parameters_of_each(self, each: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """Return the parameters of each; a value that many share is converted once."""
        found = [self._in_order(values) for values in each]
        for place, to in self._converters:
            given, converted = None, to(None)
            for row in found:
                if (value := row[place]) is not given:
                    given, converted = value, to(value)
                row[place] = converted
        return found

    def _in_order(self, values: Mapping[str, Any]) -> list[Any]:
        if self._defaults:
            values = {**self._defaults, **values}
        return [values[name] for name in self._names]

    def text_of(self, count: int) -> str:
        """Return the text of an INSERT of so many rows that says ON CONFLICT."""
        if (found := self._texts.get(count)) is None:
            found = self._texts[count] = self._repeated(count)
        return found

    def _repeated(self, count: int) -> str:
        into, _, rest = self.text.partition(" VALUES ")
        values, _, conflict = rest.partition(" ON CONFLICT ")
        return f"{into} VALUES {', '.join([values] * count)} ON CONFLICT {conflict}"

    def row(self, values: Sequence[Any]) -> Any:
        """Return a row of the driver with its columns as attributes."""
        found = list(values)
        for place, read in self._readers:
            found[place] = read(found[place])
        return self._make_row(found)


def _row_of(*names: str) -> Callable[[Sequence[Any]], Any]:
    """Return what makes a tuple with these attributes of values."""
    row: Any = namedtuple("Row", names)  # type: ignore[misc]  # names that are known later
    make: Callable[[Sequence[Any]], Any] = row._make
    return make


def _shares(count: int) -> Iterator[tuple[int, int]]:
    """Yield where each statement's share of so many rows starts, and how many rows it has.

    The sizes are few, so that the driver keeps the compiled statements.
    """
    start = 0
    for size in _ROWS_OF_A_STATEMENT:
        while count - start >= size:
            yield start, size
            start += size


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
