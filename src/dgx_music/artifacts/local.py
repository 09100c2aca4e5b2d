"""Audio in a folder: written to a part file, flushed to disk, then linked into place."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from pathlib import Path

from anyio import open_file, to_thread

from dgx_music.artifacts.interface import (
    CHUNK_BYTES,
    PART,
    Artifact,
    StoredFile,
    check_held,
    describe,
    file_name,
    file_names,
    name_is_taken,
    parse_name,
)
from dgx_music.errors import ArtifactError

MIN_FREE_BYTES = 100 * 2**20

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS}


class LocalArtifacts:
    """Audio in one folder of a file system, made on the first publication."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def __str__(self) -> str:
        return str(self.root)

    async def publish(self, generation_id: str, attempt: int, extension: str, data: bytes) -> Artifact:
        """See ``Artifacts.publish``; the path is absolute. A cancelled scope waits for the thread to end its write."""
        target = self.root / file_name(generation_id, attempt, extension)
        return await to_thread.run_sync(self._publish, target, data)

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """See ``Artifacts.delete``."""
        names = file_names(generation_id, attempts)
        return await to_thread.run_sync(self._delete, names)

    def holds(self, path: str) -> bool:
        """See ``Artifacts.holds``."""
        return Path(path).absolute().parent == self.root

    async def exists(self, path: str) -> bool:
        """See ``Artifacts.exists``."""
        check_held(self, path)
        return await to_thread.run_sync(Path(path).is_file)

    async def stream(self, path: str) -> AsyncIterator[bytes]:
        """See ``Artifacts.stream``; a file that is deleted meanwhile is read to its end."""
        check_held(self, path)
        try:
            async with await open_file(path, "rb") as file:
                while chunk := await file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {_explain(error)}.") from error

    async def link(self, path: str, seconds: float) -> None:
        """Return ``None``: a folder has no links that end, and who can read it needs only the path."""
        check_held(self, path)

    async def list_files(self) -> AsyncIterator[StoredFile]:
        """See ``Artifacts.list_files``; all are looked up before the first is yielded."""
        for file in await to_thread.run_sync(self._scan):
            yield file

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
        return describe(str(target), data)

    def _delete(self, names: list[str]) -> int:
        files = [self.root / name for name in names]
        try:
            count = sum(_remove(file) for file in [*files, *map(_part_of, files)])
            if count:
                _sync_folder(self.root)
        except OSError as error:
            raise ArtifactError(f"Audio cannot be removed from {self.root}: {_explain(error)}.") from error
        return count

    def _scan(self) -> list[StoredFile]:
        try:
            with os.scandir(self.root) as entries:
                return [file for entry in entries if (file := _look_at(entry)) is not None]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ArtifactError(f"The audio in {self.root} cannot be listed: {_explain(error)}.") from error

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


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}{PART}")


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
            raise name_is_taken(target.name) from None


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


def _look_at(entry: os.DirEntry[str]) -> StoredFile | None:
    """Return the file where it is one of ours; one that has gone meanwhile is not."""
    named = parse_name(entry.name)
    if named is None or not entry.is_file(follow_symlinks=False):
        return None
    try:
        facts = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return StoredFile(*named, entry.path, facts.st_size, datetime.fromtimestamp(facts.st_mtime, UTC))


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
