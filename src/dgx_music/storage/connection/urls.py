"""The URLs of databases that a user may write, and what they mean."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from dgx_music.config import at_home
from dgx_music.errors import ConfigurationError, how_to_install

POSTGRES_OPTIONS = (
    "application_name",
    "connect_timeout",
    "host",
    "pgbouncer",
    "port",
    "sslcert",
    "sslkey",
    "sslmode",
    "sslrootcert",
    "target_session_attrs",
)
"""The options after the ``?``: libpq's, and ``pgbouncer=true`` for a pooler in transaction mode."""

_SETTING = "DGX_MUSIC_DATABASE_URL"
_POSTGRES_DRIVERS = ("asyncpg", "psycopg")
_WORDS = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "target_session_attrs": (
        "any",
        "primary",
        "standby",
        "prefer-standby",
        "read-write",
        "read-only",
    ),
}
_ARTICLES = {"sslmode": "an", "target_session_attrs": "a"}
_HIGHEST_PORT = 65_535
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
_LONGEST_NAME_BYTES = 240
"""Below the file system's 255, since SQLite adds to the name for its other files."""


def normalise_url(url: str) -> URL:
    """Return the URL with the driver this library uses.

    A user writes ``sqlite:///file.db``, ``postgres://…`` or ``postgresql://…``. A server's URL may
    name ``+asyncpg`` or ``+psycopg``, several hosts (``//one:5432,two:5432/name``), a socket's
    folder (``?host=/run/postgresql``) and ``POSTGRES_OPTIONS``, and has every ``%20`` decoded.
    After ``sqlite:///`` comes a plain path: ``%20`` is not a space, and only a ``~`` at the start
    means the home. Raises ``ConfigurationError``, whose message never quotes a password.
    """
    url = url.strip()
    parsed = _parse(url)
    kind, _, driver = parsed.drivername.partition("+")
    if kind == "sqlite" and driver in ("", "aiosqlite"):
        path = at_home(_SETTING, url.partition("://")[2].removeprefix("/")) or None
        _check_file(parsed, path or "", has_options="?" in url)
        return parsed.set(drivername="sqlite+aiosqlite", database=path)
    if kind in ("postgres", "postgresql"):
        _check_server(parsed)
        return parsed.set(drivername=f"postgresql+{_choose_driver(driver)}")
    raise _refusal(
        f"names the database kind {parsed.drivername!r}, which is not supported",
        "use sqlite:///path/to/file.db or postgresql://user@host/name",
    )


def server_address(url: URL) -> str:
    """Return the URL for PostgreSQL's own libraries, password included, without our own options.

    libpq needs ``%20`` for a space; SQLAlchemy writes a space, and ``+`` after the ``?``. An IPv6
    address among several hosts has brackets for asyncpg, and none for libpq.
    """
    ours = ["connect_timeout", "pgbouncer"]
    plain = url.set(drivername="postgresql").difference_update_query(ours)
    if url.get_driver_name() == "psycopg" and "host" in url.query:
        names = ",".join(url.normalized_query["host"]).split(",")
        hosts = ",".join(name[1:-1] if name.startswith("[") else name for name in names)
        plain = plain.update_query_dict({"host": hosts})
    place, mark, options = plain.render_as_string(hide_password=False).partition("?")
    return place.replace(" ", "%20") + mark + options.replace("+", "%20")


def connect_timeout(url: URL) -> float | None:
    """Return the URL's limit on connecting, in seconds; ``None`` if it has none."""
    said = url.query.get("connect_timeout")
    return None if said is None else float(str(said))


def is_pooled_by_transaction(url: URL) -> bool:
    """Return True if a pooler may give each transaction another session (``?pgbouncer=true``)."""
    return str(url.query.get("pgbouncer", "")).lower() in _YES


def _parse(url: str) -> URL:
    scheme, separator, rest = url.partition("://")
    hosts: dict[str, str] = {}
    # A password with an @ would be split there, and half of it shown.
    if scheme.startswith("postgres") and rest.count("@") > 1:
        raise _refusal("has an @ in its password or in a name", "write it as %40")
    if scheme.startswith("postgres") and "," in rest.partition("/")[0].rpartition("@")[2]:
        rest, hosts = _take_hosts(rest)
    try:
        return make_url(f"{scheme}{separator}{rest}").update_query_dict(hosts)
    except (ArgumentError, ValueError):  # a ValueError may quote a part of the password
        remedy = "use something like sqlite:///data/generations.db"
        raise _refusal("is not a database URL", remedy) from None


def _take_hosts(rest: str) -> tuple[str, dict[str, str]]:
    """Move several hosts to the query, where every driver reads them; SQLAlchemy reads one."""
    network, slash, path = rest.partition("/")
    user, at, hosts = network.rpartition("@")
    pairs = [
        host.rpartition(":") if not host.endswith("]") else (host, "", "")
        for host in hosts.split(",")
    ]
    names = [unquote(name or port) for name, _, port in pairs]
    ports = [port if name else "5432" for name, _, port in pairs]
    query = {"host": ",".join(names), "port": ",".join(port or "5432" for port in ports)}
    return f"{user}{at}{slash}{path}", query


def _check_file(url: URL, path: str, *, has_options: bool) -> None:
    if url.host is not None:
        raise _refusal(
            "names a host, which a SQLite file has not", "write sqlite:/// with three slashes"
        )
    if has_options:
        raise _refusal("has options behind a ?", "leave them out; none is needed")
    is_short = all(len(part.encode()) <= _LONGEST_NAME_BYTES for part in path.split("/"))
    if not (is_short and path.isprintable()):
        remedy = f"use printable names of at most {_LONGEST_NAME_BYTES} bytes"
        raise _refusal("names a file that cannot be", remedy)


def _check_server(url: URL) -> None:
    if not url.database:
        remedy = "write its name behind the host, as in postgresql://user@host/name"
        raise _refusal("names no database", remedy)
    unknown = sorted(set(url.query) - set(POSTGRES_OPTIONS))
    if unknown:
        raise _refusal(
            f"has the unknown option {unknown[0]!r}", f"use {', '.join(POSTGRES_OPTIONS)}"
        )
    if not re.fullmatch(r"[1-9]\d{0,3}", str(url.query.get("connect_timeout", 1))):
        raise _refusal("has a connect_timeout that is none", "use whole seconds, from 1 to 9999")
    for name, value in url.query.items():
        if not isinstance(value, str):
            remedy = "write it once; several hosts have commas between them"
            raise _refusal(f"has the option {name!r} twice", remedy)
        if value not in _WORDS.get(name, (value,)):
            raise _refusal(
                f"has {_ARTICLES[name]} {name} that is none", f"use {', '.join(_WORDS[name])}"
            )
    _check_ports(url)
    if str(url.query.get("pgbouncer", "true")).lower() not in _YES + _NO:
        problem = "has a pgbouncer that is neither true nor false"
        raise _refusal(problem, "use pgbouncer=true behind such a pooler")


def _check_ports(url: URL) -> None:
    ports = str(url.query.get("port", "")).split(",")
    given = [port for port in ports if port] + ([] if url.port is None else [str(url.port)])
    if not all(_is_port(port) for port in given):
        raise _refusal("has a port that is none", f"use a number from 1 to {_HIGHEST_PORT}")
    hosts = str(url.query.get("host", "")).split(",")
    if len(ports) not in (1, len(hosts)):
        problem = f"has {len(ports)} ports for its {len(hosts)} hosts"
        raise _refusal(problem, "name one for each, or one for all of them")


def _is_port(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9]{1,5}", text)) and 0 < int(text) <= _HIGHEST_PORT


def _choose_driver(wanted: str) -> str:
    """Return the wanted driver, or an installed one."""
    if wanted and wanted not in _POSTGRES_DRIVERS:
        remedy = "use postgresql+asyncpg or postgresql+psycopg, or name none"
        raise _refusal(f"names the driver {wanted!r}", remedy)
    for driver in (wanted,) if wanted else _POSTGRES_DRIVERS:
        if find_spec(driver) is not None:
            return driver
    raise _refusal(
        f"needs the package {wanted or 'asyncpg or psycopg'}, which is not installed",
        how_to_install("postgres"),
    )


def shown(url: URL) -> str:
    """Return the URL as a user may see it."""
    if url.get_backend_name() == "sqlite":
        # SQLAlchemy would escape some characters of the path.
        return f"sqlite:///{url.database or ''}"
    return url.set(drivername=url.get_backend_name()).render_as_string(hide_password=True)


def _refusal(problem: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(_SETTING, problem, remedy)


def file_of(url: URL) -> Path | None:
    """Return the file of a SQLite database; ``None`` if there is none."""
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    return Path(str(url.database)) if is_file else None
