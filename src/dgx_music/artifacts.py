"""Where finished audio is kept: one file per generation and attempt, whole or not there at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

from anyio import to_thread

from dgx_music.config import AudioFormat
from dgx_music.errors import ArtifactError, InvalidRequestError

EXTENSIONS: tuple[str, ...] = get_args(AudioFormat)
MIN_FREE_BYTES = 100 * 2**20

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


@dataclass(frozen=True)
class Artifact:
    """A published file: where it is, its size, and the SHA-256 of its content in hexadecimal."""

    path: str
    size_bytes: int
    sha256: str


class Artifacts(Protocol):
    """A place for audio. Names are made of a generation's id and attempt, so two attempts never meet in one file.

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

    async def find_problem(self) -> str | None:
        """Return one sentence on why nothing could be published here now, or ``None``."""


class LocalArtifacts:
    """Audio in one folder of a file system, made on the first publication."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    async def publish(self, generation_id: str, attempt: int, extension: str, data: bytes) -> Artifact:
        """See ``Artifacts.publish``; the path is absolute. A cancelled scope waits for the thread to end its write."""
        target = self.root / _file_name(generation_id, attempt, extension)
        return await to_thread.run_sync(self._publish, target, data)

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """See ``Artifacts.delete``."""
        names = _file_names(generation_id, attempts)
        return await to_thread.run_sync(self._delete, names)

    def holds(self, path: str) -> bool:
        """See ``Artifacts.holds``."""
        return Path(path).parent == self.root

    async def find_problem(self) -> str | None:
        """See ``Artifacts.find_problem``; writes a nameless file as a test, in the nearest folder that exists."""
        return await to_thread.run_sync(self._find_problem)

    def _publish(self, target: Path, data: bytes) -> Artifact:
        part = _part_of(target)
        try:
            _make_folder(self.root)
            part.unlink(missing_ok=True)
            try:
                _write_durably(part, data)
                _move_into_place(part, target, data)
            finally:
                part.unlink(missing_ok=True)
            _sync_folder(self.root)
        except OSError as error:
            raise ArtifactError(f"Audio cannot be stored in {self.root}: {_explain(error)}.") from error
        return _describe(str(target), data)

    def _delete(self, names: list[str]) -> int:
        files = [self.root / name for name in names]
        try:
            count = sum(_remove(file) for file in [*files, *map(_part_of, files)])
            if count:
                _sync_folder(self.root)
        except OSError as error:
            raise ArtifactError(f"Audio cannot be removed from {self.root}: {_explain(error)}.") from error
        return count

    def _find_problem(self) -> str | None:
        try:
            folder = next(path for path in (self.root, *self.root.parents) if path.exists())
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")
            free = shutil.disk_usage(folder).free
        except OSError as error:
            return f"Audio cannot be stored in {self.root}: {_explain(error)}."
        if free < MIN_FREE_BYTES:
            return (
                f"The disk of {self.root} has {free / 2**20:.0f} MiB left; free at least {MIN_FREE_BYTES // 2**20} MiB."
            )
        return None


class MemoryArtifacts:
    """Audio in a dictionary from file name to content; for tests and benchmarks."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def publish(self, generation_id: str, attempt: int, extension: str, data: bytes) -> Artifact:
        """See ``Artifacts.publish``; nothing here is durable."""
        name = _file_name(generation_id, attempt, extension)
        if self.files.setdefault(name, data) != data:
            raise _name_is_taken(name)
        return _describe(f"memory:{name}", data)

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """See ``Artifacts.delete``."""
        found = [name for name in _file_names(generation_id, attempts) if name in self.files]
        for name in found:
            del self.files[name]
        return len(found)

    def holds(self, path: str) -> bool:
        """See ``Artifacts.holds``."""
        return path.startswith("memory:")

    async def find_problem(self) -> str | None:
        """Return ``None``: memory is always there."""
        return None


def _file_name(generation_id: str, attempt: int, extension: str) -> str:
    """Return the only name this attempt's file can have; refuses all that could name another place."""
    if not _ID.fullmatch(generation_id):
        raise InvalidRequestError(
            "generation_id", f"{generation_id!r} cannot name a file", "use 1 to 64 letters, digits, - and _"
        )
    if extension not in EXTENSIONS:
        raise InvalidRequestError("extension", f"{extension!r} is not known", f"use one of {', '.join(EXTENSIONS)}")
    return f"{generation_id}-{attempt:d}.{extension}"


def _file_names(generation_id: str, attempts: Iterable[int]) -> list[str]:
    return [_file_name(generation_id, attempt, extension) for attempt in attempts for extension in EXTENSIONS]


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def _make_folder(folder: Path) -> None:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _write_durably(part: Path, data: bytes) -> None:
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(part: Path, target: Path, data: bytes) -> None:
    """Give the part file its name; one that is taken is left as it is, and fine where it holds the same data."""
    try:
        _link(part, target)
    except FileExistsError:
        if target.read_bytes() != data:
            raise _name_is_taken(target.name) from None


def _link(part: Path, target: Path) -> None:
    try:
        os.link(part, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        _claim_and_rename(part, target)


def _claim_and_rename(part: Path, target: Path) -> None:
    """Move without hard links (exFAT, some network shares): the exclusive empty file is what makes the rename safe.

    The name goes from empty to whole in one step. A crash between the two leaves an empty file of an attempt that never
    completed, which ``delete`` removes.
    """
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        part.replace(target)
    except OSError:
        target.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(file: Path) -> bool:
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _describe(path: str, data: bytes) -> Artifact:
    return Artifact(path, len(data), hashlib.sha256(data).hexdigest())


def _name_is_taken(name: str) -> ArtifactError:
    return ArtifactError(f"{name} already holds other audio; it is left as it is.")


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
