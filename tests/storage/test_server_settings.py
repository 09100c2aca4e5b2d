"""What a role, a database or somebody else's migration has set or changed makes no difference."""

import asyncio
import itertools
import re
import secrets
from contextlib import nullcontext, suppress

import anyio
import pytest
from psycopg import sql
from sqlalchemy import text

from dgx_music import enqueue
from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import close_db, create_generation, init_db, search_generations
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.database import Database
from dgx_music.storage.models import Generation
from tests.factories import POSTGRES, on, read, start_one
from tests.patience import PATIENCE
from tests.proxy import Proxy

pytestmark = on(*POSTGRES)

TEXT = "lofi “rain” ♫ naïve \\ back\\n 'q'"
SETTINGS = {
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kolkata",
    "client_encoding": "latin1",
    "extra_float_digits": "-15",
    "standard_conforming_strings": "off",
    "bytea_output": "escape",
    "default_transaction_isolation": "serializable",
    "lock_timeout": "1ms",
    "statement_timeout": "1ms",
    "session_replication_role": "replica",
    "search_path": "",
}


@pytest.fixture
def set_up(postgres, database_url):
    """Set something for all connections to this test's database."""
    name = sql.Identifier(database_url.rpartition("/")[2])
    change = sql.SQL("ALTER DATABASE {} SET {} = {}")

    def set_for_all(setting, value):
        postgres.execute(change.format(name, sql.Identifier(setting), sql.Literal(value)))

    return set_for_all


async def asked(database, setting):
    async with database.session() as session:
        return await session.scalar(text(f"SELECT current_setting('{setting}')"))


@pytest.mark.parametrize(
    ("setting", "options"),
    [(setting, "") for setting in SETTINGS]
    + [
        (setting, "?pgbouncer=true") for setting in SETTINGS if setting != "statement_timeout"
    ],  # the pooler's own business
)
async def test_a_setting_of_the_database_makes_no_difference(
    set_up, database_url, setting, options
):
    set_up(setting, SETTINGS[setting])
    database = Database(database_url + options)
    lease = await start_one(
        database, prompt=TEXT, duration_seconds=8.1, metadata_={"a": [0.1, "♫\\"]}
    )
    row = await read(database, lease.generation_id)
    await database.dispose()

    assert (row.prompt, row.duration_seconds, row.metadata_) == (TEXT, 8.1, {"a": [0.1, "♫\\"]})
    assert (row.lease_expires_at - row.started_at).total_seconds() == pytest.approx(30, abs=1)


async def test_a_role_whose_triggers_do_not_fire_is_refused_in_a_sentence(
    postgres, database_url, database
):
    role = f"alice_{secrets.token_hex(4)}"
    postgres.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    postgres.execute(
        sql.SQL("ALTER ROLE {} SET session_replication_role = replica").format(sql.Identifier(role))
    )
    hers = Database(re.sub("//postgres@", f"//{role}@", database_url))

    with pytest.raises(DatabaseUnavailableError, match="session_replication_role"):
        await enqueue_in(hers)
    await hers.dispose()
    postgres.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


async def enqueue_in(database):
    await database.transact(lambda session: create_generation(session, TEXT, "m", 8.0, 32_000, 1))


@pytest.mark.parametrize("options", ["", "?pgbouncer=true"])
@pytest.mark.parametrize(
    ("setting", "value", "right"),
    [("synchronous_commit", "off", "on"), ("synchronous_commit", "local", "local")],
)
async def test_what_is_acknowledged_is_on_the_servers_disk(
    set_up, database_url, setting, value, right, options
):
    set_up(setting, value)
    database = Database(database_url + options)

    assert await asked(database, setting) == right
    await database.dispose()


@pytest.mark.parametrize("path", ["", '""', "theirs", "theirs, public", '"$user"'])
async def test_our_tables_are_found_where_they_were_made_and_before_others_of_the_same_name(
    set_up, database, path
):
    async with database.session() as session:
        await session.execute(text("CREATE SCHEMA theirs"))
        await session.execute(text("CREATE TABLE theirs.generations (id integer)"))
    await database.dispose()
    set_up("search_path", path)

    assert (
        await database.transact(
            lambda session: create_generation(session, TEXT, "m", 8.0, 32_000, 1)
        )
    ).is_pending


async def test_a_database_that_leads_nowhere_is_migrated_into_public(set_up, database):
    await database.migrate()
    async with database.migrating() as engine, engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await database.dispose()
    set_up("search_path", "")

    await database.migrate()
    await database.check_migrated()


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_database_that_is_read_only_for_a_while_is_unavailable(
    set_up, database_url, is_read
):
    set_up("default_transaction_read_only", "on")
    database = Database(database_url)
    if is_read:
        assert await database.revision()

    with pytest.raises(DatabaseUnavailableError, match="in a read-only transaction"):
        await start_one(database)
    await database.dispose()


CHANGES = (
    "generations ALTER COLUMN prompt TYPE varchar(5000)",
    "prompts ALTER COLUMN text TYPE varchar(5000)",
)


async def test_a_producer_does_not_notice_somebody_elses_migration(postgres, database_url):
    database = await init_db(database_url)
    for number in range(8):  # a statement is prepared after a few
        await enqueue(f"jazz {number}")
        await database.transact(lambda session: search_generations(session, "jazz"), read_only=True)
    for change in CHANGES:
        postgres.execute(f"ALTER TABLE {change}", database=database.url.database)
    rows = await asyncio.gather(*[enqueue(f"rock {number}") for number in range(8)])
    found = await database.transact(
        lambda session: search_generations(session, "rock"), read_only=True
    )
    await close_db()

    assert (len(rows), len(found)) == (8, 8)


@pytest.mark.parametrize("begins", [True, False])
async def test_a_session_of_the_callers_own_meets_somebody_elses_migration(
    postgres, database, begins
):
    lease = await start_one(database)
    for _ in range(8):
        await read(database, lease.generation_id)
    postgres.execute(f"ALTER TABLE {CHANGES[0]}", database=database.url.database)
    told = pytest.raises(
        DatabaseUnavailableError, match="its tables were changed meanwhile; try again"
    )

    with nullcontext() if begins else told:
        async with database.session(read_only=True) as session:
            if not begins:  # then nobody can repeat its statements
                await session.execute(text("SELECT 1"))
            assert (await session.get(Generation, lease.generation_id)).prompt == "lofi rain"
    assert (await read(database, lease.generation_id)).prompt == "lofi rain"


async def test_a_reset_beside_producers_and_workers_disturbs_nobody(database_url):
    database, is_over, rounds = await init_db(database_url), asyncio.Event(), []

    async def work():
        while not is_over.is_set():
            await enqueue("rain")
            await database.transact(
                lambda session: search_generations(session, "rain"), read_only=True
            )
            rounds.append("enqueued and found")

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(work)
        for _ in range(3):
            await database.reset()
        is_over.set()
    await close_db()

    assert len(rounds) >= 4


@pytest.mark.parametrize("number", range(2, 14))
async def test_a_connection_that_is_lost_at_any_moment_of_an_engines_first_is_the_one_typed_error(
    database_url, number
):
    """SQLAlchemy asks a server this and that on the first connection, and wraps nothing that the driver raises then."""
    requests = itertools.count(1)
    with Proxy(database_url) as proxy:
        database = Database(
            proxy.url(database_url), limits=Limits(connect_seconds=1, command_seconds=1)
        )
        lost = proxy.lose_reply(to=lambda _request: next(requests) == number)
        # The last of them may be none of the first connection's; on a busy machine the limits end others.
        with anyio.fail_after(PATIENCE):
            while not lost.happened.done():
                with suppress(DatabaseUnavailableError):
                    await start_one(database)
            revision = None
            while revision is None:
                with suppress(DatabaseUnavailableError):
                    revision = await database.revision()
        await database.dispose()
