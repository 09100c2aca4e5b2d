"""From an engine's samples to the bytes of a file, and the facts of the audio.

Synchronous, without state: call ``finish`` in a thread. Samples are float32 ``[channel, frame]``; 0
dBFS is an amplitude of 1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from dgx_music.audio import loudness as meter
from dgx_music.audio import wav
from dgx_music.audio.analysis import Analysis, analyse
from dgx_music.audio.conversion import match_channels, resample
from dgx_music.audio.facts import AudioFacts
from dgx_music.audio.formats import FORMATS, find_rate_problem
from dgx_music.audio.samples import Audio, Samples
from dgx_music.audio.tags import Tags
from dgx_music.config import PREFIX, Loudness
from dgx_music.errors import ConfigurationError, EngineError, GenerationRejectedError
from dgx_music.validation import AudioFormat
from dgx_music.waveform import STEPS, Waveform

if TYPE_CHECKING:
    from numpy.typing import NDArray

TARGET_LUFS = -14.0
PEAK_LIMIT = 10 ** (-1 / 20)  # -1 dBFS: room for what a lossy decoder adds to a peak
WAVEFORM_POINTS = 1_000
_BLOCK_FRAMES = 65_536
"""How many frames are worked on at once: libsndfile overflows the stack on a long OGG file that is
written in one call, and the peaks of all frames at once take as much memory as the audio."""
_CEILING = 100.0  # +40 dBFS: no engine means more, and float32 arithmetic overflows on much more


@dataclass(frozen=True)
class FinishedAudio:
    """A file's content, its extension without the dot, and the ``facts`` as they are stored."""

    data: bytes
    extension: str
    facts: dict[str, Any]


def finish(
    audio: Audio,
    *,
    sample_rate: int,
    channels: int,
    audio_format: AudioFormat,
    loudness: Loudness,
    tags: Tags | None = None,
    may_overwrite: bool = False,
) -> FinishedAudio:
    """Return the audio as a file of 1 or 2 ``channels`` at ``sample_rate`` Hz.

    A lossless file has 16 bits, and exactly the frames of the audio, or ``round(frames *
    sample_rate / audio.sample_rate)`` of them. The facts describe the samples that were encoded;
    the noise of untrained weights has no tempo and no key. With ``may_overwrite`` the samples are
    changed in place if they can be, which saves a copy of them. Raises ``EngineError`` if the audio
    is empty or not finite, and ``GenerationRejectedError`` if the format cannot hold the sample
    rate.
    """
    check_format(audio_format, sample_rate)
    samples = _check_samples(audio.samples)
    analysis = (
        Analysis() if audio.facts.get("is_untrained") else analyse(samples, audio.sample_rate)
    )
    samples = match_channels(samples, channels, audio.sample_rate)
    samples = resample(samples, audio.sample_rate, sample_rate)
    is_own = may_overwrite or not np.may_share_memory(samples, audio.samples)
    samples, lufs = _normalise(samples, sample_rate, loudness, is_own and samples.flags.writeable)
    data = encode(samples, sample_rate, audio_format, tags)
    facts = _describe(samples, sample_rate, audio_format, lufs, analysis)
    return FinishedAudio(data, audio_format, dict(vars(facts)))


def check_format(audio_format: AudioFormat, sample_rate: int) -> None:
    """Raise ``GenerationRejectedError`` if the format cannot hold the sample rate.

    Raises ``EngineError`` if only this machine cannot write the format. Ask before inference.
    """
    problem = find_rate_problem(audio_format, sample_rate)
    if problem is not None:
        raise GenerationRejectedError(f"{audio_format.upper()} {problem[0]}; {problem[1]}.")
    if not is_writable(audio_format):
        raise EngineError(
            f"This machine's libsndfile cannot write {audio_format.upper()}; update it, or use WAV."
        )


def is_writable(audio_format: AudioFormat) -> bool:
    """Return whether this machine can write the format: a libsndfile may lack some."""
    encoding = FORMATS[audio_format].encoding
    return encoding is None or encoding["format"] in soundfile.available_formats()


def check_setting(audio_format: AudioFormat) -> None:
    """Raise ``ConfigurationError`` if no worker with this format could write its audio here."""
    if not is_writable(audio_format):
        problem = f"is {audio_format}, which this machine's libsndfile cannot write"
        raise ConfigurationError(f"{PREFIX}AUDIO_FORMAT", problem, "update it, or use wav")


def warm_up() -> None:
    """Import the loudness meter (a second or two, because of scipy) before the first clip needs it.

    Raises ``ArtifactError`` if there is no memory for it.
    """
    meter.import_filters()


def _check_samples(samples: Samples) -> Samples:
    if samples.ndim != 2 or samples.shape[0] not in (1, 2) or samples.shape[1] == 0:
        raise EngineError(
            f"The engine's audio has the shape {samples.shape}; it must be [1 or 2 channels, frames]."
        )
    peak = _peak_of(samples)
    if not math.isfinite(peak):
        raise EngineError("The engine's audio holds NaN or infinite samples and cannot be stored.")
    return samples if peak <= _CEILING else np.clip(samples, -_CEILING, _CEILING)


def _peak_of(samples: Samples) -> float:
    """Return the highest amplitude; NaN if a sample is NaN."""
    return max(float(samples.max()), -float(samples.min()))


def _normalise(
    samples: Samples, sample_rate: int, loudness: Loudness, in_place: bool
) -> tuple[Samples, float | None]:
    """Return the samples at the level asked for, within ±1, and their loudness in LUFS.

    ``lufs`` starts from the peak limit and only ever turns down, so it can neither clip nor pass
    the limit. A clip that is too short to be measured stays at the limit.
    """
    out = samples if in_place else np.empty_like(samples)
    if loudness == "none":
        clipped = np.clip(samples, -1, 1, out=out)
        return clipped, meter.measure(clipped, sample_rate)
    peak = _peak_of(samples)
    if peak < meter.SILENCE_PEAK:
        return samples, None
    scaled = np.multiply(samples, np.float32(PEAK_LIMIT / peak), out=out)
    lufs = meter.measure(scaled, sample_rate)
    if loudness == "peak" or lufs is None or lufs <= TARGET_LUFS:
        return scaled, lufs
    scaled *= np.float32(10 ** ((TARGET_LUFS - lufs) / 20))
    return scaled, TARGET_LUFS


def encode(
    samples: NDArray[Any], sample_rate: int, audio_format: AudioFormat, tags: Tags | None = None
) -> bytes:
    """Return the samples as a file's content: float32, or int16 for a format other than WAV."""
    encoding = FORMATS[audio_format].encoding
    if encoding is None:
        return wav.encode(samples, sample_rate, tags.riff() if tags else b"")
    return encode_with(encoding, samples, sample_rate, tags)


def encode_with(
    options: Mapping[str, Any],
    samples: NDArray[Any],
    sample_rate: int,
    tags: Tags | None = None,
) -> bytes:
    """Return the samples as what libsndfile writes with these options."""
    frames, is_mpeg = samples.T, options["format"] == "MP3"  # [frame, channel]
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", sample_rate, frames.shape[1], **options) as file:
        if tags and not is_mpeg:
            for name, text in tags.vorbis().items():
                setattr(file, name, text)
        for start in range(0, len(frames), _BLOCK_FRAMES):
            file.write(frames[start : start + _BLOCK_FRAMES])
    return (tags.id3() if tags and is_mpeg else b"") + buffer.getvalue()


def _describe(
    samples: Samples,
    sample_rate: int,
    audio_format: AudioFormat,
    lufs: float | None,
    analysis: Analysis,
) -> AudioFacts:
    channels, frames = samples.shape
    points = _points_of(samples, WAVEFORM_POINTS)
    return AudioFacts(
        duration_seconds=frames / sample_rate,
        sample_rate=sample_rate,
        channels=channels,
        format=audio_format,
        peak=round(float(points.max()), 4),
        loudness_lufs=None if lufs is None else round(lufs, 2),
        waveform=_waveform_of(points),
        **vars(analysis),
    )


def _waveform_of(points: NDArray[np.float64]) -> Waveform:
    return Waveform.of_steps((points * STEPS).round().astype("<u2").tobytes())


def _points_of(samples: Samples, points: int) -> NDArray[np.float64]:
    """Return the peak of each of at most ``points`` equal parts."""
    frames = samples.shape[1]
    points = min(points, frames)
    starts = np.arange(points) * frames // points
    peaks = np.empty(points, dtype=np.float32)
    # Group by group: the absolute values of all samples would take as much memory as these.
    size = -(-points * _BLOCK_FRAMES // frames)
    for first in range(0, points, size):
        group = starts[first : first + size]
        end = starts[first + size] if first + size < points else frames
        loudest = np.abs(samples[:, group[0] : end]).max(axis=0)
        np.maximum.reduceat(loudest, group - group[0], out=peaks[first : first + size])
    return peaks.astype(np.float64)  # 0.1 of float32 would print as 0.10000000149
