"""What the search takes for words: of a prompt when it is stored, and of what somebody looks for, by the same rules.

What is indexed is plain ASCII words with single spaces between, so that SQLite's and PostgreSQL's tokenisers have nothing
left to differ in: no locale, no version of Unicode, no idea of what a letter is.
"""

from __future__ import annotations

import re
import unicodedata

_MARKS = re.compile(
    "["
    "\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f"  # accents of Latin, Greek and Cyrillic letters
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"  # Hebrew points
    "\u0640\u064b-\u065f\u0670"  # Arabic vowels, and what only stretches a word
    "\u00ad\u034f\u200c\u200d\u2060\ufe00-\ufe0f\ufeff"  # soft hyphens, joiners, variation selectors
    "]+"
)
"""What is often left out in writing. Marks of other scripts are letters in all but name: Hindi's vowels, Japanese dakuten."""

_WITHOUT_SPACES = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    "\u2e80-\u31ff\u3400-\u9fff\uf900-\ufaff\U0001b000-\U0001b2ff\U00020000-\U0003ffff])"
)
"""Thai, Lao, Burmese, Khmer, Chinese and Japanese put no spaces between words: every character is one, a word a phrase."""

_ASCII_WORD = re.compile(r"[a-z0-9]+")
_LONGEST = 250
"""Characters of a word that count: PostgreSQL's index takes no more than 2,046 bytes, and one may become 8 of them."""


def words_of(text: str) -> list[str]:
    """Return the text's words without case, accents and punctuation, each as letters, as digits, or as its bytes in ASCII."""
    if text.isascii():
        found = _ASCII_WORD.findall(text.lower())
    else:
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
        composed = unicodedata.normalize("NFC", _MARKS.sub("", folded))
        spaced = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in composed)
        found = _WITHOUT_SPACES.sub(r" \1 ", spaced).split()
    return [_in_ascii(word[:_LONGEST]) for word in found]


def search_text(text: str) -> str:
    """Return what the databases index of a prompt. Another rule here takes a migration that fills the column anew."""
    return " ".join(words_of(text))


def _in_ascii(word: str) -> str:
    """Return the word, or its bytes: both databases stem letters, and leave alone what ends in a digit."""
    is_plain = word.isascii() and (word.isalpha() or word.isdigit())
    return word if is_plain else f"x{word.encode().hex()}0"
