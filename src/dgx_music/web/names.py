"""The name of an audio file on the machine of whoever downloads it."""

from __future__ import annotations

from unicodedata import normalize
from urllib.parse import quote

from dgx_music.client.content import stored_format, values_of
from dgx_music.client.names import DEFAULT_PATTERN, Pattern
from dgx_music.storage import Generation

MEDIA_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
}
"""Our own table: the machine's may know none of them, or others."""
_PATTERN = Pattern(DEFAULT_PATTERN)


def media_type_of(audio_format: str) -> str:
    """Return the media type of a file in this format."""
    return MEDIA_TYPES.get(audio_format, "application/octet-stream")


def file_name(row: Generation, audio_format: str | None = None) -> str:
    """Return the name that ``save_audio`` gives: title or prompt, take, key, tempo and id.

    Its ending is that of the format, or of the stored file if none is given.
    """
    return _PATTERN.fill(values_of(row), f".{audio_format or stored_format(row)}").name


def disposition(name: str, *, is_attachment: bool) -> str:
    """Return the header ``Content-Disposition``: the name in ASCII, and as it is (RFC 6266)."""
    kind = "attachment" if is_attachment else "inline"
    letters = normalize("NFKD", name).encode("ascii", "ignore").decode()
    # These end a quoted text, or begin an escape in what some browsers read.
    plain = "".join("_" if each in '"\\%' or not each.isprintable() else each for each in letters)
    return f"{kind}; filename=\"{plain.lstrip(' _-.')}\"; filename*=UTF-8''{quote(name, safe='')}"
