"""That the tools of the fault tests do what they say: the server, and the proxy in front of it."""

import asyncio
import socket

import asyncpg
import psycopg
import pytest

from tests.postgres import OwnServer, PostgresServer
from tests.proxy import Proxy

LOST = (OSError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError, psycopg.OperationalError)
DRIVERS = [asyncpg.connect, psycopg.AsyncConnection.connect]


@pytest.fixture(scope="module")
def server():
    server = OwnServer.start(durable=True)
    server.execute("CREATE TABLE songs (title text)")
    yield server
    server.close()


@pytest.fixture
def proxy(server):
    server.execute("TRUNCATE songs")
    with Proxy(server.url("postgres")) as proxy:
        yield proxy


@pytest.fixture
async def connection(server, proxy):
    connection = await asyncpg.connect(proxy.url(server.url("postgres")))
    yield connection
    connection.terminate()


async def insert(connect, url, title="lofi rain"):
    """Insert a row and commit, with either driver."""
    connection = await connect(url)
    try:
        if isinstance(connection, psycopg.AsyncConnection):
            await connection.execute("INSERT INTO songs VALUES (%s)", [title])
            await connection.commit()
        else:
            async with connection.transaction():
                await connection.execute("INSERT INTO songs VALUES ($1)", title)
    finally:
        await connection.close()


def titles(server):
    return [title for (title,) in server.execute("SELECT title FROM songs ORDER BY title")]


def test_the_server_is_postgresql_18_and_answers_by_tcp_and_by_its_socket(server):
    for url in (server.url("postgres"), server.socket_url):
        with psycopg.connect(url) as connection:
            assert connection.info.server_version // 10_000 == 18


def test_an_immediate_stop_is_a_crash_and_the_next_start_recovers_on_the_same_port(server, proxy):
    server.execute("INSERT INTO songs VALUES ('kept')")
    port, pid = server.port, server.pid
    server.stop("immediate")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        server.execute("SELECT 1")
    server.start_again()
    assert "was not properly shut down" in server.log()
    assert (titles(server), server.port, server.pid != pid) == (["kept"], port, True)


def test_a_copy_of_a_template_has_its_rows_and_goes_away_under_its_clients(server):
    server.create_database("melody")
    server.execute("CREATE TABLE notes AS SELECT 440 AS hertz", database="melody")
    with psycopg.connect(server.create_database("copy", template="melody")) as client:
        assert client.execute("SELECT hertz FROM notes").fetchone() == (440,)
        assert server.backend_pids("copy") == [client.info.backend_pid]
        server.drop_database("copy")
        with pytest.raises(psycopg.errors.AdminShutdown):
            client.execute("SELECT 1")


def test_a_server_that_cannot_start_says_why(server, monkeypatch):
    monkeypatch.setattr("tests.postgres._free_port", lambda: server.port)
    with pytest.raises(RuntimeError, match="Address already in use"):
        OwnServer.start()


def test_somebody_elses_server_makes_databases_but_is_not_stopped(server):
    theirs = PostgresServer(server.url("whatever"))
    with psycopg.connect(theirs.create_database("guest")):
        assert theirs.url("guest") == server.url("guest")
    theirs.drop_database("guest")
    with pytest.raises(RuntimeError, match="use an OwnServer"):
        theirs.stop("immediate")
    theirs.close()


async def test_a_black_hole_holds_a_query_until_it_is_healed(connection, proxy):
    proxy.black_hole()
    query = asyncio.create_task(connection.fetchval("SELECT 42"))
    assert await asyncio.wait({query}, timeout=0.2) == (set(), {query})
    proxy.heal()
    assert await query == 42


async def test_a_black_hole_does_not_answer_new_connections(server, proxy):
    proxy.black_hole()
    with pytest.raises(TimeoutError):
        await asyncpg.connect(proxy.url(server.url("postgres")), timeout=0.2)
    assert proxy.connection_count == 1


async def test_a_black_hole_tells_the_server_nothing_of_a_client_that_left(
    server, connection, proxy
):
    pid = connection.get_server_pid()
    proxy.black_hole()
    connection.terminate()
    assert pid in server.backend_pids("postgres")
    proxy.heal()
    while pid in server.backend_pids("postgres"):
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_cut_ends_what_runs_and_welcomes_what_comes(server, connection, proxy, reset):
    query = asyncio.create_task(connection.execute("SELECT pg_sleep(60)"))
    while not server.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"):
        await asyncio.sleep(0.01)
    proxy.cut(reset=reset)
    with pytest.raises(LOST):
        await query
    await insert(asyncpg.connect, proxy.url(server.url("postgres")))
    assert titles(server) == ["lofi rain"]


async def test_a_refusing_proxy_cuts_all_and_comes_back_on_its_port(server, connection, proxy):
    port = proxy.port
    proxy.refuse()
    with pytest.raises(LOST):
        await connection.execute("SELECT 1")
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        pass
    proxy.heal()
    await insert(asyncpg.connect, proxy.url(server.url("postgres")))
    assert proxy.port == port


@pytest.mark.parametrize("connect", DRIVERS)
async def test_a_lost_reply_is_an_error_to_the_client_and_a_row_in_the_table(
    server, proxy, connect
):
    loss = proxy.lose_reply()
    with pytest.raises(LOST):
        await insert(connect, proxy.url(server.url("postgres")))
    await loss.wait()
    assert b"COMMIT" in loss.reply
    await insert(connect, proxy.url(server.url("postgres")), "next")
    assert titles(server) == ["lofi rain", "next"]


@pytest.mark.parametrize("connect", DRIVERS)
async def test_a_lost_request_is_an_error_to_the_client_and_no_row(server, proxy, connect):
    loss = proxy.lose_request()
    with pytest.raises(LOST):
        await insert(connect, proxy.url(server.url("postgres")))
    await loss.wait()
    assert titles(server) == []


async def test_a_loss_that_does_not_cut_is_silence_that_no_healing_ends(server, proxy):
    loss = proxy.lose_reply(cut=False)
    commit = asyncio.create_task(insert(asyncpg.connect, proxy.url(server.url("postgres"))))
    await loss.wait()
    proxy.heal()
    assert await asyncio.wait({commit}, timeout=0.2) == (set(), {commit})
    assert titles(server) == ["lofi rain"]
    proxy.cut()
    with pytest.raises(LOST):
        await commit
