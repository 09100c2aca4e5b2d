"""What protects the API from browsers that are misled by other sites, and browsers from us."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgx_music.web.problems import CROSS_SITE, WRONG_HOST, ProblemError

POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:"),
        *("media-src 'self'", "connect-src 'self'", "form-action 'self'", "base-uri 'none'"),
        *("frame-ancestors 'none'", "require-trusted-types-for 'script'"),
    )
)
SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
}
"""On each answer that does not say otherwise."""
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
_SENT_BY_BROWSERS = ("basic", "digest", "negotiate", "ntlm")
"""The schemes of ``Authorization`` that browsers also send for the pages of other sites."""

_SAFE = ("GET", "HEAD", "OPTIONS")
_PROBES = ("/healthz", "/readyz")
"""Probes of an orchestrator ask by an address that nobody knows before; these tell nothing."""


class Guard:
    """Answers only requests to a known ``Host``, and adds ``SECURITY_HEADERS`` to each answer.

    A page of another site can have its own name lead to this machine (DNS rebinding): then its
    scripts may read our answers, but its ``Host`` is still its own.
    """

    def __init__(self, app: ASGIApp, allowed_hosts: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                secure(message["headers"])
            await send(message)

        app = self._app if self._is_known(scope) else _wrong_host
        await app(scope, receive, send_secured)

    def _is_known(self, scope: Scope) -> bool:
        if scope["path"] in _PROBES:
            return True
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            return False
        host = host_of(hosts[0].decode("latin-1"))
        return is_loopback(host) or host in self._allowed


def secure(headers: list[tuple[bytes, bytes]]) -> None:
    """Add the headers that each answer has, unless they are there."""
    known = {name for name, _ in headers}
    headers += [header for header in _RAW_HEADERS if header[0] not in known]


def check_same_site(request: Request) -> None:
    """Raise ``ProblemError`` if the page of another site has a browser send a change.

    Any site can have a browser post to this machine, and cookies and open servers need no token.
    All browsers send ``Sec-Fetch-Site`` or ``Origin`` with such a request; what sends neither is
    no browser. A token in a header proves that the sender knows it.
    """
    headers = request.headers
    if request.method in _SAFE or _has_token(headers):
        return
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        is_ours = site in ("same-origin", "none")
    else:
        is_ours = origin is None or _place_of(origin) == headers.get("host", "").lower()
    if not is_ours:
        raise ProblemError(CROSS_SITE, "The page of another site sent this; nothing is changed.")


def _has_token(headers: Headers) -> bool:
    """Return True if the sender knows a token; a browser adds what it asked a person for by itself."""
    scheme = headers.get("authorization", "").partition(" ")[0].lower()
    return "xi-api-key" in headers or scheme not in ("", *_SENT_BY_BROWSERS)


def _place_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:  # a bracket that is not closed
        return None


@lru_cache(maxsize=64)
def host_of(header: str) -> str:
    """Return the name or the address in a ``Host`` header, without its port."""
    try:
        return "" if "@" in header else urlsplit(f"//{header}").hostname or ""
    except ValueError:  # a bracket that is not closed
        return ""


@lru_cache(maxsize=64)
def is_loopback(host: str) -> bool:
    """Return True if only programs of this machine reach this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _wrong_host(scope: Scope, receive: Receive, send: Send) -> None:
    detail = "The request's Host is not one of this server; start it with --allowed-hosts."
    await ProblemError(WRONG_HOST, detail).response()(scope, receive, send)
