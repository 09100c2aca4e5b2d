"""``dgx-music watch --out`` and ``--play``: a generation is heard while it is made."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import anyio
import typer
from anyio import to_thread

from dgx_music.cli.output import fail, tell
from dgx_music.cli.play import PLAYERS
from dgx_music.errors import ArtifactError, InvalidRequestError, NoAudioError

if TYPE_CHECKING:
    from dgx_music.storage import Generation

STDOUT = "-"
_STREAMING = ("ffplay", "mpv", "aplay")
"""The players that can play what arrives on their stdin."""
_NO_PLAYER = "No player is installed that can play a stream: ffplay, mpv or aplay is needed."


class Sink(Protocol):
    """Where the audio goes: a WAV file as a stream."""

    async def begin(self, header: bytes) -> None:
        """Begin at the beginning; called again if another attempt begins."""

    async def write(self, pcm: bytes) -> None:
        """Take the next samples."""


async def hear(row: Generation, out: str | None, follow: Callable[[], Awaitable[bool]]) -> bool:
    """Send the audio to ``out``, or without it to a player, while ``follow`` shows the progress.

    Returns what ``follow`` returns, after the audio has ended: True if the row is completed.
    """
    async with opened_sink(out) as sink, anyio.create_task_group() as tasks:
        tasks.start_soon(_copy, row, sink, name="audio")
        is_complete = await follow()
    return is_complete  # noqa: RET504 - the audio may take longer


async def _copy(row: Generation, sink: Sink) -> None:
    """Write the audio of the row to the sink while it is made; ends with the generation."""
    from dgx_music.client.listening import watch_audio, wav_header

    with suppress(NoAudioError):  # whoever follows the row says how it ended
        async with aclosing(watch_audio(row.id)) as parts:
            async for part in parts:
                if part.start == 0:
                    await sink.begin(wav_header(row))
                await sink.write(part.pcm)


@asynccontextmanager
async def opened_sink(out: str | None) -> AsyncIterator[Sink]:
    """Give the place that the options name: stdout, a new file, or without ``out`` a player."""
    if out is None:
        async with _played() as player:
            yield player
    elif out == STDOUT:
        if sys.stdout.isatty():
            problem = "is stdout, which is a terminal"
            raise InvalidRequestError("--out", problem, "send it to a file, or use --play")
        yield _Stdout()
    else:
        with _create(Path(out)) as file:
            yield _File(file)


def _tell_restart() -> None:
    tell("Another attempt begins: its audio follows from its beginning.")


class _Stdout:
    def __init__(self) -> None:
        self._is_begun = False

    async def begin(self, header: bytes) -> None:
        """Write the header; a stream cannot be taken back, so the audio follows once more."""
        if self._is_begun:
            _tell_restart()
            return
        self._is_begun = True
        await self.write(header)

    async def write(self, pcm: bytes) -> None:
        """Write the samples; a slow reader stops nothing but this."""
        await to_thread.run_sync(self._write, pcm, abandon_on_cancel=True)

    def _write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


class _File:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def begin(self, header: bytes) -> None:
        """Write the header at the beginning; what an earlier attempt made is dropped."""
        if self._file.tell():
            _tell_restart()
        self._file.seek(0)
        self._file.truncate()
        await self.write(header)

    async def write(self, pcm: bytes) -> None:
        """Write the samples so that another program can read them."""
        try:
            self._file.write(pcm)
            self._file.flush()
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise ArtifactError(f"{self._file.name} cannot be written: {why}.") from error


@contextmanager
def _create(path: Path) -> Iterator[BinaryIO]:
    """Open a new file; if nothing is written to it, it is gone at the end."""
    with _open_new(path) as file:
        try:
            yield file
        finally:
            if not file.tell():
                path.unlink(missing_ok=True)


def _open_new(path: Path) -> BinaryIO:
    try:
        return path.open("xb")
    except FileExistsError:
        problem = f"is {path}, which exists already"
        raise InvalidRequestError("--out", problem, "choose another name") from None
    except OSError as error:
        problem = f"is {path}, which cannot be made ({(error.strerror or str(error)).lower()})"
        raise InvalidRequestError("--out", problem, "choose another name") from None


class _Player:
    """A program that plays what it reads; each attempt has its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: asyncio.subprocess.Process | None = None

    async def begin(self, header: bytes) -> None:
        """Start to play; what an earlier attempt made is not played to its end."""
        if self.process is not None:
            _tell_restart()
            await self.stop()
        command = self.name, *PLAYERS[self.name], "-"
        pipe = asyncio.subprocess.PIPE
        self.process = await asyncio.create_subprocess_exec(*command, stdin=pipe)
        await self.write(header)

    async def write(self, pcm: bytes) -> None:
        """Give the player more; waits until it has room for it."""
        stdin = self.process.stdin if self.process else None
        if stdin is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # it was closed by its user
                stdin.write(pcm)
                await stdin.drain()

    async def finish(self) -> int:
        """Let it play to the end; return its exit code, 0 if nothing was to be played."""
        if self.process is None:
            return 0
        if self.process.stdin is not None:
            self.process.stdin.close()
        return await self.process.wait()

    async def stop(self) -> None:
        """End it now."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            with anyio.CancelScope(shield=True):
                await self.process.wait()


@asynccontextmanager
async def _played() -> AsyncIterator[Sink]:
    name = next((name for name in _STREAMING if shutil.which(name)), None)
    if name is None:
        raise typer.Exit(fail(_NO_PLAYER, 1))
    player = _Player(name)
    try:
        yield player
        code = await player.finish()
    finally:
        await player.stop()
    if code != os.EX_OK:
        raise typer.Exit(fail(f"{name} could not play it; it ended with {code}.", 1))
