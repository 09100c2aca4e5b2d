"""Uploads: audio that is sent first, and named by its id in requests within a day."""

from __future__ import annotations

import io
import secrets
from collections.abc import Collection
from functools import partial
from typing import BinaryIO

import anyio.to_thread
from anyio import CapacityLimiter

from dgx_music.storage import clips, uploads
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import Upload

_PREFIX = "up_"
_RANDOM_BYTES = 24
_SWEPT_COUNT = 100
"""How many expired uploads each new one deletes at most, so that they do not gather."""


async def add_upload(file: BinaryIO, *, tenant: str | None, decodes: CapacityLimiter) -> Upload:
    """Store the audio of a file for a day, and return the upload's row.

    It is decoded in a thread, when ``decodes`` has room. Raises ``UnreadableAudioError`` if it is no
    audio that can be read, and ``InvalidRequestError`` if it is too short or too long.
    """
    values, contents = await anyio.to_thread.run_sync(_read, file, limiter=decodes)
    values |= {"id": _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES), "tenant": tenant or ""}
    database = await ensure_database()
    await database.transact(partial(uploads.prune_uploads, limit=_SWEPT_COUNT))
    return await database.transact(partial(uploads.add_upload, values=values, clips=contents))


async def add_part(
    upload: Upload, start: float, end: float, *, channels: int | None, decodes: CapacityLimiter
) -> Upload:
    """Store the part of an upload between these seconds as a new upload, and return its row.

    The part must lie in what is stored: in the first 30 s, and with one channel in the first 300 s.
    ``channels`` of ``None`` keeps those of the file, 2 at most.
    """
    sha256 = upload.clip_sha256(channels)
    read = partial(clips.read_clips, sha256s=[sha256])
    data = (await (await ensure_database()).transact(read, read_only=True))[sha256]
    part = await anyio.to_thread.run_sync(_cut, data, start, end, limiter=decodes)
    return await add_upload(io.BytesIO(part), tenant=upload.tenant or None, decodes=decodes)


async def find_uploads(ids: Collection[str], *, tenant: str | None) -> dict[str, Upload]:
    """Return those of these uploads that can be used, by id; of one tenant if it is given."""
    if not ids:
        return {}
    find = partial(uploads.find_uploads, ids=ids, tenant=tenant)
    return await (await ensure_database()).transact(find, read_only=True)


def _cut(data: bytes, start: float, end: float) -> bytes:
    from dgx_music.audio.clips import cut  # imports NumPy

    return cut(data, start, end)


def _read(file: BinaryIO) -> tuple[dict[str, object], dict[str, tuple[bytes, float]]]:
    """Return the columns of the upload, and its clips as they are stored."""
    from dgx_music.audio.clips import read_forms  # imports NumPy

    file.seek(0)
    forms = read_forms("file", file.read())
    values = {
        "mono_sha256": forms.mono.sha256,
        "stereo_sha256": forms.stereo.sha256,
        "source_sha256": forms.mono.source_sha256,
        "source_channels": forms.source_channels,
        "duration_seconds": forms.duration_seconds,
    }
    both = (forms.mono, forms.stereo)
    return values, {each.sha256: (each.data, each.duration_seconds) for each in both}
