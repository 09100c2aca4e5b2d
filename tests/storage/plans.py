"""How a database goes about a statement, by its own account."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.storage import Database


async def plan_of(database: Database, read: Callable[[AsyncSession], Awaitable[Any]]) -> str:
    """Return the plan of the last statement that ``read`` executes, with the very values it was given."""
    statements: list[tuple[str, Any]] = []

    def note(
        _connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, _many: bool
    ) -> None:
        statements.append((statement, values))

    async with database.session(read_only=True) as session:
        connection = await session.connection()
        event.listen(connection.sync_connection, "before_cursor_execute", note)
        await read(session)
        statement, values = statements[-1]
        explain = "EXPLAIN QUERY PLAN" if database.is_embedded else "EXPLAIN"
        rows = await connection.exec_driver_sql(f"{explain} {statement}", values)
        return "\n".join(str(row[-1]) for row in rows.all())


async def analyze(database: Database) -> None:
    """Let PostgreSQL count what is there, as it does by itself after a while."""
    if not database.is_embedded:
        async with database.migrating() as engine, engine.connect() as connection:
            await (
                await connection.execution_options(isolation_level="AUTOCOMMIT")
            ).exec_driver_sql("VACUUM ANALYZE")
