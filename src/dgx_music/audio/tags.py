"""What a file says of itself: title, model, date, and how it was made.

Each format has its own form: INFO in WAV, Vorbis comments in FLAC and Ogg, ID3 in MP3. All are
written in the one pass that writes the audio.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dgx_music import __version__
from dgx_music.catalog import MODELS, TONE_NOTICE, UNTRAINED_NOTICE, is_untrained, short_name

SOFTWARE = f"dgx-music {__version__}"
UNTITLED = "untitled"

_LONGEST_TITLE = 200
_LONGEST_PROMPT = 2_500
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]+")
_UTF_8 = b"\x03"
_LANGUAGE = b"eng"


@dataclass(frozen=True, kw_only=True)
class Tags:
    """The tags of one file: clean text of bounded length."""

    title: str
    artist: str
    """The model: players sort by this."""
    date: str
    """Such as ``2026-01-31``."""
    comment: str
    """Lines of ``name: value``: the prompt, the seed, the id and so on."""
    licence: str
    """Of the model's weights, as a sentence; empty if it is not known."""

    def vorbis(self) -> dict[str, str]:
        """Return the tags of FLAC and Ogg, by libsndfile's names."""
        tags = {
            "title": self.title,
            "artist": self.artist,
            "date": self.date,
            "comment": self.comment,
            "license": self.licence,
            "software": SOFTWARE,
        }
        return {name: text for name, text in tags.items() if text}

    def riff(self) -> bytes:
        """Return WAV's chunk of tags: ``LIST`` with ``INFO``."""
        tags = [
            (b"INAM", self.title),
            (b"ICMT", self.comment),
            (b"ISFT", SOFTWARE),
            (b"IART", self.artist),
            (b"ICRD", self.date),
            (b"ICOP", self.licence),
        ]
        return riff_info((name, text) for name, text in tags if text)

    def id3(self) -> bytes:
        """Return MP3's tags: ID3 2.4, which stands before the audio.

        libsndfile would write UTF-8 there and call it Latin-1.
        """
        frames = [
            (b"TIT2", b"", self.title),
            (b"TPE1", b"", self.artist),
            (b"TDRC", b"", self.date),
            (b"TSSE", b"", SOFTWARE),
            (b"COMM", _LANGUAGE + b"\0", self.comment),
            (b"TXXX", b"LICENSE\0", self.licence),
        ]
        body = b"".join(_id3_frame(name, start, text) for name, start, text in frames if text)
        return b"ID3\x04\x00\x00" + _synchsafe(len(body)) + body


def tags_of(
    *,
    generation_id: str,
    prompt: str,
    model_name: str,
    made_at: datetime,
    facts: Mapping[str, Any],
    title: str | None = None,
) -> Tags:
    """Return the tags of a generation's file; ``facts`` are the engine's, as stored with the row.

    A local folder is named without the folders above it: the file may go to strangers.
    """
    model = one_line(short_name(model_name), _LONGEST_TITLE)
    described = one_line(prompt, _LONGEST_PROMPT)
    is_tone = facts.get("engine") == "tone"
    licence = "" if is_tone else _licence_of(model_name)
    notes = [TONE_NOTICE] if is_tone else []
    if facts.get("is_untrained", is_untrained(model_name) and not is_tone):
        notes.append(UNTRAINED_NOTICE)
    lines = {
        "Prompt": described,
        "Model": model,
        "Seed": facts.get("seed"),
        "Generation": generation_id,
        "Licence": licence,
        "Note": "; ".join(notes),
    }
    told = [f"{name}: {value}" for name, value in lines.items() if value not in (None, "")]
    return Tags(
        title=one_line(title or "", _LONGEST_TITLE) or shorten(described) or UNTITLED,
        artist=model,
        date=made_at.astimezone(UTC).date().isoformat(),
        comment="\n".join(told),
        licence=licence,
    )


def one_line(text: str, longest: int) -> str:
    """Return the text on one line without control characters, of at most so many characters."""
    return shorten(" ".join(_UNPRINTABLE.sub(" ", text).split()), longest)


def shorten(line: str, longest: int = _LONGEST_TITLE) -> str:
    """Return at most so many characters of the line; if some are missing, the last one is ``…``."""
    return line if len(line) <= longest else f"{line[: longest - 1].rstrip()}…"


def riff_info(tags: Iterable[tuple[bytes, str]]) -> bytes:
    """Return a ``LIST`` chunk with these tags; each ends with a NUL and has an even length."""
    body = b"INFO"
    for name, text in tags:
        data = text.encode() + b"\0"
        data += b"\0" * (len(data) % 2)
        body += name + struct.pack("<I", len(data)) + data
    return b"LIST" + struct.pack("<I", len(body)) + body


def _licence_of(model_name: str) -> str:
    info = MODELS.get(model_name)
    if info is None or info.licence is None:
        return ""
    return f"made with the weights of {info.name}, whose licence is {info.licence}"


def _id3_frame(name: bytes, start: bytes, text: str) -> bytes:
    data = _UTF_8 + start + text.encode()
    return name + _synchsafe(len(data)) + b"\0\0" + data


def _synchsafe(size: int) -> bytes:
    """Return the size in four bytes of 7 bits, so that it never looks like the start of a frame."""
    return bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
