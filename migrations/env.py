"""Runs migrations: on the connection the library hands over, or, from Alembic's command line, on the configured database."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from dgx_music.config import load_settings
from dgx_music.storage.database import Database
from dgx_music.storage.models import Base
from dgx_music.storage.schema import VERSION_TABLE


def our_tables(name: str | None, kind: str, _parents: object) -> bool:
    """Leave alone what else lives in the caller's database."""
    return kind != "table" or name in Base.metadata.tables


def comparable(_object: object, name: str | None, kind: str, _reflected: bool, _compared: object) -> bool:
    """Leave out the claim's descending index, which SQLite cannot reflect; the schema's tests compare it."""
    return not (kind == "index" and name == "ix_generations_claim")


def run(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=our_tables,
        include_object=comparable,
        compare_server_default=False,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_on_configured_database() -> None:
    database = Database(load_settings().database_url)
    database.create_folder()
    try:
        async with database.engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await database.dispose()


if context.is_offline_mode():
    raise SystemExit("Migrations run on a live database only: leave out --sql.")
if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    asyncio.run(run_on_configured_database())
