"""Who asks, and what they may do: by our own tokens, or as the application around us says."""

from __future__ import annotations

import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import Request

from dgx_music.client.tokens import check_role
from dgx_music.roles import Role
from dgx_music.web.guard import check_same_site
from dgx_music.web.problems import FORBIDDEN, NO_TOKEN, TOO_FAST, ProblemError
from dgx_music.web.site import Site, site_of

_HOW = "send one as `Authorization: Bearer dgx_…`"
_BEARER = HTTPBearer(auto_error=False, description="A token of `dgx-music token create`.")
_API_KEY = APIKeyHeader(name="xi-api-key", auto_error=False, description="The same token.")


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


async def by_token(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)],
    api_key: Annotated[str | None, Security(_API_KEY)],
) -> Access:
    """Return what the request's token allows; raises ``ProblemError``."""
    site = site_of(request)
    if site.options.is_open and not await site.tokens.has_any():
        return Access(Role.OPERATE)
    secret = bearer.credentials if bearer is not None else api_key
    if not secret:
        raise _no_token(f"A token is needed; {_HOW}.")
    holder = await site.tokens.find_holder(secret)
    if holder is None:
        raise _no_token("The token is not valid: it is unknown, expired or revoked.")
    _check_rate(site, holder.name)
    return Access(holder.role, holder.tenant)


def identification(
    authorize: Callable[..., Any] = by_token,
) -> Callable[..., Coroutine[Any, Any, None]]:
    """Return the dependency that finds out who asks, before anything is done."""

    async def identify(
        request: Request,
        access: Access = Depends(authorize),  # noqa: B008 - an annotation cannot name it
    ) -> None:
        check_same_site(request)
        request.state.music_access = access

    return identify


def _needing(role: Role) -> Callable[[Request], Access]:
    def find(request: Request) -> Access:
        access = cast("Access", request.state.music_access)
        if not access.may(role):
            detail = f"This needs the role {role}, and the token has {access.role}."
            raise ProblemError(FORBIDDEN, detail)
        return access

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
