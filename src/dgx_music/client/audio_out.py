"""Finished audio on its way out: streamed, or saved under a name that says what it is.

A file gets its final name when it is whole, and never replaces another one unasked.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from anyio import to_thread

from dgx_music import validation
from dgx_music.client.content import (
    check_convertible,
    content_of,
    path_of,
    read_completed_row,
    stored_format,
    stream_row,
    values_of,
)
from dgx_music.client.names import DistinctNames, Pattern
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError, InvalidRequestError
from dgx_music.files import file_mode, flush, flush_folder, give_name, make_folders
from dgx_music.storage.connection.sessions import finish
from dgx_music.storage.models import Generation

T = TypeVar("T")


async def save_audio(
    generation_id: str,
    path_or_pattern: str | os.PathLike[str],
    *,
    audio_format: str | None = None,
    force: bool = False,
) -> Path:
    """Write the audio of a completed generation to a file, and return the file's absolute path.

    The name may have placeholders such as ``{title}`` and ``{bpm}``; for a folder the default
    pattern is used in it. Missing folders are made. ``audio_format``, or the suffix of the name,
    converts the audio; else the file has the bytes that are stored.

    Raises ``NoAudioError`` unless the generation is completed, ``ArtifactError`` if its audio is
    not there or cannot be written, and ``InvalidRequestError`` for a pattern or a format that is
    unacceptable, and for a name that is taken, unless ``force`` is given.
    """
    saving = Saving(path_or_pattern, audio_format=audio_format, force=force)
    return (await saving.save(await read_completed_row(generation_id))).path


async def stream_audio(
    generation_id: str,
    start: int = 0,
    length: int | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield the stored audio of a completed generation in chunks, from wherever it lives.

    With ``start`` and ``length`` only these bytes are read, and fewer if the file ends before.
    Raises ``GenerationNotFoundError``, ``NoAudioError`` unless the generation is completed, and
    ``ArtifactError`` if its audio is not there or no worker made it.
    """
    async with aclosing(
        stream_row(await read_completed_row(generation_id), start, length)
    ) as chunks:
        async for chunk in chunks:
            yield chunk


@dataclass(frozen=True)
class Saved:
    """A file that was written: its absolute path, its format and its size."""

    path: Path
    audio_format: str
    size_bytes: int


class Saving:
    """Writes the files of one call: by one pattern, in one format, under names that differ."""

    def __init__(
        self,
        path_or_pattern: str | os.PathLike[str],
        *,
        audio_format: str | None = None,
        force: bool = False,
        field: str = "path_or_pattern",
    ) -> None:
        """Check the pattern and the format; raises ``InvalidRequestError``."""
        pattern = Pattern(_in_folder(os.fspath(path_or_pattern)), field)
        wanted = audio_format and validation.check_audio_format(audio_format)
        if wanted and pattern.audio_format and wanted != pattern.audio_format:
            problem = f"ends with .{pattern.audio_format}, and the format is {wanted}"
            raise InvalidRequestError(field, problem, "leave one of them out")
        self._audio_format = wanted or pattern.audio_format
        self._names = DistinctNames(pattern)
        self._is_forced = force
        self._field = field
        self._is_private = load_settings().is_private

    async def save(self, row: Generation) -> Saved:
        """Write the audio of this row, and return its file; raises what ``save_audio`` raises."""
        path_of(row)
        audio_format = self._audio_format
        if audio_format is not None:
            check_convertible(row, audio_format)
        suffix = audio_format or stored_format(row)
        target = Path.cwd() / self._names.path_for(values_of(row), f".{suffix}")
        try:
            if not self._is_forced:
                await to_thread.run_sync(_check_free, target)
            async with aclosing(content_of(row, audio_format)) as chunks:
                size = await self._write(target, chunks)
        except FileExistsError:
            problem = f"is {target}, which exists already"
            remedy = "choose another name, or force it to be replaced"
            raise InvalidRequestError(self._field, problem, remedy) from None
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ArtifactError(f"{target} cannot be written: {why}.") from error
        return Saved(target, suffix, size)

    async def _write(self, target: Path, chunks: AsyncIterator[bytes]) -> int:
        """Write a file beside the target, give it the target's name, and return its size."""
        part = target.with_name(f".{secrets.token_hex(8)}.part")
        size = 0
        with ExitStack() as stack:
            file = await _in_thread(self._open, part, stack)
            async for chunk in chunks:
                size += await _in_thread(file.write, chunk)
            await _in_thread(_close, file)
            await _in_thread(self._give_name, part, target)
        return size

    def _open(self, part: Path, stack: ExitStack) -> BinaryIO:
        """Open a new file that the stack closes and deletes, also if the caller is cancelled."""
        make_folders(part.parent, is_private=self._is_private)
        mode = file_mode(is_private=self._is_private)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        stack.callback(part.unlink, missing_ok=True)
        return stack.enter_context(os.fdopen(descriptor, "wb"))

    def _give_name(self, part: Path, target: Path) -> None:
        if self._is_forced:
            part.replace(target)
        else:
            give_name(part, target, is_private=self._is_private)
        flush_folder(target.parent)


def _in_folder(text: str) -> str:
    """Return the pattern; a folder that exists gets a slash at its end."""
    return f"{text}/" if os.path.isdir(text) else text  # noqa: PTH112 - pathlib raises


def _check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError


def _close(file: BinaryIO) -> None:
    """Flush the file to disk, and close it."""
    with file:
        file.flush()
        flush(file.fileno())


async def _in_thread(work: Callable[..., T], *args: Any) -> T:
    """Do the work in a thread, to its end even if the caller is cancelled.

    A cancelled task leaves a thread to itself: it would use a file that is closed by then.
    """
    return await finish(to_thread.run_sync(work, *args))
