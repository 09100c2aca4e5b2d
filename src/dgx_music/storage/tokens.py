"""The tokens of the web API, by their names and by their hashes."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.errors import InvalidRequestError
from dgx_music.roles import Role
from dgx_music.storage.models import Token
from dgx_music.storage.schema import dialect_of, insert, now, now_plus

_NOTED_EVERY_SECONDS = 3_600.0


@dataclass(frozen=True)
class Holder:
    """Who holds a token that is valid, and what they may do."""

    name: str
    role: Role
    tenant: str | None
    is_use_noted: bool
    """Whether a use was noted within the last hour."""


async def add_token(
    session: AsyncSession,
    *,
    name: str,
    sha256: str,
    role: Role,
    tenant: str | None,
    lasts_seconds: float | None,
) -> Token:
    """Add a token and return its row; raises ``InvalidRequestError`` if the name is taken."""
    expires_at = None if lasts_seconds is None else now_plus(lasts_seconds)
    values = {"name": name, "sha256": sha256, "role": str.__str__(role), "tenant": tenant}
    statement = insert(dialect_of(session), Token).values(**values, expires_at=expires_at)
    fresh = statement.on_conflict_do_nothing(index_elements=["name"]).returning(Token)
    token: Token | None = await session.scalar(fresh)
    if token is None:
        remedy = "choose another one: a name is used once, also after its token is revoked"
        raise InvalidRequestError("name", f"{name!r} is taken", remedy)
    return token


async def get_tokens(session: AsyncSession) -> list[tuple[Token, bool]]:
    """Return all tokens, oldest first, each with whether it is valid now."""
    query = select(Token, is_valid()).order_by(Token.created_at, Token.name)
    return [(token, bool(is_valid)) for token, is_valid in (await session.execute(query)).all()]


async def revoke(session: AsyncSession, name: str) -> Token | None:
    """Make the token invalid from now on and return its row; ``None`` if there is no such token.

    A token that was revoked before keeps the time of that.
    """
    is_meant = and_(Token.name == name, Token.revoked_at.is_(None))
    await session.execute(update(Token).where(is_meant).values(revoked_at=now()))
    return await session.scalar(select(Token).where(Token.name == name))


async def find_holder(session: AsyncSession, sha256: str) -> Holder | None:
    """Return who holds the valid token with this hash, or ``None``."""
    is_noted = Token.last_used_at > now_plus(-_NOTED_EVERY_SECONDS)
    query = select(Token, is_noted).where(Token.sha256 == sha256, is_valid())
    found = (await session.execute(query)).one_or_none()
    if found is None or not hmac.compare_digest(found.Token.sha256, sha256):
        return None
    token, is_noted_now = found
    return Holder(token.name, Role(token.role), token.tenant, bool(is_noted_now))


async def note_use(session: AsyncSession, name: str) -> None:
    """Note that the token is used now, unless that was noted within the last hour."""
    is_due = or_(
        Token.last_used_at.is_(None), Token.last_used_at <= now_plus(-_NOTED_EVERY_SECONDS)
    )
    await session.execute(
        update(Token).where(Token.name == name, is_due).values(last_used_at=now())
    )


async def has_tokens(session: AsyncSession, *, valid_only: bool = False) -> bool:
    """Return True if a token was ever made, or with ``valid_only`` if one is valid now."""
    query = select(Token.name).limit(1)
    if valid_only:
        query = query.where(is_valid())
    return await session.scalar(query) is not None


def is_valid() -> ColumnElement[bool]:
    """Return the condition that a token is neither revoked nor expired."""
    has_time = or_(Token.expires_at.is_(None), Token.expires_at > now())
    return and_(Token.revoked_at.is_(None), has_time)
