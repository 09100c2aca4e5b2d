"""Who holds a token or has logged in, kept for two seconds; and how many requests each holder may make."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic

import anyio

from dgx_music.client import logins, tokens
from dgx_music.storage.tokens import Holder

KEPT_SECONDS = 2.0
"""How long a revoked token may still be accepted."""
_MOST_KEPT = 1_000


class Tokens:
    """The tokens as this process knows them."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._holders: dict[tuple[str, str], tuple[float, Holder]] = {}
        self._was_empty_at: float | None = None
        self._has_any = False
        self._looking = anyio.Lock()

    async def find_holder(self, secret: str) -> Holder | None:
        """Return who holds this token, or ``None`` if it is not valid."""
        return await self._find("token", secret, tokens.find_holder)

    async def find_visitor(self, secret: str) -> Holder | None:
        """Return who has logged in to the page, or ``None`` if the log-in has ended."""
        return await self._find("login", secret, logins.find_visitor)

    def forget_visitor(self, secret: str) -> None:
        """Ask the database again who has logged in so."""
        self._holders.pop(("login", secret), None)

    async def _find(
        self, kind: str, secret: str, find: Callable[[str], Awaitable[Holder | None]]
    ) -> Holder | None:
        kept = self._holders.get((kind, secret))
        if kept is not None and self._clock() - kept[0] < KEPT_SECONDS:
            return kept[1]
        at, holder = self._clock(), await find(secret)
        if len(self._holders) >= _MOST_KEPT:
            self._holders.clear()
        if holder is None:
            self._holders.pop((kind, secret), None)
        else:
            self._holders[kind, secret] = (at, holder)
        return holder

    async def has_any(self) -> bool:
        """Return True if a token was ever made."""
        async with self._looking:  # of many who ask at once, one looks
            if not self._has_any and not self._is_empty():
                at = self._clock()
                self._has_any = await tokens.has_tokens()
                self._was_empty_at = at
            return self._has_any

    def _is_empty(self) -> bool:
        """Return True if a moment ago there was no token."""
        at = self._was_empty_at
        return at is not None and self._clock() - at < KEPT_SECONDS


class Rates:
    """How many requests each holder may still make: so many a second, and so many at once."""

    def __init__(
        self,
        per_second: float,
        clock: Callable[[], float] = monotonic,
        *,
        at_once: float | None = None,
    ) -> None:
        self._per_second = per_second
        self._most = at_once or max(per_second, 1.0)
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, name: str) -> float:
        """Count a request and return 0, or return the seconds until the next one is allowed."""
        if not self._per_second:
            return 0.0
        now = self._clock()
        since, left = self._left.get(name, (now, self._most))
        left = min(self._most, left + (now - since) * self._per_second)
        is_allowed = left >= 1
        if len(self._left) >= _MOST_KEPT:
            self._left.clear()
        self._left[name] = (now, left - is_allowed)
        return 0.0 if is_allowed else (1 - left) / self._per_second
