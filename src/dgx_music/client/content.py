"""The audio of a completed row: where it is, its bytes, in which format, and what names it.

What is read here is checked: audio that is not what was stored raises ``ArtifactError``.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import get_args

from anyio import to_thread

from dgx_music import validation
from dgx_music.artifacts import open_place_of
from dgx_music.artifacts.interface import parse_name
from dgx_music.audio.encodings import Codec as Codec
from dgx_music.audio.encodings import Encoding as Encoding
from dgx_music.audio.formats import find_rate_problem
from dgx_music.audio.tags import UNTITLED, Tags, tags_of
from dgx_music.catalog import short_name
from dgx_music.client.names import first_words
from dgx_music.client.transactions import transact
from dgx_music.errors import (
    ArtifactError,
    GenerationNotFoundError,
    InvalidRequestError,
    NoAudioError,
)
from dgx_music.storage import repository
from dgx_music.storage.models import Generation
from dgx_music.storage.queue import AUDIO_KEY
from dgx_music.validation import AudioFormat

_SHORT_ID = 8


async def read_completed_row(generation_id: str) -> Generation:
    """Return the row of a completed generation; raises what ``stream_audio`` raises."""
    validation.check_name("generation_id", generation_id)
    read = partial(repository.get_generation, generation_id=generation_id)
    row = await transact(None, read, read_only=True)
    if row is None:
        raise GenerationNotFoundError(generation_id)
    path_of(row)
    return row


def path_of(row: Generation) -> str:
    """Return the place of the row's audio; raises ``NoAudioError`` or ``ArtifactError``.

    A row that was completed by hand may name any file: only what a worker made is ever read.
    """
    if not row.is_complete:
        raise NoAudioError(row.id, row.status)
    if not row.file_path:
        raise ArtifactError(f"Generation {row.id} is completed, but its row names no file.")
    if row.sha256 is None or parse_name(row.file_path.rpartition("/")[2]) is None:
        problem = f"no worker made its file {row.file_path}"
        raise ArtifactError(f"Generation {row.id} is completed, but {problem}.")
    return row.file_path


def stream_row(
    row: Generation, start: int = 0, length: int | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield the stored bytes of a completed row; raises what ``stream_audio`` raises."""
    path = path_of(row)
    return open_place_of(path).stream(path, start, length)


async def content_of(
    row: Generation, audio_format: AudioFormat | None = None
) -> AsyncGenerator[bytes, None]:
    """Yield the audio of a completed row, in this format if it is another than the stored one.

    Raises ``ArtifactError``, at the end, if it is not what was stored.
    """
    async with aclosing(_checked(row)) as chunks:
        if audio_format in (None, stored_format(row)):
            async for chunk in chunks:
                yield chunk
            return
        data = b"".join([chunk async for chunk in chunks])
    yield await to_thread.run_sync(_convert, row, data, audio_format)


def values_of(row: Generation) -> dict[str, str]:
    """Return what a row gives for each placeholder of a pattern; empty if it has nothing."""
    facts = _facts_of(row)
    seed = (row.sampling or {}).get("seed")
    made_at = row.completed_at or row.created_at
    values = {
        "title": (row.title or "").strip() or first_words(row.prompt) or UNTITLED,
        "prompt": row.prompt,
        "bpm": None if row.bpm is None else round(row.bpm),
        "key": row.musical_key,
        "seed": facts.get("seed") if seed is None else seed,
        "take": row.take,
        "id": row.id,
        "short_id": row.id[-_SHORT_ID:],
        "date": made_at.date().isoformat(),
        "model": short_name(row.model_name),
    }
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _facts_of(row: Generation) -> dict[str, object]:
    facts = row.get_metadata().get(AUDIO_KEY)
    return facts if isinstance(facts, dict) else {}


def stored_format(row: Generation) -> str:
    """Return the format of a completed row's file, by its suffix."""
    return Path(row.file_path or "").suffix.removeprefix(".").lower()


def writable_formats() -> list[AudioFormat]:
    """Return the formats that this machine can write."""
    from dgx_music.audio.files import is_writable  # imports NumPy

    return [each for each in get_args(AudioFormat) if is_writable(each)]


def check_convertible(row: Generation, audio_format: AudioFormat) -> None:
    """Raise ``InvalidRequestError`` if the row's audio cannot be had in this format here."""
    if audio_format == stored_format(row):
        return
    from dgx_music.audio.files import is_writable  # imports NumPy

    problem = find_rate_problem(audio_format, row.sample_rate)
    if problem is None and not is_writable(audio_format):
        problem = "cannot be written by this machine's libsndfile", "update it, or use wav"
    if problem is not None:
        raise InvalidRequestError("format", f"{audio_format!r} {problem[0]}", problem[1])


async def encoded_content(row: Generation, encoding: Encoding) -> bytes:
    """Return the audio of a completed row in this encoding; raises what ``content_of`` raises."""
    data = b"".join([chunk async for chunk in content_of(row)])
    return await to_thread.run_sync(_reencode, row, data, encoding)


def _convert(row: Generation, data: bytes, audio_format: AudioFormat) -> bytes:
    from dgx_music.audio.transcoding import transcode  # imports NumPy

    return transcode(data, stored_format(row), audio_format, _tags_of(row))


def _reencode(row: Generation, data: bytes, encoding: Encoding) -> bytes:
    from dgx_music.audio.transcoding import reencode  # imports NumPy

    return reencode(data, stored_format(row), encoding, _tags_of(row))


def _tags_of(row: Generation) -> Tags:
    return tags_of(
        generation_id=row.id,
        prompt=row.prompt,
        model_name=row.model_name,
        title=row.title,
        made_at=row.completed_at or row.created_at,
        facts=_facts_of(row),
    )


async def _checked(row: Generation) -> AsyncGenerator[bytes, None]:
    """Yield the stored bytes; raises ``ArtifactError`` at the end if they are not the row's."""
    digest = hashlib.sha256()
    async with aclosing(stream_row(row)) as chunks:
        async for chunk in chunks:
            await to_thread.run_sync(digest.update, chunk)
            yield chunk
    if digest.hexdigest() != row.sha256:
        raise ArtifactError(f"{row.file_path} is damaged: its hash is not that of its row.")
