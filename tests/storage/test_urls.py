"""What a user may write as the database's URL: each form, with each driver, against a real server."""

import asyncio
import socket
import struct
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from psycopg import sql
from sqlalchemy import text

from dgx_music.errors import ConfigurationError, DatabaseUnavailableError
from dgx_music.storage.connection import urls
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.connection.urls import (
    is_pooled_by_transaction,
    normalise_url,
    server_address,
)
from dgx_music.storage.database import Database
from tests.factories import POSTGRES
from tests.patience import PATIENCE
from tests.postgres import OwnServer
from tests.proxy import Proxy

SETTING = "DGX_MUSIC_DATABASE_URL"


@pytest.mark.parametrize("url", ["sqlite:///data/x.db", "sqlite+aiosqlite:///data/x.db"])
def test_a_plain_sqlite_url_gets_the_async_driver(url):
    assert str(normalise_url(url)) == "sqlite+aiosqlite:///data/x.db"


@pytest.mark.parametrize(
    "path", ["/a b/x.db", "/%20/x.db", "/100%/x#1.db", "/ü☃+&;/x.db", "x/~/y.db", "/~/x.db"]
)
def test_a_sqlite_path_is_kept_and_shown_as_it_is(path):
    assert normalise_url(f" sqlite:///{path}\r\n").database == path
    assert str(Database(f"sqlite:///{path}")) == f"sqlite:///{path}"


def test_a_home_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")

    assert normalise_url("sqlite:///~/x.db").database == "/home/ann/x.db"
    assert normalise_url("sqlite:///~root/x.db").database == f"{Path('~root').expanduser()}/x.db"
    with pytest.raises(
        ConfigurationError, match="begins with ~nobody-here, whose home is not known"
    ):
        normalise_url("sqlite:///~nobody-here/x.db")


def test_a_space_in_a_servers_url_is_written_as_in_any_url():
    assert normalise_url("postgresql+asyncpg://ann@h/my%20music").database == "my music"


@pytest.mark.parametrize(
    ("scheme", "driver"),
    [
        ("postgres", "asyncpg"),
        ("postgresql", "asyncpg"),
        ("postgresql+asyncpg", "asyncpg"),
        ("postgresql+psycopg", "psycopg"),
    ],
)
def test_a_server_may_be_named_in_each_of_its_ways(scheme, driver):
    url = normalise_url(f"{scheme}://ada@host:5433/music")

    assert (url.drivername, url.host, url.port, url.database) == (
        f"postgresql+{driver}",
        "host",
        5433,
        "music",
    )


@pytest.mark.parametrize(
    ("installed", "driver"), [({"psycopg"}, "psycopg"), ({"asyncpg", "psycopg"}, "asyncpg")]
)
def test_the_driver_that_is_installed_is_chosen(monkeypatch, installed, driver):
    monkeypatch.setattr(urls, "find_spec", lambda name: name if name in installed else None)

    assert normalise_url("postgresql://host/music").get_driver_name() == driver


@pytest.mark.parametrize(
    ("scheme", "package"), [("postgresql", "asyncpg or psycopg"), ("postgresql+psycopg", "psycopg")]
)
def test_a_driver_that_is_not_installed_is_one_sentence_with_the_remedy(
    monkeypatch, scheme, package
):
    monkeypatch.setattr(urls, "find_spec", lambda name: None)

    with pytest.raises(ConfigurationError) as caught:
        normalise_url(f"{scheme}://host/music")

    remedy = "run pip install '.[postgres]' in a checkout of dgx-music"
    assert (
        str(caught.value)
        == f"{SETTING} needs the package {package}, which is not installed; {remedy}."
    )


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "mysql://u:secret@h/d",
            "names the database kind 'mysql', which is not supported; use sqlite:///",
        ),
        ("generations.db", "is not a database URL; use something like sqlite:///data/"),
        ("", "is not a database URL"),
        ("sqlite://generations.db", "names a host, which a SQLite file has not; write sqlite:///"),
        ("postgresql://u:secret@h:port/d", "is not a database URL"),
        ("postgresql://u:secret@h", "names no database; write its name behind the host"),
        ("postgresql://u:secret@h/", "names no database"),
        ("postgresql://u:secret@one,two/", "names no database"),
        (
            "postgresql+psycopg2://u:secret@h/d",
            "names the driver 'psycopg2'; use postgresql+asyncpg or ",
        ),
        ("postgresql+pg8000://u:secret@h/d", "names the driver 'pg8000'"),
        (
            "postgresql://u:secret@h/d?sslmod=require",
            "has the unknown option 'sslmod'; use application_name, ",
        ),
        ("postgresql://u@h/d?password=secret", "has the unknown option 'password'"),
        (
            "postgresql://u@h/d?connect_timeout=soon",
            "has a connect_timeout that is none; use whole seconds",
        ),
        (
            "postgresql://u:secret@h/d?sslmode=bogus",
            "has an sslmode that is none; use disable, allow, prefer, ",
        ),
        (
            "postgresql://u@h/d?target_session_attrs=rw",
            "has a target_session_attrs that is none; use any, primary, ",
        ),
        (
            "postgresql://u:secret@h:99999/d",
            "has a port that is none; use a number from 1 to 65535",
        ),
        ("postgresql://u:secret@one:5432,two:99999/d", "has a port that is none"),
        ("postgresql://u@h:0/d", "has a port that is none"),
        ("postgresql://u@/d?host=h&port=soon", "has a port that is none"),
        (
            "postgresql://u@/d?host=one,two,three&port=1,2",
            "has 2 ports for its 3 hosts; name one for each, or one",
        ),
        ("postgresql://u@/d?host=one&host=two", "has the option 'host' twice; "),
        (
            "postgres://u:secret@secret@h/d",
            "has an @ in its password or in a name; write it as %40.",
        ),
        ("postgresql+psycopg://u:a/secret@secret@one,two/d", "has an @ in its password"),
        ("postgresql://u:a?b@secret@h/d", "has an @ in its password"),
        ("postgresql://u:a@b/d?secret@h/d", "has an @ in its password"),
        (
            "postgresql://u@h/d?pgbouncer=maybe",
            "has a pgbouncer that is neither true nor false; use pgbouncer=true",
        ),
        ("postgresql://u@h/d?options=-c%20jit%3Don", "has the unknown option 'options'"),
    ],
)
def test_another_url_is_refused_in_one_sentence_without_its_password(url, sentence):
    with pytest.raises(ConfigurationError) as caught:
        normalise_url(url)

    assert str(caught.value).startswith(f"{SETTING} {sentence}")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("hosts", "host", "port"),
    [
        ("one:5433,two:5434", "one,two", "5433,5434"),
        ("one,two", "one,two", "5432,5432"),
        ("one,two:5434", "one,two", "5432,5434"),
        ("[::1]:5433,[::2]", "[::1],[::2]", "5433,5432"),
    ],
)
def test_several_hosts_are_what_libpq_reads(hosts, host, port):
    url = normalise_url(f"postgresql://ada:secret@{hosts}/music?target_session_attrs=read-write")

    assert (url.query["host"], url.query["port"], url.host) == (host, port, None)
    assert (url.username, url.password, url.database) == ("ada", "secret", "music")


@pytest.mark.parametrize(
    ("said", "is_pooled"),
    [("true", True), ("1", True), ("on", True), ("false", False), ("0", False)],
)
def test_a_pooler_is_said_to_us_and_not_to_the_server(said, is_pooled):
    url = normalise_url(f"postgresql://host/music?pgbouncer={said}&sslmode=disable")

    assert is_pooled_by_transaction(url) is is_pooled
    assert server_address(url) == "postgresql://host/music?sslmode=disable"
    assert not is_pooled_by_transaction(normalise_url("postgresql://host/music"))


# the same against a server


@pytest.fixture(scope="module")
def server():
    """A server of this module alone: the user ada needs a password, all others none."""
    server = OwnServer.start()
    server.create_database("music")
    server.execute("CREATE USER ada")
    rules = server.folder / "data" / "pg_hba.conf"
    rules.write_text("host all ada 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    server.execute("SELECT pg_reload_conf()")
    yield server
    server.close()


async def ask(url, question="SELECT 1", **limits):
    """Return the server's answer, by way of a session of ours."""
    database = Database(url, limits=Limits(**limits))
    try:
        async with database.session() as session:
            return await session.scalar(text(question))
    finally:
        await database.dispose()


def quoted(password):
    """Return the password as it may always be written in a URL."""
    return "".join(f"%{byte:02X}" for byte in password.encode())


@pytest.mark.parametrize("driver", POSTGRES)
@pytest.mark.parametrize(
    "password",
    ["p@ss", "a/b:c", "50%", "%40", "pass word", "a+b", "naïve♫", "a,b", "a?b#c=d&e", "[x]"],
)
async def test_a_password_of_any_characters_reaches_the_server_and_nobody_else(
    server, driver, password
):
    server.execute(sql.SQL("ALTER USER ada PASSWORD {}").format(password))
    url = f"postgresql+{driver}://ada:{quoted(password)}@127.0.0.1:{server.port}/music"

    assert await ask(url, "SELECT current_user") == "ada"
    assert str(Database(url)) == f"postgresql://ada:***@127.0.0.1:{server.port}/music"


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_wrong_password_is_one_sentence_that_does_not_show_it(server, driver):
    with pytest.raises(DatabaseUnavailableError) as caught:
        await ask(f"postgresql+{driver}://ada:secret@127.0.0.1:{server.port}/music")

    assert "password authentication failed" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("driver", POSTGRES)
@pytest.mark.parametrize(
    "options", ["sslmode=prefer", "sslmode=disable", "sslmode=allow", "connect_timeout=3"]
)
async def test_libpqs_own_options_mean_the_same_with_each_driver(server, driver, options):
    assert await ask(f"postgresql+{driver}://postgres@127.0.0.1:{server.port}/music?{options}") == 1


@pytest.mark.parametrize("driver", POSTGRES)
async def test_the_url_may_say_how_long_a_connection_is_waited_for(server, driver):
    with Proxy(server.url("music")) as proxy:
        proxy.black_hole()
        url = proxy.url(
            f"postgresql+{driver}://postgres@127.0.0.1:{server.port}/music?connect_timeout=1"
        )
        with pytest.raises(DatabaseUnavailableError, match="no connection in 1 s"):
            await ask(url, connect_seconds=60)


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_server_without_tls_is_refused_where_it_is_required(server, driver):
    with pytest.raises(DatabaseUnavailableError, match=r"(?i)SSL"):
        await ask(f"postgresql+{driver}://postgres@127.0.0.1:{server.port}/music?sslmode=require")


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_server_is_reached_by_its_socket(server, driver):
    url = f"postgresql+{driver}://postgres@/music?host={server.folder}&port={server.port}"

    assert await ask(url, "SELECT inet_server_addr() IS NULL") is True


@pytest.mark.parametrize("driver", POSTGRES)
async def test_of_several_hosts_one_that_is_dead_is_passed_over(server, driver):
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        hosts = f"127.0.0.1:{dead.getsockname()[1]},127.0.0.1:{server.port}"

        assert (
            await ask(
                f"postgresql+{driver}://postgres@{hosts}/music?target_session_attrs=read-write"
            )
            == 1
        )


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield f"127.0.0.1:{door.getsockname()[1]}"


@pytest.mark.parametrize("driver", POSTGRES)
@pytest.mark.parametrize("wanted", ["read-write", "prefer-standby"])
async def test_of_several_hosts_one_that_is_silent_is_passed_over_in_time(
    server, silent, driver, wanted
):
    hosts = f"{silent},127.0.0.1:{server.port}"

    with anyio.fail_after(PATIENCE):
        url = f"postgresql+{driver}://postgres@{hosts}/music?target_session_attrs={wanted}"
        assert await ask(url, connect_seconds=1) == 1


@pytest.mark.parametrize("driver", POSTGRES)
async def test_of_several_hosts_that_are_all_silent_each_has_its_time_and_no_more(silent, driver):
    with (
        anyio.fail_after(PATIENCE),
        pytest.raises(DatabaseUnavailableError, match=r"no connection in 1 s|timeout expired"),
    ):
        await ask(f"postgresql+{driver}://postgres@{silent},{silent}/music", connect_seconds=1)


@pytest.fixture
async def pooler():
    """The port of a pooler that refuses what it does not know at a start, as PgBouncer does."""

    async def refuse(reader, writer):
        (length,) = struct.unpack("!i", await reader.readexactly(4))
        parameter = b"options" if b"options\0" in await reader.readexactly(length - 4) else b"jit"
        error = b"SFATAL\0C08P01\0Munsupported startup parameter: " + parameter + b"\0\0"
        writer.write(b"E" + struct.pack("!i", len(error) + 4) + error)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as door:
        yield door.sockets[0].getsockname()[1]


@pytest.mark.parametrize(("driver", "parameter"), [("asyncpg", "jit"), ("psycopg", "options")])
async def test_a_pooler_that_was_not_said_to_be_one_is_told_how_to_be_said(
    pooler, driver, parameter
):
    remedy = rf"unsupported startup parameter: {parameter}; add \?pgbouncer=true to its URL\.$"
    with pytest.raises(DatabaseUnavailableError, match=remedy):
        await ask(f"postgresql+{driver}://postgres@127.0.0.1:{pooler}/music?sslmode=disable")


@pytest.mark.parametrize("driver", POSTGRES)
async def test_a_role_without_privileges_is_one_sentence(server, driver):
    server.execute("CREATE TABLE IF NOT EXISTS closed ()", database="music")
    server.execute("ALTER USER ada PASSWORD 'secret'")

    with pytest.raises(
        DatabaseUnavailableError, match=r"cannot be used: permission denied for table closed\.$"
    ):
        await ask(
            f"postgresql+{driver}://ada:secret@127.0.0.1:{server.port}/music",
            "SELECT 1 FROM closed",
        )


@pytest.fixture
async def ipv6_door():
    """A port at ``::1`` that hangs up at once, and the event that it sets for a connection."""
    came = asyncio.Event()

    def hang_up(_reader, writer):
        came.set()
        writer.close()

    try:
        door = await asyncio.start_server(hang_up, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    yield door.sockets[0].getsockname()[1], came
    door.close()


@pytest.mark.parametrize("driver", POSTGRES)
async def test_several_hosts_may_be_of_ipv6(ipv6_door, driver):
    port, came = ipv6_door
    with suppress(DatabaseUnavailableError):
        await ask(f"postgresql+{driver}://postgres@[::1]:{port},[::1]:{port}/music")

    assert came.is_set()


@pytest.mark.parametrize("driver", POSTGRES)
@pytest.mark.parametrize(
    ("option", "name"), [("", "dgx-music"), ("?application_name=juke%20box%2B", "juke box+")]
)
async def test_the_server_is_told_who_we_are(server, driver, option, name):
    url = f"postgresql+{driver}://postgres@127.0.0.1:{server.port}/music{option}"

    assert await ask(url, "SHOW application_name") == name


@pytest.mark.parametrize("driver", POSTGRES)
async def test_the_server_is_told_how_long_a_statement_may_take(server, driver):
    url = f"postgresql+{driver}://postgres@127.0.0.1:{server.port}/music"

    assert await ask(url, "SHOW statement_timeout", statement_seconds=1.5) == "1500ms"
    assert (
        await ask(f"{url}?pgbouncer=true", "SHOW statement_timeout", statement_seconds=1.5) == "0"
    )


@pytest.mark.parametrize("driver", POSTGRES)
@pytest.mark.parametrize("where", ["/nowhere", ":1/music"])
async def test_a_database_that_is_not_there_is_one_sentence(server, driver, where):
    place = where if where.startswith(":") else f":{server.port}{where}"
    with pytest.raises(
        DatabaseUnavailableError,
        match=f"^The database postgresql://127.0.0.1{place} cannot be used: ",
    ) as caught:
        await ask(f"postgresql+{driver}://127.0.0.1{place}")

    assert "\n" not in str(caught.value)
