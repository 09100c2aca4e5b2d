"""Which part of a file a client asks for, and whether it has the file already (RFC 9110)."""

from __future__ import annotations

import re

_RANGE = re.compile(r"bytes=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE | re.ASCII)

_MOST_DIGITS = 1_000
"""Of a number; Python makes integers of up to 4,300."""


class NoSuchRangeError(Exception):
    """The file is shorter than the start of the range."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return the first byte and the number of bytes, or ``None`` for the whole file.

    A header that is malformed, or that asks for several ranges, counts as none: the standard allows
    that, and no player needs several. Raises ``NoSuchRangeError``.
    """
    found = _RANGE.fullmatch(header or "")
    if found is None or not (found[1] or found[2]) or max(map(len, found.groups())) > _MOST_DIGITS:
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < int(found[1]):
            return None
    if start >= size:
        raise NoSuchRangeError
    return start, end - start


def is_known(if_none_match: str | None, etag: str) -> bool:
    """Return True if the client has this version: its ``If-None-Match`` names it."""
    if if_none_match is None:
        return False
    known = (each.strip().removeprefix("W/") for each in if_none_match.split(","))
    return if_none_match.strip() == "*" or etag in known


def is_same(if_range: str | None, etag: str) -> bool:
    """Return True if a range may be sent: ``If-Range`` names this version, or is not there.

    A date there never fits: a file has no date of its own.
    """
    return if_range is None or if_range.strip() == etag
