"""A finished file in another format: the same samples, with tags of its own."""

from __future__ import annotations

import io

import numpy as np
import soundfile

from dgx_music.audio.files import encode
from dgx_music.audio.tags import Tags
from dgx_music.errors import ArtifactError
from dgx_music.validation import AudioFormat


def transcode(data: bytes, source: str, audio_format: AudioFormat, tags: Tags) -> bytes:
    """Return a file's content in another format, at the same rate and with the same channels.

    From one lossless format to another, no sample changes. Call this in a thread. Raises
    ``ArtifactError`` if the content is not audio.
    """
    try:
        samples, sample_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise ArtifactError(f"The stored {source.upper()} file cannot be decoded.") from error
    np.clip(samples, -1, 1, out=samples)  # a lossy decoder may pass full scale
    return encode(samples.T, sample_rate, audio_format, tags)
