"""Runs migrations: on the library's connection or, for Alembic's commands, on the configured database."""

import asyncio
import warnings

from alembic import context
from sqlalchemy import Connection

from dgx_music.config import load_settings
from dgx_music.errors import DgxMusicError
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.database import Database
from dgx_music.storage.models import Base
from dgx_music.storage.schema_changes import take_turn


def our_tables(name: str | None, kind: str, _parents: object) -> bool:
    """Return False for other tables of the caller's database."""
    return kind != "table" or name in Base.metadata.tables


NOT_COMPARED = {
    "ix_generations_claim",
    "ix_generations_tenant_claim",
    "ix_generations_text_search",
    "ix_prompts_text_search",
    "text_search",
}
"""Indexes on expressions, which are reflected in other words, and search, which no model has."""


def comparable(
    _object: object, name: str | None, kind: str, _reflected: bool, _compared: object
) -> bool:
    """Return False for what cannot be compared here; the tests of the schema compare it."""
    return not (kind in ("index", "column") and name in NOT_COMPARED)


def run(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        take_turn(connection)
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=our_tables,
        include_object=comparable,
        compare_server_default=False,
        transactional_ddl=True,
    )
    with context.begin_transaction(), warnings.catch_warnings():
        for told in (
            "Skipped unsupported reflection of expr",
            "autogenerate skipping metadata-specified expr",
        ):
            warnings.filterwarnings("ignore", told)  # they are in NOT_COMPARED
        context.run_migrations()


async def run_on_configured_database() -> None:
    database = Database.from_settings(load_settings())
    database.create_folder()
    try:
        async with database.migrating() as engine, engine.begin() as connection:
            await connection.run_sync(run)
    finally:
        await database.dispose()


if context.is_offline_mode():
    raise SystemExit("Migrations run on a live database only: leave out --sql.")
if (given := context.config.attributes.get("connection")) is not None:
    run(given)
else:
    try:
        asyncio.run(run_on_configured_database())
    except DgxMusicError as error:
        raise SystemExit(f"Error: {error}") from None
