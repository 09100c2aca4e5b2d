"""Audio given with a request: from a file of any usual kind to a clip as it is stored, and back to samples.

A clip is FLAC of 16 bits, at the model's sample rate and of its channels. Synchronous: call it in a thread.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import soundfile

from dgx_music import validation
from dgx_music.audio import encode, match_channels, resample
from dgx_music.catalog import WINDOW_SECONDS, ModelInfo
from dgx_music.errors import GenerationRejectedError, InvalidRequestError
from dgx_music.inference.engine import Audio, Samples

if TYPE_CHECKING:
    from numpy.typing import NDArray

Source: TypeAlias = "str | os.PathLike[str] | bytes"
"""A file's path, or its content."""

MAX_SOURCE_BYTES = 100_000_000
MAX_BATCH_BYTES = 256 * 2**20
"""Clips of one batch, as they are stored: all are in memory until the last one is checked."""

_FORMATS = {"WAV", "WAVEX", "RF64", "FLAC", "MP3", "OGG"}  # libsndfile's names
_READABLE = "use WAV, FLAC, MP3 or OGG"
_MAX_CHANNELS = 8
_SCALE = 32_768  # what libsndfile divides 16 bits by, so that a file of 16 bits stays what it is
_NAMES = ("continuation", "melody")
_MIN_RATE, _MAX_RATE = 8_000, 192_000


@dataclass(frozen=True)
class Clip:
    """A clip as it is stored: ``sha256`` is of its samples, since the bytes of a FLAC file tell who encoded it."""

    sha256: str
    data: bytes
    duration_seconds: float
    source_sha256: str
    """Of the file that was given: what a repeated request repeats, however it is decoded."""


class Reader:
    """Reads the clips of requests, each distinct source once for a model's shape, and keeps what it made."""

    def __init__(self) -> None:
        self.data: dict[str, tuple[bytes, float]] = {}
        """Content and seconds of each distinct clip, by its ``sha256``."""
        self._by_source: dict[tuple[object, ...], Clip] = {}
        self._latest: tuple[Source, bytes] | None = None
        self._bytes = 0

    def read(self, sources: Mapping[str, Source], model: ModelInfo, duration: float) -> dict[str, Clip]:
        """Return the clips of one request, by the names of its fields; raises ``InvalidRequestError``."""
        clips = {name: self._read(name, sources[name], model) for name in _NAMES if name in sources}
        if "continuation" in clips:
            validation.check_continuation(clips["continuation"].duration_seconds, duration)
        if self._bytes > MAX_BATCH_BYTES:
            problem = f"and the clips before it take more than {MAX_BATCH_BYTES // 2**20} MiB"
            raise InvalidRequestError(next(iter(clips)), problem, "send fewer requests at a time")
        return clips

    def _read(self, name: str, source: Source, model: ModelInfo) -> Clip:
        channels = 1 if name == "melody" else _channels_of(model)
        key = name, channels, model.sample_rate, self._identify(name, source)
        if key not in self._by_source:
            self._by_source[key] = self._keep(_make(name, _content(name, source), channels, model.sample_rate))
        return self._by_source[key]

    def _keep(self, clip: Clip) -> Clip:
        """Return the clip with the content that is there already, where it is the same music."""
        if clip.sha256 not in self.data:
            self.data[clip.sha256] = clip.data, clip.duration_seconds
            self._bytes += len(clip.data)
        return replace(clip, data=self.data[clip.sha256][0])

    def _identify(self, name: str, source: Source) -> object:
        """Return what tells this source from others: its path, else a hash, made once for one that comes again and again."""
        if not isinstance(source, bytes | bytearray | memoryview):
            return _path(name, source)
        if self._latest is None or self._latest[0] is not source:
            self._latest = source, hashlib.sha256(source).digest()
        return self._latest[1]


def load(name: str, data: bytes, sha256: str) -> Audio:
    """Return the samples of a stored clip; raises ``GenerationRejectedError`` where they are not those that were stored."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            pcm, sample_rate = file.read(dtype="int16", always_2d=True).T, file.samplerate
    except soundfile.SoundFileError:
        pcm, sample_rate = np.zeros((1, 0), np.int16), 0
    if _fingerprint(pcm, sample_rate) != sha256:
        raise GenerationRejectedError(
            f"The {name} is damaged in the database; enqueue the request again with the clip."
        )
    return Audio(pcm.astype(np.float32) / _SCALE, sample_rate)  # [channel, frame]


def _make(name: str, content: bytes, channels: int | None, sample_rate: int) -> Clip:
    """Return the clip of a file's content; ``channels`` of ``None`` keeps them, two at most."""
    samples, rate = _decode(name, content)
    samples = match_channels(samples, channels or min(2, len(samples)))
    samples = resample(samples, rate, sample_rate)
    validation.check_clip(name, samples.shape[1] / sample_rate)
    pcm = np.clip(np.rint(samples * _SCALE), -_SCALE, _SCALE - 1).astype(np.int16)
    source_sha256 = hashlib.sha256(content).hexdigest()
    return Clip(
        _fingerprint(pcm, sample_rate), encode(pcm, sample_rate, "flac"), pcm.shape[1] / sample_rate, source_sha256
    )


def _decode(name: str, content: bytes) -> tuple[Samples, int]:
    """Return the samples of a file and their rate; a melody's first 30 s, while a longer continuation is refused."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_form(name, file)
            limit = round(WINDOW_SECONDS * file.samplerate)
            if name == "continuation" and file.frames > limit:
                validation.check_clip(name, file.frames / file.samplerate)
            samples: Samples = file.read(limit, dtype="float32", always_2d=True).T  # [channel, frame]
            rate: int = file.samplerate
    except soundfile.SoundFileError:
        raise InvalidRequestError(name, "is not audio that can be read", _READABLE) from None
    if not samples.shape[1]:
        raise InvalidRequestError(name, "holds no audio", "use another clip")
    if not np.isfinite(samples).all():
        raise InvalidRequestError(name, "holds NaN or infinite samples", "use another clip")
    return samples, rate


def _check_form(name: str, file: Any) -> None:
    """Refuse before it is read what would take more memory than any music needs."""
    if file.format not in _FORMATS:
        raise InvalidRequestError(name, f"is audio of the format {file.format}", _READABLE)
    if not _MIN_RATE <= file.samplerate <= _MAX_RATE:
        problem = f"has a sample rate of {file.samplerate:,} Hz"
        raise InvalidRequestError(name, problem, f"use one of {_MIN_RATE:,} to {_MAX_RATE:,} Hz")
    if file.channels > _MAX_CHANNELS:
        raise InvalidRequestError(name, f"has {file.channels} channels", f"use at most {_MAX_CHANNELS}")


def _content(name: str, source: Source) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        _check_size(name, len(source))
        return bytes(source)
    path = _path(name, source)
    try:
        found = os.stat(path)  # noqa: PTH116 - a path that is text stays as it was given
        if not stat.S_ISREG(found.st_mode):  # nor one that never ends
            raise InvalidRequestError(name, f"{path!r} is not a file", "name an audio file")
        _check_size(f"{name} {path!r}", found.st_size)
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        why = (getattr(error, "strerror", None) or str(error)).lower()
        raise InvalidRequestError(name, f"{path!r} cannot be read ({why})", "name an audio file") from None


def _path(name: str, source: object) -> str:
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    if not isinstance(path, str):
        problem = f"is of the type {type(source).__name__}"
        raise InvalidRequestError(name, problem, "use the path of an audio file, or its bytes")
    return os.path.expanduser(path)  # noqa: PTH111 - pathlib raises where it knows no home


def _check_size(what: str, size: int) -> None:
    if size > MAX_SOURCE_BYTES:
        problem = f"has {size / 1e6:,.0f} MB"
        raise InvalidRequestError(what, problem, f"use at most {MAX_SOURCE_BYTES / 1e6:.0f} MB")


def _channels_of(model: ModelInfo) -> int | None:
    return None if model.hears_melody is None else model.channels  # a local folder's are not known here


def _fingerprint(pcm: NDArray[np.int16], sample_rate: int) -> str:
    """Return the SHA-256 of samples of 16 bits ``[channel, frame]``, with their rate and number of channels."""
    digest = hashlib.sha256(f"{sample_rate} Hz, {len(pcm)} channels\n".encode())
    digest.update(pcm.T.astype("<i2").tobytes())
    return digest.hexdigest()
