"""Audio given with a request: from a file of a usual format to a stored clip, and back to samples.

A clip is FLAC of 16 bits, at the sample rate and with the channels of the model. The functions are
synchronous: call them in a thread.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import soundfile

from dgx_music import validation
from dgx_music.audio.containers.interface import READABLE, DamagedError
from dgx_music.audio.containers.interface import Source as Container
from dgx_music.audio.conversion import cancels_out, match_channels, resample
from dgx_music.audio.decoding import Stream, decode_quietly, open_stream
from dgx_music.audio.files import encode
from dgx_music.audio.formats import FORMATS, open_source
from dgx_music.audio.mending import mend_scale, tell, tell_silence
from dgx_music.audio.samples import Audio
from dgx_music.catalog import MAX_DURATION_SECONDS, SAMPLE_RATE, WINDOW_SECONDS, ModelInfo
from dgx_music.errors import GenerationRejectedError, InvalidRequestError, UnreadableAudioError
from dgx_music.validation import CLIP_FIELDS, MELODY_SECONDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

Source: TypeAlias = "os.PathLike[str] | bytes"
"""A file's path, or its content."""

MAX_SOURCE_BYTES = 100_000_000
MAX_BATCH_BYTES = 256 * 2**20
"""Clips of one batch, as they are stored: all are in memory until the last one is checked."""

_NAMES = {name for each in FORMATS.values() for name in each.names}
_MAX_CHANNELS = 8
_SCALE = 32_768  # what libsndfile divides 16 bits by, so that a file of 16 bits stays what it is
_COUNTED_SECONDS = 600
"""How far a clip that is too long is decoded, to tell its length."""
_MOST_SAMPLES = 30 * 8 * 192_000
"""In memory, of all channels: 30 s of any file that is accepted, and 300 s of stereo at 76.8 kHz."""
_PATIENCE_SECONDS = 60.0
_TOLD_SECONDS = 0.1
"""A header that is wrong by less is not worth a warning."""
_MIN_RATE, _MAX_RATE = 8_000, 192_000


@dataclass(frozen=True)
class Clip:
    """A clip as it is stored.

    ``sha256`` is of its samples: the bytes of a FLAC file depend on the encoder.
    """

    sha256: str
    data: bytes
    duration_seconds: float
    source_sha256: str
    """Of the file that was given: a repeated request has the same one, whatever the decoder
    does."""


@dataclass(frozen=True)
class Forms:
    """The clips of a file in all forms that a request can need, whatever its model and its field."""

    mono: Clip
    """Of its first 300 s: a melody has one channel."""
    stereo: Clip
    """Of its first 30 s: longer audio cannot be continued."""
    source_channels: int
    duration_seconds: float
    """Of the whole file."""


class Reader:
    """Reads the clips of requests, each source once for each form that a model needs."""

    def __init__(self) -> None:
        self.data: dict[str, tuple[bytes, float]] = {}
        """Content and seconds of each distinct clip, by its ``sha256``."""
        self._by_source: dict[tuple[object, ...], Clip] = {}
        self._latest: tuple[Source, bytes] | None = None
        self._bytes = 0

    def read(
        self, sources: Mapping[str, Source], model: ModelInfo, duration: float
    ) -> dict[str, Clip]:
        """Return the clips of one request by field name; raises ``InvalidRequestError``."""
        clips = {
            name: self._read(name, sources[name], model) for name in CLIP_FIELDS if name in sources
        }
        if "continuation" in clips:
            validation.check_continuation(clips["continuation"].duration_seconds, duration)
        if self._bytes > MAX_BATCH_BYTES:
            problem = f"and the clips before it take more than {MAX_BATCH_BYTES // 2**20} MiB"
            raise InvalidRequestError(next(iter(clips)), problem, "send fewer requests at a time")
        return clips

    def _read(self, name: str, source: Source, model: ModelInfo) -> Clip:
        channels = model.clip_channels(name)
        key = name, channels, model.sample_rate, self._identify(name, source)
        if key not in self._by_source:
            self._by_source[key] = self._keep(
                _make(name, _content(name, source), channels, model.sample_rate)
            )
        return self._by_source[key]

    def _keep(self, clip: Clip) -> Clip:
        """Return the clip; if the same music is here already, with the content that is here."""
        if clip.sha256 not in self.data:
            self.data[clip.sha256] = clip.data, clip.duration_seconds
            self._bytes += len(clip.data)
        return replace(clip, data=self.data[clip.sha256][0])

    def _identify(self, name: str, source: Source) -> object:
        """Return what identifies this source: its path, or a hash of its bytes.

        A source that comes again and again is hashed once.
        """
        validation.check_clip_source(name, source)
        if not isinstance(source, bytes | bytearray | memoryview):
            return _path(name, source)
        if self._latest is None or self._latest[0] is not source:
            self._latest = source, hashlib.sha256(source).digest()
        return self._latest[1]


def read_forms(name: str, content: bytes) -> Forms:
    """Return the clips of a file that may be used in any way later.

    They are what ``Reader`` makes of the same file. Raises ``UnreadableAudioError`` if it is no audio
    that can be read, and ``InvalidRequestError`` if it is not 0.08 to 600 s long.
    """
    try:
        with _refusing_damage(name):
            audio, seconds = _decode_counted(name, content)
        samples = None if audio is None else mend_scale(name, audio.samples)
    except InvalidRequestError as error:
        raise UnreadableAudioError(error.field, error.problem, error.remedy) from None
    if audio is None or samples is None:
        problem = f"is longer than {_COUNTED_SECONDS} s"
        raise InvalidRequestError(name, problem, "use a part of it")
    validation.check_clip(name, min(seconds, WINDOW_SECONDS))
    tell_silence(name, audio.samples)
    rate, source_sha256 = audio.sample_rate, hashlib.sha256(content).hexdigest()
    beginning = Audio(samples[:, : round(WINDOW_SECONDS * rate)], rate)
    stereo = _formed(name, beginning, source_sha256, 2, SAMPLE_RATE)
    mono = _formed(name, Audio(samples, rate), source_sha256, 1, SAMPLE_RATE)
    is_whole = seconds <= WINDOW_SECONDS
    return Forms(mono, stereo, len(samples), mono.duration_seconds if is_whole else seconds)


def cut(data: bytes, start: float, end: float) -> bytes:
    """Return the part of a stored clip between these seconds, as a file; it must not be empty."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        pcm, rate = file.read(dtype="int16", always_2d=True).T, file.samplerate
    return encode(pcm[:, round(start * rate) : round(end * rate)], rate, "flac")


def load(name: str, data: bytes, sha256: str, duration: float = MAX_DURATION_SECONDS) -> Audio:
    """Return the samples of a stored clip that music of this duration can hear.

    Raises ``GenerationRejectedError`` if they are not the samples that were stored.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            pcm, sample_rate = file.read(dtype="int16", always_2d=True).T, file.samplerate
    except soundfile.SoundFileError:
        pcm, sample_rate = np.zeros((1, 0), np.int16), 0
    if _fingerprint(pcm, sample_rate) != sha256:
        raise GenerationRejectedError(
            f"The {name} is damaged in the database; enqueue the request again with the clip."
        )
    heard = WINDOW_SECONDS if duration <= WINDOW_SECONDS else MELODY_SECONDS
    samples = pcm[:, : round(heard * sample_rate)].astype(np.float32)  # [channel, frame]
    samples /= _SCALE
    return Audio(samples, sample_rate)


def _make(name: str, content: bytes, channels: int | None, sample_rate: int) -> Clip:
    """Return the clip of a file's content; ``channels`` of ``None`` keeps the channels, 2 at most.

    Logs a warning about each repair, and if the header was wrong.
    """
    with _refusing_damage(name):
        audio = _decode(name, content)
    longest = MELODY_SECONDS if name == "melody" else WINDOW_SECONDS
    validation.check_clip(name, audio.duration, longest)
    samples = mend_scale(name, audio.samples)
    source = Audio(samples, audio.sample_rate), hashlib.sha256(content).hexdigest()
    clip = _formed(name, *source, channels or min(2, len(samples)), sample_rate)
    tell_silence(name, audio.samples)
    return clip


def _formed(name: str, audio: Audio, source_sha256: str, channels: int, sample_rate: int) -> Clip:
    """Return the clip of these samples with so many channels, at this rate."""
    samples = audio.samples
    if len(samples) > channels and cancels_out(samples, audio.sample_rate):
        tell(
            name,
            "channels of opposite phase would cancel each other; the loudest of them is used alone",
        )
    samples = match_channels(samples, channels, audio.sample_rate)
    samples = resample(samples, audio.sample_rate, sample_rate)
    pcm = np.clip(np.rint(samples * _SCALE), -_SCALE, _SCALE - 1).astype(np.int16)
    return Clip(
        _fingerprint(pcm, sample_rate),
        encode(pcm, sample_rate, "flac"),
        pcm.shape[1] / sample_rate,
        source_sha256,
    )


def _decode(name: str, content: bytes) -> Audio:
    """Return the audio of a file; a melody's first 300 s, while a long continuation is refused."""
    if name == "melody":
        kept, _ = _read(name, open_source(content, MELODY_SECONDS), MELODY_SECONDS, MELODY_SECONDS)
        return _joined(name, kept, MELODY_SECONDS)
    container = open_source(content, _COUNTED_SECONDS)
    _check_window(name, container.seconds)
    kept, seconds = _read(name, container, WINDOW_SECONDS, _COUNTED_SECONDS)
    _check_window(name, seconds)
    return _joined(name, kept, WINDOW_SECONDS)


def _decode_counted(name: str, content: bytes) -> tuple[Audio | None, float]:
    """Return the first 300 s of a file, and how long it is; no audio if that is beyond 600 s."""
    longest = _COUNTED_SECONDS + 1
    container = open_source(content, longest)
    known = container.seconds
    if known is not None and known > MELODY_SECONDS:
        container = open_source(content, MELODY_SECONDS)  # an MP3 is decoded whole
    kept, counted = _read(name, container, MELODY_SECONDS, longest)
    seconds = counted if known is None else known
    return None if seconds > _COUNTED_SECONDS else _joined(name, kept, MELODY_SECONDS), seconds


@contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    try:
        yield
    except DamagedError as error:
        raise InvalidRequestError(name, error.problem, error.remedy) from None


def _check_window(name: str, seconds: float | None) -> None:
    if seconds is not None and seconds > WINDOW_SECONDS:
        raise _too_long(name, seconds)


def _read(
    name: str, container: Container, kept_seconds: float, longest: float
) -> tuple[deque[Audio], float]:
    """Return what holds the first seconds, and how long the audio is to its true end.

    The header is not believed. It is read no further than ``longest``.
    """
    kept: deque[Audio] = deque()
    count, give_up_at = 0, time.monotonic() + _PATIENCE_SECONDS
    for block in _blocks_of(name, container):
        if kept and _form_of(block) != _form_of(kept[0]):
            problem = "changes its sample rate or channels on the way"
            raise InvalidRequestError(name, problem, "use another clip")
        if count < _most_frames(block, kept_seconds):
            kept.append(block)
        count += block.samples.shape[1]
        if count >= longest * block.sample_rate:
            break
        if time.monotonic() > give_up_at:
            raise InvalidRequestError(name, "takes too long to decode", "use a shorter clip")
    if not kept:
        raise InvalidRequestError(name, "holds no audio", "use another clip")
    seconds = count / kept[0].sample_rate
    if count < _most_frames(kept[0], kept_seconds):
        _compare(name, container.promised_seconds, seconds)
    return kept, seconds


def _joined(name: str, blocks: deque[Audio], seconds: float) -> Audio:
    """Return the first seconds of the blocks, which are given up one by one."""
    whole = sum(block.samples.shape[1] for block in blocks)
    (rate, channels), limit = _form_of(blocks[0]), _most_frames(blocks[0], seconds)
    if limit < min(whole, round(seconds * rate)):
        room = "there is no room for more of it at its rate and with its channels"
        tell(name, f"only its first {limit / rate:.0f} s are used; {room}")
    samples = blocks[0].samples[:, :limit]
    if len(blocks) > 1:
        samples = np.empty((min(whole, limit), channels), np.float32).T  # as it is decoded
        start = 0
        while blocks:
            part = blocks.popleft().samples[:, : samples.shape[1] - start]
            samples[:, start : start + part.shape[1]] = part
            start += part.shape[1]
    if not np.isfinite([samples.min(), samples.max()]).all():  # NaN is both
        raise InvalidRequestError(name, "holds NaN or infinite samples", "use another clip")
    return Audio(samples, rate)


def _most_frames(block: Audio, seconds: float) -> int:
    """Return how many frames of such audio are kept."""
    return min(round(seconds * block.sample_rate), _MOST_SAMPLES // len(block.samples))


def _blocks_of(name: str, container: Container) -> Iterator[Audio]:
    for part in container.parts:
        if container.is_mpeg:
            audio = decode_quietly(part)
            _check_whole(audio, container.seconds)
            yield audio
            continue
        with open_stream(part) as file:
            _check_form(name, file)
            yield from file.audio_blocks()


def _check_whole(audio: Audio, seconds: float | None) -> None:
    """Raise if the decoder has left out damaged frames."""
    if seconds is not None and audio.samples.shape[1] / audio.sample_rate < seconds - _TOLD_SECONDS:
        raise DamagedError("is damaged")


def _compare(name: str, promised: float | None, seconds: float) -> None:
    if promised is not None and abs(promised - seconds) > _TOLD_SECONDS:
        tell(
            name,
            f"its header says {promised:,.4g} s, but it holds {seconds:,.4g} s of audio, all of which is used",
        )


def _too_long(name: str, seconds: float) -> InvalidRequestError:
    is_counted = seconds < _COUNTED_SECONDS
    problem = f"is {seconds:g} s long" if is_counted else f"is longer than {_COUNTED_SECONDS:g} s"
    return InvalidRequestError(name, problem, validation.CLIP_REMEDY)


def _form_of(audio: Audio) -> tuple[int, int]:
    return audio.sample_rate, len(audio.samples)


def _check_form(name: str, file: Stream) -> None:
    """Refuse a file, before it is read, that would take more memory than any music needs."""
    if file.format not in _NAMES:
        raise InvalidRequestError(name, f"is audio of the format {file.format}", READABLE)
    if not _MIN_RATE <= file.samplerate <= _MAX_RATE:
        problem = f"has a sample rate of {file.samplerate:,} Hz"
        raise InvalidRequestError(name, problem, f"use one of {_MIN_RATE:,} to {_MAX_RATE:,} Hz")
    if file.channels > _MAX_CHANNELS:
        raise InvalidRequestError(
            name, f"has {file.channels} channels", f"use at most {_MAX_CHANNELS}"
        )


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
        problem = f"{path!r} cannot be read ({why})"
        raise InvalidRequestError(name, problem, "name an audio file") from None


def _path(name: str, source: os.PathLike[str]) -> str:
    return validation.at_home(name, os.fsdecode(source))


def _check_size(what: str, size: int) -> None:
    if size > MAX_SOURCE_BYTES:
        problem = f"has {size / 1e6:,.0f} MB"
        raise InvalidRequestError(what, problem, f"use at most {MAX_SOURCE_BYTES / 1e6:.0f} MB")


def _fingerprint(pcm: NDArray[np.int16], sample_rate: int) -> str:
    """Return the SHA-256 of 16-bit samples ``[channel, frame]``, their rate and channel count."""
    digest = hashlib.sha256(f"{sample_rate} Hz, {len(pcm)} channels\n".encode())
    digest.update(np.ascontiguousarray(pcm.T, "<i2").data)
    return digest.hexdigest()
