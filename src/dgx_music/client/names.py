"""File names from a pattern such as ``{title}_{bpm}bpm``, safe on every file system.

Pure: nothing here looks at a disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from string import Formatter
from unicodedata import category, normalize

from dgx_music.errors import InvalidRequestError
from dgx_music.validation import AUDIO_FORMATS, AudioFormat, check_path, one_of

PLACEHOLDERS = (
    *("title", "prompt", "bpm", "key", "seed"),
    *("take", "id", "short_id", "date", "model"),
)
DEFAULT_PATTERN = "{title}_take{take}_{key}_{bpm}bpm_{short_id}"

_MOST_BYTES = 255
_SHRINKING = ("prompt", "title", "model")
"""The placeholders whose values are cut first if a name is too long."""
_SEPARATORS = re.compile(r"([ _\-.,+~]+)")
_INSTEAD = str.maketrans(
    {"/": "-", "\\": "-", ":": "-", "|": "-", '"': "'"} | dict.fromkeys("<>?*")
)
"""Windows allows none of these in a name."""
_JOINERS = "\u200c\u200d"
_RESERVED = re.compile(
    r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$|clock\$) *(\.|$)", re.IGNORECASE
)
"""Names that mean devices on Windows, whatever stands after the first dot."""
_SUFFIX = re.compile(rf"\.({'|'.join(AUDIO_FORMATS)})$", re.IGNORECASE)
_OTHER_SUFFIX = re.compile(r"\.(aac|aiff?|alac|m4a|mp4|opus|wma)$", re.IGNORECASE)
"""Suffixes of audio that nothing here writes: a file of such a name would hold something else."""
_START, _END = " .-~", " ."


@dataclass(frozen=True)
class _Piece:
    """A part of a pattern: text as it is, or a placeholder."""

    text: str
    is_placeholder: bool


@dataclass(frozen=True)
class _Token:
    """What stands between two separators, with the separator before it."""

    separator: str
    pieces: tuple[_Piece, ...]

    def has_meaning(self, values: Mapping[str, str]) -> bool:
        """Return False if all of its placeholders are empty: its other text goes with them."""
        named = [piece.text for piece in self.pieces if piece.is_placeholder]
        return bool(self.pieces) and (not named or any(values[name] for name in named))


class Pattern:
    """A checked pattern: folders, a file's name, and the format if it ends with one's suffix.

    What stands beside a placeholder without a separator belongs to it: of ``{key}_{bpm}bpm`` only
    the key is left if there is no tempo. Folders and names without placeholders stay as they are.
    """

    def __init__(self, text: str, field: str = "pattern") -> None:
        check_path(field, text)
        pieces = [*_parse(text, field)]
        if _is_folder(pieces):
            pieces += _parse(DEFAULT_PATTERN, field)
        _check_suffix(pieces, field)
        pieces, self._suffix = _without_suffix(pieces)
        *self._folders, self._name = _components(pieces)
        self.audio_format: AudioFormat | None = format_of(self._suffix)

    def fill(self, values: Mapping[str, str], suffix: str, number: int = 1) -> PurePath:
        """Return the path for these values, one for each of ``PLACEHOLDERS``.

        ``suffix`` has its dot; a pattern with a suffix of its own keeps that one. Files of the same
        name are told apart by a ``number`` above 1.
        """
        clean = {name: _clean(value) for name, value in values.items()}
        end = ("" if number == 1 else f"-{number}") + (self._suffix or suffix)
        folders = [_fill(folder, clean, "") for folder in self._folders]
        name = _fill(self._name, clean, end) or f"{clean['id']}{end}"
        root = "/" if self._folders and not self._folders[0] else ""
        return PurePath(root, *(folder for folder in folders if folder), name)


class DistinctNames:
    """The paths of one call: no two are the same, also where upper and lower case are."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}
        """The last number given to the files of a name."""

    def path_for(self, values: Mapping[str, str], suffix: str) -> PurePath:
        """Return the next path for these values, numbered if it was given before."""
        path = self._pattern.fill(values, suffix)
        name = key = _same_for_all(path)
        while key in self._taken:
            self._numbers[name] = self._numbers.get(name, 1) + 1
            path = self._pattern.fill(values, suffix, self._numbers[name])
            key = _same_for_all(path)
        self._taken.add(key)
        return path


def first_words(text: str, most: int = 60) -> str:
    """Return the beginning of the text on one line, cut between two words if it has any."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    cut = line[: most + 1].rpartition(" ")[0]
    return cut or line[:most]


def _same_for_all(path: PurePath) -> str:
    """Return a text that is the same for all paths that some file system takes for one."""
    return normalize("NFC", str(path)).casefold()


def _parse(text: str, field: str) -> Iterator[_Piece]:
    known = one_of([f"{{{name}}}" for name in PLACEHOLDERS])
    try:
        parsed = [*Formatter().parse(text)]
    except ValueError:
        problem = "has a brace that belongs to no placeholder"
        raise InvalidRequestError(field, problem, "write {{ or }} for a brace") from None
    for literal, name, form, conversion in parsed:
        if literal:
            yield _Piece(literal, is_placeholder=False)
        if name is None:
            continue
        if name not in PLACEHOLDERS or form or conversion:
            given = f"{name}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}"
            problem = f"has the placeholder {{{given}}}, which is not known"
            raise InvalidRequestError(field, problem, f"use {known}, or {{{{ for a brace")
        yield _Piece(name, is_placeholder=True)


def _is_folder(pieces: list[_Piece]) -> bool:
    return not pieces[-1].is_placeholder and pieces[-1].text.endswith("/")


def _check_suffix(pieces: list[_Piece], field: str) -> None:
    last = pieces[-1]
    if not last.is_placeholder and (found := _OTHER_SUFFIX.search(last.text)):
        problem = f"ends with {found[0]}, a format that cannot be written"
        raise InvalidRequestError(field, problem, f"use {one_of([f'.{x}' for x in AUDIO_FORMATS])}")


def _without_suffix(pieces: list[_Piece]) -> tuple[list[_Piece], str]:
    """Return the pieces without the suffix of a format at their end, and that suffix or nothing."""
    last = pieces[-1]
    found = None if last.is_placeholder else _SUFFIX.search(last.text)
    is_all = found is not None and len(pieces) == 1 and not last.text[: found.start()]
    if found is None or is_all or last.text[: found.start()].endswith("/"):
        return pieces, ""
    kept = last.text[: found.start()]
    return [*pieces[:-1], *([_Piece(kept, is_placeholder=False)] if kept else [])], found[0]


def format_of(suffix: str) -> AudioFormat | None:
    """Return the format of files with this suffix, such as ``.MP3``; ``None`` if it has none."""
    return next((known for known in AUDIO_FORMATS if suffix.lower() == f".{known}"), None)


def _components(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Return the pieces of each folder, and of the name; an absolute path begins with none."""
    found: list[list[_Piece]] = [[]]
    for piece in pieces:
        if piece.is_placeholder:
            found[-1].append(piece)
            continue
        first, *others = piece.text.split("/")
        found[-1] += [_Piece(first, is_placeholder=False)] if first else []
        found += [[_Piece(text, is_placeholder=False)] if text else [] for text in others]
    return found


def _fill(pieces: list[_Piece], values: Mapping[str, str], end: str) -> str:
    """Return a folder or a name with its end; empty if there is nothing but the end."""
    if not any(piece.is_placeholder for piece in pieces):
        text = "".join(piece.text for piece in pieces)
        return f"{text}{end}" if text else ""
    most = _MOST_BYTES - len(end.encode()) - 1
    text = _shrink(pieces, dict(values), most)
    if _RESERVED.match(text):
        text = f"_{text}"
    return f"{text}{end}" if text else ""


def _shrink(pieces: list[_Piece], values: dict[str, str], most: int) -> str:
    """Return the text of the pieces in at most so many bytes; long values are cut first."""
    for name in _SHRINKING:
        excess = len(_join(pieces, values).encode()) - most
        used = sum(piece.is_placeholder and piece.text == name for piece in pieces)
        if excess > 0 and used:
            room = len(values[name].encode()) - -(-excess // used)
            values[name] = _cut(values[name], room)
    return _cut(_join(pieces, values), most).strip(_END)


def _join(pieces: list[_Piece], values: Mapping[str, str]) -> str:
    text = ""
    for token in _tokens(pieces):
        if token.has_meaning(values):
            separator = token.separator if text else ""
            text += separator + "".join(
                values[piece.text] if piece.is_placeholder else _clean_literal(piece.text)
                for piece in token.pieces
            )
    return normalize("NFC", text).lstrip(_START).rstrip(_END)


def _tokens(pieces: list[_Piece]) -> Iterator[_Token]:
    separator, gathered = "", list[_Piece]()
    for piece in pieces:
        if piece.is_placeholder:
            gathered.append(piece)
            continue
        for number, text in enumerate(_SEPARATORS.split(piece.text)):
            if number % 2:
                yield _Token(separator, tuple(gathered))
                separator, gathered = text, []
            elif text:
                gathered.append(_Piece(text, is_placeholder=False))
    yield _Token(separator, tuple(gathered))


def _clean(value: str) -> str:
    """Return the value on one line, without what some file system refuses or cannot show."""
    kept = (
        each if category(each)[0] != "C" or each in _JOINERS else " "
        for each in normalize("NFC", value).translate(_INSTEAD)
    )
    return normalize("NFC", " ".join("".join(kept).split()))


def _clean_literal(text: str) -> str:
    return normalize("NFC", text.translate(_INSTEAD))


def _cut(text: str, most: int) -> str:
    """Return at most so many bytes of the text, cut between two characters as people see them."""
    if len(text.encode()) <= most:
        return text
    kept = text.encode()[: max(0, most)].decode(errors="ignore")
    while kept and (
        category(text[len(kept)])[0] == "M" or _JOINERS[1] in text[len(kept) - 1 :][:2]
    ):
        kept = kept[:-1]
    return kept.rstrip()
