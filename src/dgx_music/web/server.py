"""The web server as a process: its socket, its signals, and the worker beside it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

import anyio
import uvicorn

from dgx_music.client import tokens
from dgx_music.config import Settings
from dgx_music.early import stopping_signals
from dgx_music.errors import ConfigurationError
from dgx_music.garbage import spare_collections
from dgx_music.storage import close_db, init_db
from dgx_music.web.app import create_app
from dgx_music.web.child import WorkerProcess
from dgx_music.web.guard import is_loopback
from dgx_music.web.options import WebOptions
from dgx_music.web.site import Site
from dgx_music.web.stops import Stops

GRACE_SECONDS = 10
"""How long requests that run get to finish at a stop."""
_ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 - these are compared, not listened to


@dataclass(frozen=True, kw_only=True)
class Listening:
    """The address of the server, and the proxies that it trusts."""

    host: str = "127.0.0.1"
    port: int = 8321
    trusted_proxies: str = ""
    """Addresses, separated by commas, whose ``X-Forwarded-…`` headers count."""


async def serve(
    settings: Settings,
    listening: Listening,
    options: WebOptions,
    *,
    tell: Callable[[str], None],
    worker_variables: Mapping[str, str] | None = None,
) -> None:
    """Serve until a signal; with ``worker_variables`` a worker runs beside the server.

    Raises ``ConfigurationError`` if the address cannot be used, or if it is not loopback and there
    is no token.
    """
    options = await _prepare(settings, listening, options)
    try:
        with listen(listening) as listener:
            site = Site(settings, options)
            server = _Server(_config(settings, listening, site), site.stops)
            async with _beside(worker_variables, settings, tell) as worker:
                spare_collections()
                tell(_greeting(listener, options))
                await _serve_until_signal(server, listener, worker)
    finally:
        await close_db()


async def _prepare(settings: Settings, listening: Listening, options: WebOptions) -> WebOptions:
    """Open the database and return the options for this address."""
    hosts = set(options.allowed_hosts)
    if listening.host not in _ANY_ADDRESS:
        hosts.add(listening.host)
    is_local = all(is_loopback(host) for host in (listening.host, *hosts))
    await init_db(settings.database_url)
    if not is_local and not await tokens.has_tokens(valid_only=True):
        await close_db()
        remedy = "make one with `dgx-music token create NAME --role operate`"
        problem = f"is {listening.host}, which others can reach, and there is no valid token"
        if is_loopback(listening.host):
            problem = "is loopback, --allowed-hosts names others, and there is no valid token"
        raise ConfigurationError("--host", problem, remedy)
    return replace(options, is_open=is_local, allowed_hosts=frozenset(hosts))


@contextmanager
def listen(listening: Listening) -> Iterator[socket.socket]:
    """Give the socket that listens there; raises ``ConfigurationError``."""
    try:
        (family, *_, address), *_ = socket.getaddrinfo(
            listening.host or None,
            listening.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        listener = socket.create_server(address[:2], family=family, backlog=2_048)
    except (OSError, OverflowError) as error:
        problem = f"cannot be listened to at {listening.host}:{listening.port} ({error})"
        raise ConfigurationError("--port", problem, "choose another address") from error
    with listener:
        # Else the body of an answer waits 40 ms for the client's receipt of its head: asyncio sets
        # this only for sockets that name their protocol. Connections inherit it.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listener


def _config(settings: Settings, listening: Listening, site: Site) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(settings, site.options, site=site),
        log_config=None,
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=bool(listening.trusted_proxies),
        forwarded_allow_ips=listening.trusted_proxies or None,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


class _Server(uvicorn.Server):
    """A server whose signals are ours, and which ends what waits before it waits itself."""

    def __init__(self, config: uvicorn.Config, stops: Stops) -> None:
        super().__init__(config)
        self._stops = stops

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone: uvicorn would end the process with the same one again."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End all waits, then the connections."""
        self._stops.stop()
        await super().shutdown(sockets)


@asynccontextmanager
async def _beside(
    variables: Mapping[str, str] | None, settings: Settings, tell: Callable[[str], None]
) -> AsyncIterator[WorkerProcess | None]:
    """Run a worker, if there are variables for one; say so if it ends before us."""
    if variables is None:
        yield None
        return
    worker = WorkerProcess(variables, settings.grace_seconds)
    await worker.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_tell_of_end, worker, tell)
        try:
            yield worker
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await worker.stop()


async def _tell_of_end(worker: WorkerProcess, tell: Callable[[str], None]) -> None:
    code = await worker.wait()
    how = f"with exit code {code}" if code >= 0 else f"by signal {-code}"
    tell(f"The worker has ended {how}, so nothing is made; start one with: dgx-music worker")


async def _serve_until_signal(
    server: _Server, listener: socket.socket, worker: WorkerProcess | None
) -> None:
    with anyio.open_signal_receiver(*stopping_signals()) as signals:
        serving = asyncio.create_task(server.serve([listener]))
        async with anyio.create_task_group() as tasks:

            async def stop_on_signals() -> None:
                async for _ in signals:
                    server.force_exit = server.should_exit  # a second one waits for nothing
                    server.should_exit = True
                    if worker is not None:
                        worker.request_stop()

            tasks.start_soon(stop_on_signals)
            await serving
            tasks.cancel_scope.cancel()


def _greeting(listener: socket.socket, options: WebOptions) -> str:
    host, port = listener.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    who = "; while there is no token, everybody on this machine may use it"
    return (
        f"Serving the page at {where}/ and the API at {where}/v1{who if options.is_open else ''}."
    )
