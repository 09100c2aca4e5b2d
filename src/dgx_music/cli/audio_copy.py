"""``--out`` of ``dgx-music enqueue``: the audio of one generation, in a file of this name."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from dgx_music.audio.formats import find_rate_problem
from dgx_music.cli.output import tell
from dgx_music.client.content import check_convertible, content_of, path_of, stored_format
from dgx_music.client.names import format_of
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError, InvalidRequestError
from dgx_music.files import file_mode
from dgx_music.storage import Generation
from dgx_music.validation import AudioFormat


def check_holds(out: Path, sample_rate: int) -> None:
    """Refuse a file whose suffix is that of a format that cannot hold this rate in Hz."""
    audio_format = format_of(out.suffix)
    problem = audio_format and find_rate_problem(audio_format, sample_rate)
    if problem:
        what = f"ends with {out.suffix}, which {problem[0]}"
        raise InvalidRequestError("--out", what, problem[1])


def copy_audio(row: Generation, out: Path, *, force: bool) -> None:
    """Write the row's audio to a file, in the format of its suffix; without one, as it is stored.

    Raises ``ArtifactError`` if it cannot be read or written.
    """
    source, wanted = row.file_path or "", format_of(out.suffix)
    try:
        asyncio.run(_copy(row, wanted, out, "wb" if force else "xb"))
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ArtifactError(f"{source} cannot be copied to {out}: {why}.") from error
    stored = stored_format(row)
    tell(f"{'Copied' if wanted in (None, stored) else 'Converted'} to {out}.")
    if wanted is None:
        tell(f"Note: {out.name} holds {stored.upper()} audio, as it is stored.")


async def _copy(
    row: Generation, wanted: AudioFormat | None, out: Path, mode: Literal["wb", "xb"]
) -> None:
    """Copy from the folder or object store; the file is created when the first bytes are there."""
    path_of(row)
    if wanted is not None:
        check_convertible(row, wanted)
    async with aclosing(content_of(row, wanted)) as chunks:
        first = await anext(chunks, b"")
        access = file_mode(is_private=load_settings().is_private)
        opener = partial(os.open, mode=access)
        with open(out, mode, opener=opener) as target, _removed_on_failure(out):  # noqa: ASYNC230 - nothing else runs here
            target.write(first)
            async for chunk in chunks:
                target.write(chunk)


@contextmanager
def _removed_on_failure(file: Path) -> Iterator[None]:
    """Remove a half-written file after an error, but never a device or a pipe."""
    try:
        yield
    except BaseException:
        if file.is_file():
            file.unlink()
        raise
