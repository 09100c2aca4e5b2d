"""The read replica: a real streaming standby that lags, goes away, comes back, and ends queries that are in its way."""

import asyncio
import json
import logging
import os
import secrets

import pytest
from sqlalchemy import delete, func, select, text

from dgx_music.cli import main
from dgx_music.config import load_settings
from dgx_music.errors import ConfigurationError, DatabaseUnavailableError
from dgx_music.storage import (
    Database,
    Generation,
    close_db,
    create_generation,
    get_session,
    init_db,
)
from dgx_music.storage.connection import replica
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE
from tests.factories import MODEL
from tests.postgres import OwnServer, _user_and_group
from tests.proxy import Proxy

COUNT = select(func.count()).select_from(Generation)
IS_REPLICA = text("SELECT pg_is_in_recovery()")
POSTGRES = "postgresql://postgres@127.0.0.1/music"


class Primary(OwnServer):
    """A server whose commits wait for its standby if they ask for it (``remote_apply``)."""

    def _make_data_folder(self):
        super()._make_data_folder()
        with (self.folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write("synchronous_standby_names = '*'\n")


class Standby(OwnServer):
    """A streaming copy of the primary that lets no query hold it up."""

    primary = None

    def _make_data_folder(self):
        os.chown(self.folder, *_user_and_group())
        source = ["-h", "127.0.0.1", "-p", str(self.primary.port), "-U", "postgres"]
        options = [
            "-D",
            self.folder / "data",
            "--write-recovery-conf",
            "--checkpoint=fast",
            "--no-sync",
        ]
        assert self._run("pg_basebackup", *source, *options).wait(60) == 0, self.log()
        with (self.folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write("max_standby_streaming_delay = 0\n")


@pytest.fixture(scope="module")
def servers():
    primary = Primary.start()
    Standby.primary = primary
    standby = Standby.start()
    yield primary, standby
    standby.close()
    primary.close()


@pytest.fixture
def primary(servers):
    return servers[0]


@pytest.fixture
def standby(servers):
    """The standby, up and copying at the test's beginning."""
    standby = servers[1]
    yield standby
    if standby._process is None:
        standby.start_again()
    standby.execute("SELECT pg_wal_replay_resume()")


@pytest.fixture
def urls(primary, standby):
    """The URLs of an empty database, at the primary and at the standby."""
    name = f"test_{secrets.token_hex(4)}"
    return primary.create_database(name), standby.url(name)


@pytest.fixture(params=["asyncpg", "psycopg"])
async def database(urls, request):
    """An empty, migrated database with a replica that has it too."""
    own, copy = (url.replace("postgresql", f"postgresql+{request.param}") for url in urls)
    database = Database(own, replica_url=copy)
    await database.migrate()
    await replicate(database)
    yield database
    await database.dispose()


@pytest.fixture
def impatient(monkeypatch):
    """A replica that was of no use is tried again at once."""
    monkeypatch.setattr(replica, "_LEAVE_SECONDS", 0.0)


async def replicate(database):
    """Return once the standby has applied all that was committed."""
    async with database.session() as session:
        await session.execute(text("SET LOCAL synchronous_commit = remote_apply"))
        await session.execute(
            text("SELECT pg_logical_emit_message(true, 'test', 'all until here')")
        )


async def add(database):
    async with database.session() as session:
        return await create_generation(session, "lofi rain", MODEL, 8.0, 32_000, 1)


async def ask(database, query, *, may_lag=True):
    async with database.session(read_only=True, may_lag=may_lag) as session:
        return await session.scalar(query)


async def asks_the_replica(database):
    return await ask(database, IS_REPLICA)


# which server answers


async def test_a_session_that_may_lag_reads_the_replica_and_no_other_does(database):
    assert await asks_the_replica(database)
    assert not await ask(database, IS_REPLICA, may_lag=False)
    async with database.session() as session:
        assert not await session.scalar(IS_REPLICA)


async def test_a_reading_session_sees_what_was_just_written_while_the_replica_lags(
    database, standby
):
    standby.execute("SELECT pg_wal_replay_pause()")
    await add(database)

    assert await ask(database, COUNT, may_lag=False) == 1
    assert (await asks_the_replica(database), await ask(database, COUNT)) == (True, 0)
    standby.execute("SELECT pg_wal_replay_resume()")
    await replicate(database)
    assert await ask(database, COUNT) == 1


async def test_a_session_at_the_replica_sees_one_moment(database):
    async with database.session(read_only=True, may_lag=True) as session:
        before = await session.scalar(COUNT)
        await add(database)
        await replicate(database)
        assert (before, await session.scalar(COUNT)) == (0, 0)


async def test_a_session_that_writes_cannot_lag(database):
    with pytest.raises(ValueError, match="read_only"):
        async with database.session(may_lag=True):
            pass


async def test_the_default_database_has_the_replica_of_the_environment(database, urls, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", urls[0])
    monkeypatch.setenv("DGX_MUSIC_REPLICA_URL", urls[1])
    await init_db()

    async with get_session(read_only=True, may_lag=True) as session:
        assert await session.scalar(IS_REPLICA)
    await close_db()


# a replica that is of no use


async def test_without_the_replica_the_primary_answers_and_says_so_once(
    database, standby, caplog, impatient
):
    assert await asks_the_replica(database)
    standby.stop()

    answers = [await asks_the_replica(database) for _ in range(3)]

    assert answers == [False, False, False]
    assert [record.message[:35] for record in caplog.records] == [
        "read replica: left for the primary "
    ]


async def test_a_replica_that_is_back_is_read_again(database, standby, caplog, impatient):
    caplog.set_level(logging.INFO, logger="dgx_music")
    standby.stop()
    assert not await asks_the_replica(database)
    standby.start_again()

    assert [await asks_the_replica(database) for _ in range(2)] == [True, True]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_a_replica_that_was_of_no_use_is_left_alone_for_a_while(database, standby):
    standby.stop()
    assert not await asks_the_replica(database)
    standby.start_again()

    assert not await asks_the_replica(database)


async def test_only_one_waits_for_a_replica_that_does_not_answer(
    database, urls, impatient, monkeypatch
):
    with Proxy(urls[1]) as proxy:
        proxy.black_hole()
        lame = Database(urls[0], replica_url=proxy.url(urls[1]), limits=Limits(connect_seconds=0.2))
        assert not await asks_the_replica(lame)
        monkeypatch.setattr(replica, "_LEAVE_SECONDS", 10.0)
        connections = proxy.connection_count
        await asyncio.gather(*(asks_the_replica(lame) for _ in range(4)))
        assert proxy.connection_count - connections <= 1
        await lame.dispose()


async def test_a_replica_that_has_no_tables_yet_is_left(urls, primary, standby, caplog):
    database = Database(urls[0], replica_url=urls[1])
    await replicate(database)
    standby.execute("SELECT pg_wal_replay_pause()")
    await database.migrate()

    assert not await asks_the_replica(database)
    assert VERSION_TABLE in caplog.text
    await database.dispose()


async def test_a_replica_with_an_older_schema_is_left_until_it_has_caught_up(
    database, caplog, impatient
):
    async with database.session() as session:
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0001'"))
    await replicate(database)
    assert not await asks_the_replica(database)
    assert "is at revision 0001" in caplog.text

    async with database.session() as session:
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{SCHEMA_REVISION}'"))
    await replicate(database)
    assert await asks_the_replica(database)


async def test_a_replica_whose_connections_are_all_in_use_is_busy_but_not_left(urls, caplog):
    database = Database(
        urls[0], replica_url=urls[1], limits=Limits(pool_size=1, command_seconds=0.1)
    )
    await database.migrate()
    await replicate(database)

    async with database.session(read_only=True, may_lag=True):
        assert not await asks_the_replica(database)
    assert await asks_the_replica(database)
    assert caplog.records == []
    await database.dispose()


# in the middle of a transaction


async def read_in_the_way(database, calls):
    """Read at the replica, let the primary remove those rows, and read on; note which answers."""

    async def work(session):
        calls.append(await session.scalar(IS_REPLICA))
        await session.scalar(COUNT)
        if len(calls) == 1:
            await remove_everything(database)
        return await session.scalar(COUNT)

    return await database.transact(work, read_only=True, may_lag=True)


async def remove_everything(database):
    async with database.session() as session:
        await session.execute(delete(Generation))
    async with database.migrating() as engine, engine.connect() as connection:
        await (await connection.execution_options(isolation_level="AUTOCOMMIT")).exec_driver_sql(
            "VACUUM generations"
        )
    await replicate(database)


async def test_a_query_that_is_in_the_way_of_recovery_is_asked_of_the_primary(database):
    await add(database)
    await replicate(database)
    calls = []

    assert await read_in_the_way(database, calls) == 0
    assert calls == [True, False]


async def test_a_replica_that_dies_in_the_middle_is_replaced_by_the_primary(database, standby):
    calls = []

    async def work(session):
        calls.append(await session.scalar(IS_REPLICA))
        standby.stop("immediate")
        return await session.scalar(COUNT)

    assert await database.transact(work, read_only=True, may_lag=True) == 0
    assert calls == [True, False]


async def test_a_session_that_loses_the_replica_names_it(database, standby):
    async def lose_it():
        async with database.session(read_only=True, may_lag=True) as session:
            standby.stop("immediate")
            await session.scalar(COUNT)

    with pytest.raises(DatabaseUnavailableError) as failed:
        await lose_it()
    assert failed.value.url == str(database.replica)
    assert not await asks_the_replica(database)


async def test_a_mistake_in_the_work_is_not_asked_of_the_primary(database):
    calls = []

    async def work(session):
        calls.append(await session.scalar(IS_REPLICA))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.transact(work, read_only=True, may_lag=True)
    assert calls == [True]


# the command line


def told(capsys, *command):
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("command", [["list"], ["search", "rain"], ["stats"], ["prompts"]])
async def test_lists_searches_and_statistics_are_read_from_the_replica(
    database, urls, standby, monkeypatch, capsys, command
):
    empty = await asyncio.to_thread(told, capsys, *command, "--database-url", urls[0])
    standby.execute("SELECT pg_wal_replay_pause()")
    row = await add(database)
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", urls[0])
    assert await asyncio.to_thread(told, capsys, *command) != empty

    monkeypatch.setenv("DGX_MUSIC_REPLICA_URL", urls[1])
    assert await asyncio.to_thread(told, capsys, *command) == empty
    assert (await asyncio.to_thread(told, capsys, "show", row.id))["id"] == row.id


# settings


@pytest.mark.parametrize(
    ("url", "replica_url", "sentence"),
    [
        (POSTGRES, "sqlite:///x.db", "needs PostgreSQL; leave it out: SQLite has no replicas."),
        ("sqlite:///x.db", POSTGRES, "needs PostgreSQL; leave it out: SQLite has no replicas."),
        (
            POSTGRES,
            "mysql://u:secret@h/d",
            "names the database kind 'mysql', which is not supported; use something like postgres",
        ),
        (POSTGRES, "postgresql://u:secret@h", "names no database; write its name behind the host"),
        (POSTGRES, "postgresql://u:secret@h/d?sslmod=x", "has the unknown option 'sslmod'; use"),
    ],
)
def test_a_mistake_in_the_replicas_url_is_one_sentence(url, replica_url, sentence):
    with pytest.raises(ConfigurationError) as refused:
        Database(url, replica_url=replica_url)
    assert str(refused.value).startswith(f"DGX_MUSIC_REPLICA_URL {sentence}")
    assert "secret" not in str(refused.value)


def test_the_environments_replica_is_not_that_of_another_database(monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", POSTGRES)
    monkeypatch.setenv("DGX_MUSIC_REPLICA_URL", f"{POSTGRES}_copy")

    assert load_settings().replica_url == f"{POSTGRES}_copy"
    assert load_settings(database_url=POSTGRES).replica_url == f"{POSTGRES}_copy"
    assert load_settings(database_url="sqlite:///x.db").replica_url is None
