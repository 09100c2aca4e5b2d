"""Which characters of a text can be seen, and how the others are shown to people."""

from __future__ import annotations

import re
from unicodedata import category

_BLANK = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U0001d159\U000e0000-\U000e0fff]"
)
"""Letters, marks and signs by category that are not drawn: fillers, variation selectors, tags."""
_LOST = "\ufffc\ufffd"
"""Drawn instead of an object, or of a letter, that was lost in a conversion."""
_YET_TO_COME = re.compile(r"[\U0001f000-\U0001faff\U00020000-\U0003fffd]")
"""The blocks of emoji and Chinese characters, some of which this Python may be too old to know."""
_JOINERS = "\u200c\u200d"
_VARIATION = re.compile(r"[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_LAST_LATIN = "\u02ff"
_ESCAPED = re.compile(r"[^ -~]")
_ESCAPED_IN_JSON = re.compile(r"[^ -~\n]")


def is_seen(character: str) -> bool:
    """Return True if the character is drawn, alone or on another one; white space is not."""
    is_drawn = category(character)[0] in "LMNPS" or _YET_TO_COME.match(character)
    return bool(is_drawn) and _BLANK.match(character) is None


def says_something(text: str) -> bool:
    """Return True if the text has a letter, a digit or a sign that can be seen.

    White space, accents alone, and signs that stand for something lost do not count.
    """
    if text[:1].isalpha() and text.isascii():  # nearly always
        return True
    return any(is_seen(each) and category(each)[0] != "M" and each not in _LOST for each in text)


def plain(text: str) -> str:
    r"""Return the text on one line, with an escape such as ``\x1b`` or ``\u202e`` for what cannot be seen.

    Characters that move others are escaped too. Letters of each script stay as they are, and so do
    the joiners within Persian or Hindi words and emoji, and one variation selector after a
    character.
    """
    return _ESCAPED.sub(
        lambda found: found[0] if _is_plain(text, found.start()) else escape(found[0]), text
    )


def plain_json(text: str) -> str:
    """Return the same JSON, with JSON's own escapes for characters that cannot be seen."""
    return _ESCAPED_IN_JSON.sub(
        lambda found: found[0] if _is_simple(found[0]) else _in_json(found[0]), text
    )


def escape(character: str) -> str:
    r"""Return the character as Python writes it: ``\x1b``, ``\u202e``, ``\U000e0041``."""
    code = ord(character)
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def _in_json(character: str) -> str:
    pairs = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{pairs[at : at + 4]}" for at in range(0, len(pairs), 4))


def _is_simple(character: str) -> bool:
    return is_seen(character) or category(character) == "Zs"


def _is_plain(text: str, at: int) -> bool:
    if text[at] in _JOINERS:
        before = _VARIATION.sub("", text[max(0, at - 2) : at])[-1:]
        return _joins(before) and _joins(text[at + 1 : at + 2])
    if _VARIATION.match(text[at]):
        return at > 0 and is_seen(text[at - 1])
    return _is_simple(text[at])


def _joins(neighbour: str) -> bool:
    """Return True for a letter or sign of a script that has joiners, which Latin has not."""
    return neighbour > _LAST_LATIN and is_seen(neighbour)
