"""Files that rows speak of and that are no longer there: deleted, moved, or on a disk that is not mounted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from anyio import to_thread

from dgx_music.artifacts.output import open_place_of
from dgx_music.errors import ArtifactError, ConfigurationError


def can_be_looked_for(path: str) -> bool:
    """Return False for a path that only its creator can follow: it is relative to a folder that nobody has noted."""
    return "://" in path or Path(path).is_absolute()


async def is_missing(path: str) -> bool | None:
    """Return whether the file that a row names is gone; ``None`` where that cannot be found out from here."""
    if not can_be_looked_for(path):
        return None
    try:
        return not await open_place_of(path).exists(path)
    except (ArtifactError, ConfigurationError):
        return None


class MissingFiles:
    """Finds those of many: a folder is asked for each file, an object store for its whole list, once."""

    def __init__(self) -> None:
        self._listed: dict[str, set[str]] = {}

    async def among(self, paths: Iterable[str]) -> list[str]:
        """Return which of these are not there; raises what ``open_output`` raises, and ``ArtifactError``."""
        known = [path for path in paths if can_be_looked_for(path)]
        remote: dict[str, list[str]] = defaultdict(list)
        for path in known:
            if "://" in path:
                remote[path.rpartition("/")[0]].append(path)
        local = [path for path in known if "://" not in path]
        missing = await to_thread.run_sync(lambda: [path for path in local if not Path(path).is_file()])
        for place, named in remote.items():
            listed = await self._list(place, named[0])
            missing += [path for path in named if path not in listed]
        return missing

    async def _list(self, place: str, path: str) -> set[str]:
        if place not in self._listed:
            self._listed[place] = {file.path async for file in open_place_of(path).list_files()}
        return self._listed[place]
