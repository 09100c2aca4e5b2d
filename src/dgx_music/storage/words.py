"""What a word is for the search: the same rules for a stored prompt and for the words searched.

The databases index plain ASCII words with single spaces between them. So SQLite's and PostgreSQL's
tokenisers cannot differ: neither by locale, nor by version of Unicode, nor by what a letter is.
"""

from __future__ import annotations

import re
import unicodedata

_MARKS = re.compile(
    "["
    "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"  # accents
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew points
    "\u0640\u064b-\u065f\u0670"  # Arabic vowels and elongation
    # soft hyphens, joiners, variation selectors
    "\u00ad\u034f\u200c\u200d\u2060\ufe00-\ufe0f\ufeff"
    "]+"
)
"""Marks that are often not written. Marks of other scripts (Hindi vowels) are letters."""

_WITHOUT_SPACES = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u2e80-\u31ff\u3400-\u9fff\uf900-\ufaff\U0001b000-\U0001b2ff\U00020000-\U0003ffff])"
)
"""Thai, Lao, Burmese, Khmer, Chinese and Japanese have no spaces between words: each character
counts as a word, and a word as a phrase."""

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_LONGEST = 250
"""How many characters of a word count: one takes up to 8 of PostgreSQL's 2,046 bytes."""


def words_of(text: str) -> list[str]:
    """Return the text's words without case, accents and punctuation, each in ASCII."""
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())
    else:
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
        composed = unicodedata.normalize("NFC", _MARKS.sub("", folded))
        kinds = ((char, unicodedata.category(char)[0]) for char in composed)
        spaced = "".join(char if kind in "LMN" else " " for char, kind in kinds)
        found = _WITHOUT_SPACES.sub(r" \1 ", spaced).split()
    return [_in_ascii(word[:_LONGEST]) for word in found]


def search_text(text: str) -> str:
    """Return the text that the databases index for a prompt.

    A change of these rules needs a migration that fills the column again.
    """
    return " ".join(words_of(text))


def _in_ascii(word: str) -> str:
    """Return an ASCII word as it is, any other as its bytes in hexadecimal.

    Both databases stem words of letters; they do not change what ends in a digit.
    """
    is_plain = word.isascii() and (word.isalpha() or word.isdigit())
    return word if is_plain else f"x{word.encode().hex()}0"
