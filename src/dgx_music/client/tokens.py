"""The tokens of the web API: make, list, revoke, and find out who holds one."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dgx_music import validation
from dgx_music.errors import InvalidRequestError
from dgx_music.roles import Role
from dgx_music.storage import tokens
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import Token
from dgx_music.storage.tokens import Holder

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

MAX_DAYS = 3_650.0
_PREFIX = "dgx_"
"""Lets a scanner of repositories find a token that was committed by mistake."""
_BYTES = 32
_FORM = re.compile(r"dgx_[A-Za-z0-9_-]{43}")
_DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class NewToken:
    """A token that was just made, and its row; the token itself is stored nowhere."""

    secret: str
    token: Token


async def create_token(
    name: str, role: Role | str, *, tenant: str | None = None, days: float | None = None
) -> NewToken:
    """Make a token for the web API and return it, the only time that it can be read.

    With a ``tenant`` it sees and makes the generations of this tenant only. With ``days`` it is
    valid for so long. Raises ``InvalidRequestError``, also if the name was used before.
    """
    secret = _PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_BYTES)).decode().rstrip("=")
    lasts = None if days is None else validation.check_between("days", days, 0.001, MAX_DAYS)
    add = partial(
        tokens.add_token,
        name=validation.check_name("name", name),
        sha256=_hash(secret),
        role=check_role(role),
        tenant=None if tenant is None else validation.check_name("tenant", tenant),
        lasts_seconds=None if lasts is None else lasts * _DAY_SECONDS,
    )
    return NewToken(secret, await (await ensure_database()).transact(add))


async def list_tokens() -> list[tuple[Token, bool]]:
    """Return all tokens, oldest first, each with whether it is valid now."""
    return await (await ensure_database()).transact(tokens.get_tokens, read_only=True)


async def revoke_token(name: str) -> Token:
    """Make a token invalid for ever and return its row; raises ``InvalidRequestError``."""
    wanted = validation.check_name("name", name)
    database = await ensure_database()
    token = await database.transact(lambda session: tokens.revoke(session, wanted))
    if token is None:
        remedy = "`dgx-music token list` shows those that exist"
        raise InvalidRequestError("name", f"{wanted!r} is no token's", remedy)
    return token


async def find_holder(secret: str) -> Holder | None:
    """Return who holds this token, or ``None`` if it is not valid; notes the use once an hour."""
    if _FORM.fullmatch(secret) is None:
        return None
    database = await ensure_database()
    find = partial(tokens.find_holder, sha256=_hash(secret))
    holder = await database.transact(find, read_only=True)
    if holder is not None and not holder.is_use_noted:
        await database.transact(lambda session: tokens.note_use(session, holder.name))
    return holder


async def has_tokens(*, valid_only: bool = False) -> bool:
    """Return True if a token was ever made, or with ``valid_only`` if one is valid now."""

    async def ask(session: AsyncSession) -> bool:
        return await tokens.has_tokens(session, valid_only=valid_only)

    return await (await ensure_database()).transact(ask, read_only=True)


def check_role(role: object, field: str = "role") -> Role:
    """Return the role; raises ``InvalidRequestError``."""
    try:
        return Role(str(role))
    except ValueError:
        problem = f"is {validation.shown(role)}"
        raise InvalidRequestError(field, problem, f"use {', '.join(Role)}") from None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
