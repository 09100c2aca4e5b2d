"""The one interface of every place for audio, and the names of the files in it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, get_args

from dgx_music.config import AudioFormat
from dgx_music.errors import ArtifactError, InvalidRequestError

EXTENSIONS: tuple[str, ...] = get_args(AudioFormat)
PART = ".part"
"""What the name of a half-written file ends with."""
CHUNK_BYTES = 4 * 2**20
LONGEST_LINK_SECONDS = 7 * 86_400
"""S3 honours no link for longer."""

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME = re.compile(rf"({_ID.pattern})-(0|[1-9]\d*)\.({'|'.join(EXTENSIONS)})({re.escape(PART)})?")


@dataclass(frozen=True)
class Artifact:
    """A published file: where it is, its size, and the SHA-256 of its content in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that was found: of which generation and attempt, where, how big, and last changed when (aware UTC)."""

    generation_id: str
    attempt: int
    path: str
    size_bytes: int
    modified_at: datetime


class Artifacts(Protocol):
    """A place for audio, which ``str`` names. Files are named by a generation's id and attempt: no two attempts share one.

    One attempt has one publisher at a time: the fence on the row sees to it.
    """

    async def publish(self, generation_id: str, attempt: int, extension: str, data: bytes) -> Artifact:
        """Store the data, durably and in one step: once this returns, the file outlives a power cut.

        The same data again is the same publication; other data under a name that is taken raises ``ArtifactError`` and
        changes nothing, as does any failure to write.
        """

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """Remove all that these attempts left, half-written files too, and return how many; none is fine."""

    def holds(self, path: str) -> bool:
        """Return whether an artifact of this path is, or was, one of this place."""

    async def exists(self, path: str) -> bool:
        """Return whether a published file is there; ``path`` is what its row says.

        Raises ``ArtifactError`` where that cannot be found out, or where the path is of another place.
        """

    def stream(self, path: str) -> AsyncIterator[bytes]:
        """Yield the content of a published file in chunks of some megabytes; ``path`` is what its row says.

        Raises ``ArtifactError`` where it cannot be read, is not there, or is of another place: whoever serves audio by
        what a row says serves no other file.
        """

    async def link(self, path: str, seconds: float) -> str | None:
        """Return a URL by which anybody can read the file for so many seconds, at most seven days.

        ``None`` where the place has no such links: stream the file instead. Whether it is there is not looked at. Raises
        ``ArtifactError`` where the path is of another place or a link cannot be signed.
        """

    def list_files(self) -> AsyncIterator[StoredFile]:
        """Yield what publications have left here, half-written files too, in no order; other files are passed over.

        What is published or deleted meanwhile may be among them or not.
        """

    async def find_problem(self) -> str | None:
        """Return one sentence on why nothing could be published here now, or ``None``."""


def file_name(generation_id: str, attempt: int, extension: str) -> str:
    """Return the only name this attempt's file can have; refuses all that could name another place."""
    if not _ID.fullmatch(generation_id):
        raise InvalidRequestError(
            "generation_id", f"{generation_id!r} cannot name a file", "use 1 to 64 letters, digits, - and _"
        )
    if extension not in EXTENSIONS:
        raise InvalidRequestError("extension", f"{extension!r} is not known", f"use one of {', '.join(EXTENSIONS)}")
    return f"{generation_id}-{attempt:d}.{extension}"


def file_names(generation_id: str, attempts: Iterable[int]) -> list[str]:
    """Return every name that the files of these attempts can have."""
    return [file_name(generation_id, attempt, extension) for attempt in attempts for extension in EXTENSIONS]


def parse_name(name: str) -> tuple[str, int] | None:
    """Return the generation's id and the attempt that a file is named by; ``None`` where it is none of ours."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def describe(path: str, data: bytes) -> Artifact:
    """Return what a row will say of this data."""
    return Artifact(path, len(data), hashlib.sha256(data).hexdigest())


def check_held(place: Artifacts, path: str) -> None:
    """Raise ``ArtifactError`` where the path is of another place."""
    if not place.holds(path):
        raise ArtifactError(f"{path} is not in {place}.")


def name_is_taken(name: str) -> ArtifactError:
    """Return the error of a publication under a name that holds other data."""
    return ArtifactError(f"{name} already holds other audio; it is left as it is.")
