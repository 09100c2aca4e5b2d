"""The name of an audio file on the machine of whoever downloads it."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath
from urllib.parse import quote

from dgx_music.storage import Generation

MEDIA_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
}
"""Our own table: the machine's may know none of them, or others."""
_NO_WORD = re.compile(r"[^\w#]+")
_MOST_CHARACTERS = 60
_ID_CHARACTERS = 8


def extension_of(row: Generation) -> str:
    """Return the ending of the stored file's name, without the dot."""
    return PurePosixPath(row.file_path or "").suffix[1:].lower()


def media_type_of(row: Generation) -> str:
    """Return the media type of the stored file."""
    return MEDIA_TYPES.get(extension_of(row), "application/octet-stream")


def file_name(row: Generation) -> str:
    """Return a name made of title or prompt, key, tempo and id.

    It has letters, digits, ``_``, ``-``, ``#`` and one dot: nothing of a title can leave a folder
    or end a header.
    """
    bpm = None if row.bpm is None else f"{row.bpm:.0f}bpm"
    parts = [_slug(row.title or row.prompt), row.musical_key, bpm, row.id[:_ID_CHARACTERS]]
    return f"{'_'.join(part for part in parts if part)}.{extension_of(row)}"


def disposition(name: str, *, is_attachment: bool) -> str:
    """Return the header ``Content-Disposition``: the name in ASCII, and as it is (RFC 6266)."""
    kind = "attachment" if is_attachment else "inline"
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return f"{kind}; filename=\"{plain.lstrip('_-.')}\"; filename*=UTF-8''{quote(name, safe='')}"


def _slug(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).lower()
    return _NO_WORD.sub("-", folded)[:_MOST_CHARACTERS].strip("-_#")
