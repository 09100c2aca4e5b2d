"""The log-ins of the page: a token is given once, and a cookie stands for it for some hours."""

from __future__ import annotations

import hashlib
import re
import secrets
from functools import partial

from dgx_music.client import tokens
from dgx_music.storage import logins
from dgx_music.storage.database import ensure_database
from dgx_music.storage.tokens import Holder

LASTS_SECONDS = 12 * 3_600
_BYTES = 32
_FORM = re.compile(r"[A-Za-z0-9_-]{43}")


async def log_in(token: str) -> str | None:
    """Return the secret of a new log-in, or ``None`` if the token is not valid."""
    holder = await tokens.find_holder(token)
    if holder is None:
        return None
    secret = secrets.token_urlsafe(_BYTES)
    add = partial(
        logins.add_login,
        sha256=_hash(secret),
        token_name=holder.name,
        lasts_seconds=float(LASTS_SECONDS),
    )
    await (await ensure_database()).transact(add)
    return secret


async def find_visitor(secret: str) -> Holder | None:
    """Return who has logged in with this secret, or ``None`` if it is not valid any more."""
    if _FORM.fullmatch(secret) is None:
        return None
    find = partial(logins.find_visitor, sha256=_hash(secret))
    return await (await ensure_database()).transact(find, read_only=True)


async def log_out(secret: str) -> None:
    """Make the secret invalid; one that is not known changes nothing."""
    if _FORM.fullmatch(secret) is not None:
        end = partial(logins.end_login, sha256=_hash(secret))
        await (await ensure_database()).transact(end)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
