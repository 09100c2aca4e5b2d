"""Audio in this process's memory, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import UTC, datetime

from dgx_music.artifacts.interface import (
    Artifact,
    StoredFile,
    check_held,
    check_range,
    describe,
    file_name,
    file_names,
    is_preview,
    name_is_taken,
    parse_name,
    preview_folder,
    preview_name,
)
from dgx_music.errors import ArtifactError

_SCHEME = "memory:"


class MemoryArtifacts:
    """Audio in a dictionary from file name to content, with the times of publication."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.modified_at: dict[str, datetime] = {}
        self._previews: dict[str, set[str]] = {}
        """The names of an attempt's preview, by its folder."""

    def __str__(self) -> str:
        return "memory"

    async def publish(
        self, generation_id: str, attempt: int, extension: str, data: bytes
    ) -> Artifact:
        """See ``Artifacts.publish``; nothing here is durable."""
        name = file_name(generation_id, attempt, extension)
        if self.files.setdefault(name, data) != data:
            raise name_is_taken(name)
        self.modified_at.setdefault(name, datetime.now(UTC))
        return describe(f"{_SCHEME}{name}", data)

    async def delete(self, generation_id: str, attempts: Iterable[int]) -> int:
        """See ``Artifacts.delete``."""
        attempts = [*attempts]
        found = [name for name in file_names(generation_id, attempts) if name in self.files]
        for name in found:
            del self.files[name], self.modified_at[name]
        parts = [await self.delete_preview(generation_id, attempt) for attempt in attempts]
        return len(found) + sum(parts)

    async def publish_preview(
        self, generation_id: str, attempt: int, number: int, data: bytes
    ) -> None:
        """See ``Artifacts.publish_preview``."""
        name = preview_name(generation_id, attempt, number)
        self.files[name], self.modified_at[name] = data, datetime.now(UTC)
        self._previews.setdefault(preview_folder(generation_id, attempt), set()).add(name)

    async def read_preview(self, generation_id: str, attempt: int, number: int) -> bytes | None:
        """See ``Artifacts.read_preview``."""
        return self.files.get(preview_name(generation_id, attempt, number))

    async def delete_preview(self, generation_id: str, attempt: int) -> int:
        """See ``Artifacts.delete_preview``."""
        found = self._previews.pop(preview_folder(generation_id, attempt), set())
        for name in found:
            del self.files[name], self.modified_at[name]
        return len(found)

    def holds(self, path: str) -> bool:
        """See ``Artifacts.holds``."""
        return path.startswith(_SCHEME) and "/" not in path

    async def exists(self, path: str) -> bool:
        """See ``Artifacts.exists``."""
        check_held(self, path)
        return path.removeprefix(_SCHEME) in self.files

    async def stream(
        self, path: str, start: int = 0, length: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """See ``Artifacts.stream``; one chunk."""
        check_held(self, path)
        start, end = check_range(start, length)
        data = self.files.get(path.removeprefix(_SCHEME))
        if data is None:
            raise ArtifactError(f"{path} is not there.")
        yield data[start:end]

    async def link(self, path: str, seconds: float) -> None:
        """Return ``None``: no other process can read this memory."""
        check_held(self, path)

    async def list_files(self) -> AsyncIterator[StoredFile]:
        """See ``Artifacts.list_files``."""
        for name, data in [*self.files.items()]:
            if (named := parse_name(name)) is not None:
                path, changed_at = f"{_SCHEME}{name}", self.modified_at[name]
                yield StoredFile(*named, path, len(data), changed_at, is_preview=is_preview(name))

    async def find_problem(self) -> str | None:
        """Return ``None``: memory is always there."""
        return None
