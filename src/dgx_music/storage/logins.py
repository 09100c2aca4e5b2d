"""The log-ins of the page: by the hash of what is in a browser's cookie."""

from __future__ import annotations

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from dgx_music.roles import Role
from dgx_music.storage.models import Login, Token
from dgx_music.storage.schema import now, now_plus
from dgx_music.storage.tokens import Holder, is_valid


async def add_login(
    session: AsyncSession, *, sha256: str, token_name: str, lasts_seconds: float
) -> None:
    """Add a log-in, and delete those that have expired."""
    await session.execute(delete(Login).where(Login.expires_at <= now()))
    session.add(Login(sha256=sha256, token_name=token_name, expires_at=now_plus(lasts_seconds)))


async def find_visitor(session: AsyncSession, sha256: str) -> Holder | None:
    """Return who has logged in so, or ``None`` if it has expired, or its token is not valid."""
    query = (
        select(Token)
        .join(Login, Login.token_name == Token.name)
        .where(Login.sha256 == sha256, Login.expires_at > now(), is_valid())
    )
    token = await session.scalar(query)
    if token is None:
        return None
    return Holder(token.name, Role(token.role), token.tenant, is_use_noted=True)


async def end_login(session: AsyncSession, sha256: str) -> None:
    """Delete a log-in, if it is there."""
    await session.execute(delete(Login).where(Login.sha256 == sha256))
