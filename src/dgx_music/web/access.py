"""Who asks, and what they may do: by our own tokens, or as the application around us says."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.requests import Request

from dgx_music.client.room import limit_queue
from dgx_music.client.tokens import check_role
from dgx_music.roles import Role
from dgx_music.storage.tokens import Holder
from dgx_music.web.guard import check_same_site
from dgx_music.web.problems import FORBIDDEN, NO_TOKEN, TOO_FAST, ProblemError
from dgx_music.web.site import Site

_DESCRIPTION = "A token of `dgx-music token create`; the header `xi-api-key` takes it too."


@dataclass(frozen=True)
class Access:
    """What somebody may do; with a ``tenant``, with the generations of this tenant only."""

    role: Role | str
    tenant: str | None = None

    def __post_init__(self) -> None:
        check_role(self.role)

    def may(self, role: Role) -> bool:
        """Return True if this role is included."""
        return Role(self.role).includes(role)

    @property
    def is_operator(self) -> bool:
        """True if this may see and do everything."""
        return self.tenant is None and self.may(Role.OPERATE)


class TokenScheme(SecurityBase):
    """The dependency that finds out by our own tokens what a request may do."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.model = HTTPBearer(description=_DESCRIPTION)
        self.scheme_name = "token"

    async def __call__(self, request: Request) -> None:
        """Put site and access into the request's state; raises ``ProblemError``."""
        _enter(request, self._site, await self._find(request))

    async def _find(self, request: Request) -> Access:
        site = self._site
        if site.options.is_open and not await site.tokens.has_any():
            return Access(Role.OPERATE)
        holder = await self._find_holder(request)
        _check_rate(site, holder.name)
        return Access(holder.role, holder.tenant)

    async def _find_holder(self, request: Request) -> Holder:
        tokens, secret = self._site.tokens, _secret_of(request)
        if secret:
            holder = await tokens.find_holder(secret)
            problem = "The token is not valid: it is unknown, expired or revoked."
        elif login := login_of(request):
            holder = await tokens.find_visitor(login)
            problem = "The log-in has ended; log in again."
        else:
            holder = None
            problem = "A token is needed; send one as `Authorization: Bearer dgx_…`."
        if holder is None:
            raise _no_token(problem)
        return holder


def identification(
    site: Site, authorize: Callable[..., Any] | None
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return the dependency that finds out who asks, before anything is done.

    What answers the request finds the site and the access in the request's state.
    """
    if authorize is None:
        return TokenScheme(site)

    async def identify(
        request: Request,
        access: Access = Depends(authorize),  # noqa: B008 - no annotation can name it
    ) -> None:
        _enter(request, site, access)

    return identify


def entrance(site: Site) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return the dependency of what everybody may ask for: it finds the site only."""

    async def enter(request: Request) -> None:
        check_same_site(request)
        request.state.music_site = site

    return enter


def _enter(request: Request, site: Site, access: Access) -> None:
    check_same_site(request)
    limit_queue(site.queue_limits)
    request.state.music_site = site
    request.state.music_access = access


def access_of(request: Request, role: Role) -> Access:
    """Return what whoever asks may do; raises ``ProblemError`` if this role is not included."""
    access = cast("Access", request.state.music_access)
    if not access.may(role):
        detail = f"This needs the role {role}, and the token has {access.role}."
        raise ProblemError(FORBIDDEN, detail)
    return access


def _needing(role: Role) -> Callable[[Request], Coroutine[Any, Any, Access]]:
    async def find(request: Request) -> Access:
        return access_of(request, role)

    return find


def check_sees_all(access: Access) -> None:
    """Raise ``ProblemError`` for a tenant's token: the answer would tell of other tenants."""
    if access.tenant is not None:
        raise ProblemError(FORBIDDEN, "This needs a token that is not for one tenant only.")


def check_tenant(access: Access, tenant: object) -> None:
    """Raise ``ProblemError`` if this is another tenant than the token's."""
    if access.tenant is not None and tenant != access.tenant:
        detail = f"The token is for the tenant {access.tenant!r} only; leave tenant out."
        raise ProblemError(FORBIDDEN, detail, field="tenant")


def cookie_of(request: Request) -> str:
    """Return the name of the page's cookie; over https no other site of the domain can set it."""
    return "__Host-dgx-music" if request.url.scheme == "https" else "dgx-music"


def login_of(request: Request) -> str | None:
    """Return the secret of the browser's log-in, if it has one; it may have ended."""
    return request.cookies.get(cookie_of(request))


def _secret_of(request: Request) -> str | None:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret:
        return secret.strip()
    return request.headers.get("xi-api-key")


def _check_rate(site: Site, name: str) -> None:
    seconds = site.rates.take(name)
    if seconds:
        detail = f"The token {name!r} makes too many requests; wait a moment."
        headers = {"Retry-After": str(math.ceil(seconds))}
        raise ProblemError(TOO_FAST, detail, headers=headers)


def _no_token(detail: str) -> ProblemError:
    return ProblemError(NO_TOKEN, detail, headers={"WWW-Authenticate": "Bearer"})


MayRead = Annotated[Access, Depends(_needing(Role.READ))]
MayEnqueue = Annotated[Access, Depends(_needing(Role.ENQUEUE))]
MayOperate = Annotated[Access, Depends(_needing(Role.OPERATE))]
