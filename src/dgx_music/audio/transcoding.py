"""A finished file in another format: the same samples, with tags of its own."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from dgx_music.audio.conversion import match_channels, resample
from dgx_music.audio.encodings import Encoding
from dgx_music.audio.files import encode, encode_with
from dgx_music.audio.samples import Audio
from dgx_music.audio.tags import Tags
from dgx_music.errors import ArtifactError
from dgx_music.validation import AudioFormat

_TAGGED = ("mp3", "opus", "flac")


def transcode(data: bytes, source: str, audio_format: AudioFormat, tags: Tags) -> bytes:
    """Return a file's content in another format, at the same rate and with the same channels.

    From one lossless format to another, no sample changes. Call this in a thread. Raises
    ``ArtifactError`` if the content is not audio.
    """
    audio = decode(data, source)
    return encode(audio.samples, audio.sample_rate, audio_format, tags)


def reencode(data: bytes, source: str, encoding: Encoding, tags: Tags) -> bytes:
    """Return a file's content in this encoding; raw samples and WAV have no tags.

    Call this in a thread. Raises ``ArtifactError`` if the content is not audio.
    """
    audio = decode(data, source)
    rate = encoding.rate_for(audio.sample_rate)
    channels = encoding.channels_for(len(audio.samples))
    samples = match_channels(audio.samples, channels, audio.sample_rate)
    samples = np.clip(resample(samples, audio.sample_rate, rate), -1, 1)
    has_tags = encoding.codec in _TAGGED
    options = encoding.options(rate, channels)
    return encode_with(options, samples, rate, tags if has_tags else None)


def decode(data: bytes, source: str) -> Audio:
    """Return the audio of a file's content; raises ``ArtifactError`` if it is not audio."""
    try:
        frames, sample_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ArtifactError(f"The stored {source.upper()} file cannot be decoded.") from error
    np.clip(frames, -1, 1, out=frames)  # a lossy decoder may pass full scale
    return Audio(frames.T, sample_rate)
