"""Listening to a generation while it is made: its preview, and in the end its finished audio."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import anyio
from anyio import to_thread

from dgx_music import validation
from dgx_music.artifacts import Artifacts, open_output
from dgx_music.artifacts.interface import parse_name
from dgx_music.client.content import content_of, path_of, stored_format
from dgx_music.client.generations import read_generation
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError, NoAudioError
from dgx_music.statuses import PROCESSING
from dgx_music.storage.connection.changes import Topic
from dgx_music.storage.database import ensure_database
from dgx_music.storage.models import Generation

_LOOK_SECONDS = 0.5
_SAMPLE_BYTES = 2
_BLOCK = 2**16
_decoding = anyio.CapacityLimiter(2)
"""A decoded file of five minutes takes some 200 MB, and many listeners may wait for one end."""


@dataclass(frozen=True)
class AudioPart:
    """A part of a generation's audio; each follows the one before, unless ``start`` is 0."""

    attempt: int
    """Which attempt made it: if this changes, the audio begins again."""
    start: int
    """The place of its first sample in each channel; 0 at the beginning."""
    pcm: bytes
    """16-bit samples, little-endian, the channels of each moment side by side."""
    sample_rate: int
    """In Hz."""
    channels: int


async def watch_audio(
    generation_id: str, *, artifacts: Artifacts | None = None
) -> AsyncGenerator[AudioPart, None]:
    """Yield the audio of a generation from its beginning to its end, while it is made.

    What the worker has not yet finished comes from its preview in ``artifacts``
    (``DGX_MUSIC_OUTPUT`` if not given), the rest from the finished file. An engine that makes all
    its audio at once has no preview: then all comes at the end. A new attempt begins again with
    ``start`` 0. The preview is as loud as the model made it; the rest is brought to that level.

    Raises ``GenerationNotFoundError``, ``NoAudioError`` if the generation fails or is cancelled,
    and ``ArtifactError`` if its audio cannot be read.
    """
    validation.check_name("generation_id", generation_id)
    place = artifacts or open_output(load_settings().output)
    async with aclosing(_watch(generation_id, None, place)) as parts:
        async for part in parts:
            yield part


async def watch_attempt(
    generation_id: str, attempt: int, artifacts: Artifacts
) -> AsyncGenerator[AudioPart, None]:
    """Yield the audio of one attempt as ``watch_audio`` does; ends if the attempt fails.

    Raises ``ArtifactError`` if the row names a file that is neither in ``artifacts`` nor its own.
    """
    async with aclosing(_watch(generation_id, attempt, artifacts)) as parts:
        async for part in parts:
            yield part


async def _watch(
    generation_id: str, only: int | None, place: Artifacts
) -> AsyncGenerator[AudioPart, None]:
    database = await ensure_database()
    # Subscribe before the first read: a change between the two must not be missed.
    with database.changes.subscribe(Topic.DONE, [generation_id]) as changes:
        listener: _Listener | None = None
        while True:
            row = await read_generation(database, generation_id)
            is_over = row.attempt != only or not (row.is_complete or row.status == PROCESSING)
            if only is not None and is_over:
                return
            if listener is None or row.attempt != listener.attempt:
                listener = _Listener(place, row)
            if row.is_complete:
                if only is not None:
                    listener.check_own(row)
                yield await listener.read_rest(row)
                return
            if row.is_finished:
                raise NoAudioError(row.id, row.status)
            if row.status == PROCESSING:
                async for part in listener.read_preview():
                    yield part
            await changes.wait(_LOOK_SECONDS)


def wav_header(row: Generation) -> bytes:
    """Return what makes a WAV file of the parts of this row's audio.

    It says the duration that was asked for; the audio is as long, to within one sample.
    """
    from dgx_music.audio.wav import header  # imports NumPy

    frames = round(row.duration_seconds * row.sample_rate)
    return header(row.sample_rate, row.channels, frames * row.channels * _SAMPLE_BYTES)


class _Listener:
    """How far one attempt's audio was heard."""

    def __init__(self, place: Artifacts, row: Generation) -> None:
        self.attempt = row.attempt
        self._place = place
        self._row = row
        self._number = 0
        self._frames = 0
        self._energy = 0.0

    async def read_preview(self) -> AsyncIterator[AudioPart]:
        """Yield the parts of the preview that are there and were not read yet."""
        while data := await self._place.read_preview(self._row.id, self.attempt, self._number):
            self._number += 1
            self._energy += await to_thread.run_sync(_energy_of, data)
            yield self._part(data)

    async def read_rest(self, row: Generation) -> AudioPart:
        """Return what was not heard yet of the finished audio, as loud as what was heard."""
        async with _decoding:
            data = b"".join([chunk async for chunk in content_of(row)])
            return self._part(await to_thread.run_sync(self._rest_of, data, stored_format(row)))

    def check_own(self, row: Generation) -> None:
        """Refuse the file of another generation in another place, which a row may name."""
        path = path_of(row)
        named = parse_name(path.rpartition("/")[2])
        if not (self._place.holds(path) or (named is not None and named[0] == row.id)):
            raise ArtifactError(
                f"Generation {row.id} is completed with {path}, which is not its own."
            )

    def _part(self, pcm: bytes) -> AudioPart:
        start = self._frames
        self._frames += len(pcm) // (self._row.channels * _SAMPLE_BYTES)
        return AudioPart(self.attempt, start, pcm, self._row.sample_rate, self._row.channels)

    def _rest_of(self, data: bytes, audio_format: str) -> bytes:
        import numpy as np  # not on the way of a program that only enqueues

        from dgx_music.audio.transcoding import decode
        from dgx_music.audio.wav import to_pcm

        samples = decode(data, audio_format).samples  # [channel, frame]
        heard = sum(
            float(
                np.square(samples[:, at : min(at + _BLOCK, self._frames)], dtype=np.float64).sum()
            )
            for at in range(0, self._frames, _BLOCK)
        )
        gain = (self._energy / heard) ** 0.5 if self._energy and heard else 1.0
        return to_pcm(samples[:, self._frames :] * np.float32(gain))


def _energy_of(pcm: bytes) -> float:
    import numpy as np

    samples = np.frombuffer(pcm, "<i2").astype(np.float64) / 2**15
    return float(np.square(samples).sum())
