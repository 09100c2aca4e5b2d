"""Audio in a folder: written to a part file, flushed to disk, then linked into place."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path

from anyio import to_thread, wrap_file

from dgx_music.artifacts.interface import (
    CHUNK_BYTES,
    PART,
    PREVIEWS,
    Artifact,
    StoredFile,
    check_held,
    check_range,
    describe,
    file_name,
    file_names,
    name_is_taken,
    parse_name,
    preview_folder,
    preview_name,
)
from dgx_music.errors import ArtifactError
from dgx_music.files import file_mode, flush, flush_folder, give_name, make_folders

MIN_FREE_BYTES = 100 * 2**20

_PROBE = ".dgx-music-"
_NO_LINKS = (
    "has no hard links: after a crash an empty file can be left of audio that was being stored"
)
_NO_FLUSH = "does not flush: the audio stored last can be lost when the power fails"

logger = logging.getLogger(__name__)
_told: set[tuple[Path, str]] = set()
"""What was said of which folder by this process."""


class LocalArtifacts:
    """Audio in one folder, made on the first publication; a private one is for its owner alone."""

    def __init__(self, root: Path, *, is_private: bool = True) -> None:
        self.root = root.absolute()
        self._is_private = is_private

    def __str__(self) -> str:
        return str(self.root)

    async def publish(
        self, generation_id: str, attempt: int, extension: str, data: bytes
    ) -> Artifact:
        """See ``Artifacts.publish``; the path is absolute.

        A cancelled scope waits until the thread has written.
        """
        target = self.root / file_name(generation_id, attempt, extension)
        return await to_thread.run_sync(self._publish, target, data)

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """See ``Artifacts.delete``."""
        attempts = [*attempts]
        names = file_names(generation_id, attempts)
        previews = [preview_folder(generation_id, attempt) for attempt in attempts]
        return await to_thread.run_sync(self._delete, names, previews)

    async def publish_preview(
        self, generation_id: str, attempt: int, number: int, data: bytes
    ) -> None:
        """See ``Artifacts.publish_preview``; a cancelled scope waits until the thread has written."""
        target = self.root / preview_name(generation_id, attempt, number)
        await to_thread.run_sync(self._publish_preview, target, data)

    async def read_preview(self, generation_id: str, attempt: int, number: int) -> bytes | None:
        """See ``Artifacts.read_preview``."""
        file = self.root / preview_name(generation_id, attempt, number)
        return await to_thread.run_sync(_read_if_there, file)

    async def delete_preview(self, generation_id: str, attempt: int) -> int:
        """See ``Artifacts.delete_preview``."""
        folder = preview_folder(generation_id, attempt)
        return await to_thread.run_sync(self._delete, [], [folder])

    def holds(self, path: str) -> bool:
        """See ``Artifacts.holds``."""
        place = Path(path).absolute()
        return place.parent == self.root and place.name != os.pardir

    async def exists(self, path: str) -> bool:
        """See ``Artifacts.exists``."""
        check_held(self, path)
        return await to_thread.run_sync(Path(path).is_file)

    async def stream(
        self, path: str, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """See ``Artifacts.stream``; a file deleted meanwhile is read to its end."""
        check_held(self, path)
        place, end = check_range(start, length)
        try:
            async with wrap_file(await to_thread.run_sync(_open_regular, Path(path))) as file:
                await file.seek(place)
                while chunk := await file.read(min(CHUNK_BYTES, end - place)):
                    place += len(chunk)
                    yield chunk
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {_explain(error)}.") from error

    async def link(self, path: str, seconds: float) -> None:
        """Return ``None``: a folder has no links that expire; its readers need the path only."""
        check_held(self, path)

    async def list_files(self) -> AsyncIterator[StoredFile]:
        """See ``Artifacts.list_files``; all are looked up before the first is yielded."""
        for file in await to_thread.run_sync(self._scan):
            yield file

    async def find_problem(self) -> str | None:
        """See ``Artifacts.find_problem``; writes a nameless file in the nearest folder."""
        return await to_thread.run_sync(self._find_problem)

    async def find_weakness(self) -> str | None:
        """Return one sentence on what the folder's file system cannot do, or ``None``.

        Audio can be stored all the same. This tries it in the nearest folder that exists, and
        leaves no trace. It does not look for what ``find_problem`` reports.
        """
        return await to_thread.run_sync(self._find_weakness)

    def _publish(self, target: Path, data: bytes) -> Artifact:
        part = _part_of(target)
        try:
            for made in make_folders(self.root, is_private=self._is_private):
                self._flush_folder(made.parent)
            part.unlink(missing_ok=True)
            try:
                self._write_durably(part, data)
                self._move_into_place(part, target, data)
            finally:
                part.unlink(missing_ok=True)
            self._flush_folder(self.root)
        except OSError as error:
            raise ArtifactError(
                f"Audio cannot be stored in {self.root}: {_explain(error)}."
            ) from error
        return describe(str(target), data)

    def _publish_preview(self, target: Path, data: bytes) -> None:
        part = _part_of(target)
        try:
            make_folders(target.parent, is_private=self._is_private)
            mode = file_mode(is_private=self._is_private)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with os.fdopen(os.open(part, flags, mode), "wb") as file:
                file.write(data)
            part.replace(target)
        except OSError as error:
            raise ArtifactError(
                f"A preview cannot be stored in {self.root}: {_explain(error)}."
            ) from error

    def _delete(self, names: list[str], previews: list[str]) -> int:
        files = [self.root / name for name in names]
        try:
            count = sum(_remove(file) for file in [*files, *map(_part_of, files)])
            count += sum(_remove_folder(self.root / preview) for preview in previews)
            if count:
                self._flush_folder(self.root)
        except OSError as error:
            raise ArtifactError(
                f"Audio cannot be removed from {self.root}: {_explain(error)}."
            ) from error
        return count

    def _scan(self) -> list[StoredFile]:
        try:
            with os.scandir(self.root) as entries:
                files = [file for entry in entries if (file := _look_at(entry)) is not None]
            return [*files, *_scan_previews(self.root / PREVIEWS)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ArtifactError(
                f"The audio in {self.root} cannot be listed: {_explain(error)}."
            ) from error

    def _find_problem(self) -> str | None:
        try:
            folder = next(path for path in (self.root, *self.root.parents) if path.exists())
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")
            disk = shutil.disk_usage(folder)
        except OSError as error:
            return f"Audio cannot be stored in {self.root}: {_explain(error)}."
        if disk.total and disk.free < MIN_FREE_BYTES:  # some file systems do not know their size
            least = MIN_FREE_BYTES // 2**20
            return f"The disk of {self.root} has {disk.free / 2**20:.0f} MiB left; free at least {least} MiB."
        return None

    def _find_weakness(self) -> str | None:
        found = []
        try:
            folder = next(path for path in (self.root, *self.root.parents) if path.exists())
            with tempfile.NamedTemporaryFile(prefix=_PROBE, dir=folder) as probe:
                if not _can_link(Path(probe.name)):
                    found.append(_NO_LINKS)
                if not (flush(probe.fileno()) and flush_folder(folder)):
                    found.append(_NO_FLUSH)
        except OSError:  # a problem, not a weakness
            return None
        return f"The file system of {self.root} {', and '.join(found)}." if found else None

    def _write_durably(self, part: Path, data: bytes) -> None:
        """Write a file that was not there before; a symlink counts as there."""
        mode = file_mode(is_private=self._is_private)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            if not flush(descriptor):
                self._tell(_NO_FLUSH)
        finally:
            os.close(descriptor)

    def _move_into_place(self, part: Path, target: Path, data: bytes) -> None:
        """Give the part file its name; a name that is taken must hold the same data, and stays."""
        try:
            # ``delete`` removes what a crash leaves.
            if not give_name(part, target, is_private=self._is_private):
                self._tell(_NO_LINKS)
        except FileExistsError:
            with _open_regular(target) as file:
                if file.read() != data:
                    raise name_is_taken(target.name) from None

    def _flush_folder(self, folder: Path) -> None:
        if not flush_folder(folder):
            self._tell(_NO_FLUSH)

    def _tell(self, weakness: str) -> None:
        if (self.root, weakness) not in _told:
            _told.add((self.root, weakness))
            logger.warning("output %s: its file system %s", self.root, weakness)


def _part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}{PART}")


def _can_link(file: Path) -> bool:
    other = file.with_name(f"{file.name}.link")
    try:
        os.link(file, other)
    except OSError:
        return False
    other.unlink()
    return True


def _open_regular(file: Path) -> BufferedReader:
    """Open a regular file for reading: a symlink may lead elsewhere, and a pipe blocks."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise OSError(error.errno, "it is a symbolic link") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return os.fdopen(descriptor, "rb")


def _remove(file: Path) -> bool:
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _remove_folder(folder: Path) -> int:
    """Remove a folder of files, but not what a link leads to; return how many there were."""
    if folder.is_symlink() or folder.parent.is_symlink():
        return 0
    try:
        with os.scandir(folder) as entries:
            files = [entry.path for entry in entries if not entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return 0
    count = sum(_remove(Path(file)) for file in files)
    with suppress(OSError):  # somebody else's folder is in it
        folder.rmdir()
    return count


def _read_if_there(file: Path) -> bytes | None:
    try:
        with _open_regular(file) as opened:
            return opened.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {_explain(error)}.") from error


def _scan_previews(root: Path) -> Iterator[StoredFile]:
    """Yield the parts of all previews; those of an attempt that ends meanwhile may be left out."""
    with suppress(FileNotFoundError), os.scandir(root) as folders:
        for folder in folders:
            if folder.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError), os.scandir(folder) as entries:
                    files = [_look_at(entry, f"{PREVIEWS}/{folder.name}/") for entry in entries]
                yield from (file for file in files if file is not None)


def _look_at(entry: os.DirEntry[str], prefix: str = "") -> StoredFile | None:
    """Return the file if it is one of ours; a file that has gone meanwhile is not."""
    named = parse_name(prefix + entry.name)
    if named is None or not entry.is_file(follow_symlinks=False):
        return None
    try:
        facts = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return StoredFile(
        *named,
        entry.path,
        facts.st_size,
        datetime.fromtimestamp(facts.st_mtime, UTC),
        is_preview=bool(prefix),
    )


def _explain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
