"""What became of the files of rows: deleted, moved, cut short, or on a disk not mounted."""

from __future__ import annotations

import stat
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anyio import to_thread

from dgx_music.artifacts.output import open_place_of
from dgx_music.errors import ArtifactError, ConfigurationError


class FileState(NamedTuple):
    """What is known of a row's file; ``None`` if that cannot be found out from here."""

    is_missing: bool | None
    is_damaged: bool | None = None
    damage: str = ""
    """Half a sentence, such as "is 1,000 bytes and not 64,044"; empty if it is not damaged."""


_UNKNOWN = FileState(None)


def can_be_looked_for(path: str) -> bool:
    """Return ``False`` for a path relative to a folder that is not known here."""
    return "://" in path or Path(path).is_absolute()


async def look_at_file(path: str, size_bytes: int | None) -> FileState:
    """Return what became of a row's file of this size; does not ask for the size of an object."""
    if not can_be_looked_for(path):
        return _UNKNOWN
    if "://" not in path:
        return await to_thread.run_sync(_look_at_local, path, size_bytes)
    try:
        return FileState(is_missing=not await open_place_of(path).exists(path))
    except (ArtifactError, ConfigurationError):
        return _UNKNOWN


class FileInspection:
    """Looks at many: a folder is asked for each file, an object store for its whole list, once."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, int]] = {}

    async def look_at(self, files: Iterable[tuple[str, int | None]]) -> dict[str, FileState]:
        """Return what became of each file, given by path and size.

        Raises ``ArtifactError``, and what ``open_output`` raises.
        """
        sizes = dict(files)
        remote: dict[str, list[str]] = defaultdict(list)
        for path in sizes:
            if "://" in path:
                remote[path.rpartition("/")[0]].append(path)
        local = [path for path in sizes if "://" not in path and can_be_looked_for(path)]
        states = dict.fromkeys(sizes, _UNKNOWN)
        states |= await to_thread.run_sync(
            lambda: {path: _look_at_local(path, sizes[path]) for path in local}
        )
        for place, named in remote.items():
            found = await self._list(place, named[0])
            states |= {path: _compare(found.get(path), sizes[path]) for path in named}
        return states

    async def _list(self, place: str, path: str) -> dict[str, int]:
        if place not in self._listed:
            self._listed[place] = {
                file.path: file.size_bytes async for file in open_place_of(path).list_files()
            }
        return self._listed[place]


def _look_at_local(path: str, size_bytes: int | None) -> FileState:
    try:
        facts = Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return FileState(is_missing=True)
    except OSError:  # it may be there, for others
        return _UNKNOWN
    if not stat.S_ISREG(facts.st_mode):
        return FileState(is_missing=False, is_damaged=True, damage="is no regular file")
    return _compare(facts.st_size, size_bytes)


def _compare(found_bytes: int | None, size_bytes: int | None) -> FileState:
    if found_bytes is None:
        return FileState(is_missing=True)
    if size_bytes is None:
        return FileState(is_missing=False)
    if found_bytes == size_bytes:
        return FileState(is_missing=False, is_damaged=False)
    return FileState(
        is_missing=False, is_damaged=True, damage=f"is {found_bytes:,} bytes and not {size_bytes:,}"
    )
