"""The page's log-in and log-out, and the files that it loads: what needs no token."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dgx_music.client.logins import LASTS_SECONDS, log_in, log_out
from dgx_music.web.access import cookie_of, login_of
from dgx_music.web.problems import NOT_FOUND, TOO_FAST, ProblemError
from dgx_music.web.shell import FILES, VERSION, PageRoute, login_page, read_form, root_of
from dgx_music.web.site import Site, site_of

router = APIRouter(route_class=PageRoute, include_in_schema=False)

_OF_FILES = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Content-Encoding": "gzip",  # every browser takes it
}


@router.get("/page/{version}/{name}")
async def get_file(version: str, name: str) -> Response:
    """Send a script or the style sheet."""
    if name not in FILES or version != VERSION:
        raise ProblemError(NOT_FOUND, "There is no such file; load the page again.")
    content, media_type = FILES[name]
    return Response(content, headers=_OF_FILES, media_type=media_type)


@router.post("/login")
async def post_login(request: Request) -> Response:
    """Take a token, and give the browser a cookie that stands for it."""
    _check_rate(site_of(request), "" if request.client is None else request.client.host)
    token = (await read_form(request)).get("token", "")
    secret = await log_in(token.strip())
    if secret is None:
        reason = "The token is not valid: it is unknown, expired or revoked."
        return login_page(request, reason, 401)
    answer = _to_page(request)
    answer.set_cookie(cookie_of(request), secret, max_age=LASTS_SECONDS, **_kind_of(request))
    return answer


@router.post("/logout")
async def post_logout(request: Request) -> Response:
    """End the log-in, here and in the database."""
    if (secret := login_of(request)) is not None:
        await log_out(secret)
        site_of(request).tokens.forget_visitor(secret)
    answer = _to_page(request)
    answer.delete_cookie(cookie_of(request), **_kind_of(request))
    return answer


def _to_page(request: Request) -> Response:
    return RedirectResponse(f"{root_of(request)}/", 303)


def _kind_of(request: Request) -> dict[str, Any]:
    """Return what hides the cookie from scripts and from the pages of other sites."""
    return {"secure": request.url.scheme == "https", "httponly": True, "samesite": "strict"}


def _check_rate(site: Site, address: str) -> None:
    seconds = site.login_rates.take(address)
    if seconds:
        headers = {"Retry-After": str(math.ceil(seconds))}
        raise ProblemError(TOO_FAST, "Too many log-ins were tried; wait a moment.", headers=headers)
