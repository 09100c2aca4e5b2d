"""The one interface of every place for audio, and the names of the files in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from dgx_music.errors import ArtifactError, InvalidRequestError
from dgx_music.validation import AUDIO_FORMATS, check_integer

EXTENSIONS: tuple[str, ...] = AUDIO_FORMATS
PART = ".part"
"""The suffix of a half-written file."""
CHUNK_BYTES = 2**18
"""How much of a file is read at a time: each client of a server that reads slowly holds two or three
of them."""
MAX_BYTES = 2**63 - 1
"""No file is larger."""
LONGEST_LINK_SECONDS = 7 * 86_400
"""S3 honours no link for longer."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(rf"({_ID.pattern})-(0|[1-9]\d*)\.({'|'.join(EXTENSIONS)})({re.escape(PART)})?")
PREVIEWS = "previews"
"""The folder with one folder for each attempt that is under way."""
_PREVIEW = re.compile(rf"{PREVIEWS}/({_ID.pattern})-(0|[1-9]\d*)/\d+({re.escape(PART)})?")


@dataclass(frozen=True)
class Artifact:
    """A published file: its path, its size, and the SHA-256 of its content in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was found: its generation and attempt, path, size, last change (UTC)."""

    generation_id: str
    attempt: int
    path: str
    size_bytes: int
    modified_at: datetime
    is_preview: bool = False
    """True for a part of a preview, which no audio needs once its attempt is over."""


class Artifacts(Protocol):
    """A place for audio; ``str`` gives its name.

    Files are named by a generation's id and attempt: no two attempts share one. One attempt has one
    publisher at a time: the fence on the row makes sure of that.
    """

    async def publish(
        self, generation_id: str, attempt: int, extension: str, data: bytes
    ) -> Artifact:
        """Store the data in one step: when this returns, the file survives a power cut.

        The same data again is the same publication. Other data under a name that is taken raises
        ``ArtifactError`` and changes nothing; so does any failure to write.
        """

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """Remove all files of these attempts, half-written ones and previews too.

        Returns how many there were.
        """

    async def publish_preview(
        self, generation_id: str, attempt: int, number: int, data: bytes
    ) -> None:
        """Store a part of an attempt's preview, whole or not at all; parts are counted from 0.

        Unlike a publication it may be lost when the power fails. The attempt must be running:
        whoever ends it deletes its parts. Raises ``ArtifactError``.
        """

    async def read_preview(self, generation_id: str, attempt: int, number: int) -> bytes | None:
        """Return a part of an attempt's preview; ``None`` if it is not there, or not any more.

        Raises ``ArtifactError`` if that cannot be found out.
        """

    async def delete_preview(self, generation_id: str, attempt: int) -> int:
        """Remove all parts of an attempt's preview, and no audio; return how many there were."""

    def holds(self, path: str) -> bool:
        """Return whether an artifact with this path is, or was, one of this place."""

    async def exists(self, path: str) -> bool:
        """Return whether a published file is there; ``path`` is the ``file_path`` of its row.

        Raises ``ArtifactError`` if that cannot be found out, or if the path is of another place.
        """

    def stream(
        self, path: str, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the content of a published file in chunks of 256 KiB.

        ``path`` is the ``file_path`` of its row. With ``start`` and ``length`` only these bytes of
        it are read, and fewer if the file ends before. A reader that leaves early closes it. Raises
        ``ArtifactError`` if the file is not there, cannot be read, or is of another place: so a web
        application that streams by rows can serve no other file. Raises ``InvalidRequestError`` for
        a negative number.
        """

    async def link(self, path: str, seconds: float) -> str | None:
        """Return a URL by which anybody can read the file for ``seconds``, at most seven days.

        ``None`` if the place has no such links: stream the file instead. This does not check that
        the file is there. Raises ``ArtifactError`` if the path is of another place, or if a link
        cannot be signed.
        """

    def list_files(self) -> AsyncIterator[StoredFile]:
        """Yield the files that publications have left here, half-written ones too, in no order.

        Other files are left out. A file that is published or deleted meanwhile may be left out or
        not.
        """

    async def find_problem(self) -> str | None:
        """Return one sentence on why nothing can be published here now, or ``None``."""


def file_name(generation_id: str, attempt: int, extension: str) -> str:
    """Return the only name that this attempt's file can have; refuses names of other places."""
    _check_id(generation_id)
    if extension not in EXTENSIONS:
        known = ", ".join(EXTENSIONS)
        raise InvalidRequestError("extension", f"{extension!r} is not known", f"use one of {known}")
    return f"{generation_id}-{attempt:d}.{extension}"


def _check_id(generation_id: str) -> None:
    if not _ID.fullmatch(generation_id):
        raise InvalidRequestError(
            "generation_id",
            f"{generation_id!r} cannot name a file",
            "use 1 to 64 letters, digits, - and _",
        )


def file_names(generation_id: str, attempts: Iterable[int]) -> list[str]:
    """Return each name that the files of these attempts can have."""
    return [
        file_name(generation_id, attempt, extension)
        for attempt in attempts
        for extension in EXTENSIONS
    ]


def preview_folder(generation_id: str, attempt: int) -> str:
    """Return where the parts of an attempt's preview are; refuses names of other places."""
    _check_id(generation_id)
    return f"{PREVIEWS}/{generation_id}-{attempt:d}"


def preview_name(generation_id: str, attempt: int, number: int) -> str:
    """Return the name of a part of an attempt's preview; refuses names of other places."""
    return f"{preview_folder(generation_id, attempt)}/{number:d}"


def parse_name(name: str) -> tuple[str, int] | None:
    """Return the generation's id and the attempt in a file's name; ``None`` for a foreign file."""
    found = _NAME.fullmatch(name) or _PREVIEW.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def is_preview(name: str) -> bool:
    """Return whether this is the name of a part of a preview."""
    return _PREVIEW.fullmatch(name) is not None


def describe(path: str, data: bytes) -> Artifact:
    """Return what the row of this data will say."""
    return Artifact(path, len(data), hashlib.sha256(data).hexdigest())


def check_range(start: int, length: int | None) -> tuple[int, int]:
    """Return the first byte, and the one after the last; raises ``InvalidRequestError``."""
    start = check_integer("start", start, 0, MAX_BYTES)
    most = MAX_BYTES - start
    return start, start + (most if length is None else check_integer("length", length, 0, most))


def check_held(place: Artifacts, path: str) -> None:
    """Raise ``ArtifactError`` if the path is of another place."""
    if not place.holds(path):
        raise ArtifactError(f"{path} is not in {place}.")


def name_is_taken(name: str) -> ArtifactError:
    """Return the error of a publication under a name that holds other data."""
    return ArtifactError(f"{name} already holds other audio; it is left as it is.")
