"""``dgx-music web``: the page and the API over HTTP."""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec
from typing import Annotated

import typer

from dgx_music.cli import EXIT_CODES
from dgx_music.cli.daemons import run_daemon
from dgx_music.cli.options import DatabaseUrl, Output, given
from dgx_music.config import PREFIX, Settings, load_settings
from dgx_music.errors import ConfigurationError, how_to_install
from dgx_music.validation import check_between, check_integer

app = typer.Typer(add_completion=False)

_PACKAGES = ("fastapi", "uvicorn", "jinja2", "python_multipart")
_MOST_REQUESTS = 1e6
_LARGEST_UPLOAD_MB = 100


@app.command(epilog=EXIT_CODES)
def web(
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0: any free one.")] = 8321,
    with_worker: Annotated[
        bool, typer.Option("--with-worker", help="Run a worker too, in a process of its own.")
    ] = False,
    allowed_hosts: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Names, besides this machine's own, by which clients call the server; separated by commas.",
        ),
    ] = "",
    trusted_proxies: Annotated[
        str,
        typer.Option(
            metavar="ADDRESSES",
            help="Proxies whose X-Forwarded headers are believed; separated by commas.",
        ),
    ] = "",
    requests_per_second: Annotated[
        float, typer.Option(help="How many requests each token may make; 0: any number.")
    ] = 20.0,
    most_streams: Annotated[
        int, typer.Option(help="How many streams of events may be open at a time.")
    ] = 2_000,
    max_upload_mb: Annotated[
        float, typer.Option(help="The largest upload, in millions of bytes; at most 100.")
    ] = 100.0,
    database_url: DatabaseUrl = None,
    output: Output = None,
) -> None:
    """Serve the page and the API over HTTP, for people and programs.

    On an address that others can reach it needs a token: make one with `dgx-music token
    create`; without one it ends with exit code 2. On this machine's own address everybody
    may use it until the first token is made.

    SIGTERM or Ctrl-C ends it with exit code 0: requests that run get 10 s to finish, and the
    worker beside it lets its generations finish within their grace.
    """
    check_integer("--port", port, 0, 65_535)
    check_between("--requests-per-second", requests_per_second, 0, _MOST_REQUESTS)
    check_integer("--most-streams", most_streams, 1, 1_000_000)
    check_between("--max-upload-mb", max_upload_mb, 0.001, _LARGEST_UPLOAD_MB)
    overrides = given(database_url=database_url, output=output)
    settings = load_settings(**overrides)
    _check_packages()
    from dgx_music.cli.output import tell
    from dgx_music.logs import configure_logging
    from dgx_music.web.options import WebOptions
    from dgx_music.web.server import Listening, serve

    configure_logging("warning")
    listening = Listening(host=host.strip(), port=port, trusted_proxies=trusted_proxies.strip())
    options = WebOptions(
        allowed_hosts=frozenset(_names(allowed_hosts)),
        requests_per_second=requests_per_second,
        most_streams=most_streams,
        upload_bytes=int(max_upload_mb * 1e6),
    )
    variables = _variables(settings, overrides) if with_worker else None
    run_daemon(serve(settings, listening, options, tell=tell, worker_variables=variables))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _variables(settings: Settings, overrides: Collection[str]) -> dict[str, str]:
    """Return the variables by which the worker uses the same database and the same output.

    As variables, since every user of the machine can read a process's arguments.
    """
    variables = {f"{PREFIX}{name.upper()}": str(getattr(settings, name)) for name in overrides}
    if "database_url" in overrides:
        variables[f"{PREFIX}REPLICA_URL"] = ""  # the environment's is of another database
    return variables


def _check_packages() -> None:
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        problem = f"needs {', '.join(missing)}, which is not installed"
        raise ConfigurationError("dgx-music web", problem, how_to_install("web"))
