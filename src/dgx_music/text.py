"""Text that is what it seems: which characters can be seen, and how the others are written where people read."""

from __future__ import annotations

import re
from unicodedata import category

_BLANK = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U0001d159\U000e0000-\U000e0fff]"
)
"""Letters, marks and signs by their category that nothing is drawn for: fillers, blanks, variation selectors, tags."""
_LOST = "\ufffc\ufffd"
"""Drawn in the place of an object and of a letter that were lost on the way here."""
_YET_TO_COME = re.compile(r"[\U0001f000-\U0001faff\U00020000-\U0003fffd]")
"""Where emoji and Chinese characters are that this Python may be too old to know."""
_JOINERS = "\u200c\u200d"
_VARIATION = re.compile(r"[\ufe00-\ufe0f\U000e0100-\U000e01ef]")
_LAST_LATIN = "\u02ff"
_ESCAPED = re.compile(r"[^ -~]")
_ESCAPED_IN_JSON = re.compile(r"[^ -~\n]")


def is_seen(character: str) -> bool:
    """Return True where something is drawn for the character, alone or upon another one; white space is not seen."""
    is_drawn = category(character)[0] in "LMNPS" or _YET_TO_COME.match(character)
    return bool(is_drawn) and _BLANK.match(character) is None


def says_something(text: str) -> bool:
    """Return True where the text has a letter, a digit or a sign: more than white space, accents, and what nobody sees.

    Signs in the place of what was lost say nothing.
    """
    return any(is_seen(each) and category(each)[0] != "M" and each not in _LOST for each in text)


def plain(text: str) -> str:
    r"""Return the text on one line, with all that cannot be seen, or moves what can, as an escape: ``\x1b``, ``\u202e``.

    Letters of every script stay as they are, and so does what belongs to them: the joiners within words of Persian or
    Hindi and within emoji, and one variation selector behind a character.
    """
    return _ESCAPED.sub(lambda found: found[0] if _is_plain(text, found.start()) else escape(found[0]), text)


def plain_json(text: str) -> str:
    """Return the JSON text, which means what it meant, with what cannot be seen as JSON's own escapes."""
    return _ESCAPED_IN_JSON.sub(lambda found: found[0] if _is_simple(found[0]) else _in_json(found[0]), text)


def escape(character: str) -> str:
    r"""Return the character as Python writes it: ``\x1b``, ``\u202e``, ``\U000e0041``."""
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


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
    """Return True for a letter or sign of a script that has joiners; Latin has none, and may hide one."""
    return neighbour > _LAST_LATIN and is_seen(neighbour)
