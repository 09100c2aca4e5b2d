"""The encodings that hosted services name: what comes out is what its name says."""

from __future__ import annotations

import io
from datetime import UTC, datetime

import numpy as np
import pytest
import soundfile

from dgx_music.audio.encodings import Encoding
from dgx_music.audio.tags import tags_of
from dgx_music.audio.transcoding import reencode
from dgx_music.errors import ArtifactError
from tests.factories import audio_file

SECONDS = 4
NOISE = np.random.default_rng(7).uniform(-0.5, 0.5, (SECONDS * 32_000, 2))


@pytest.fixture(scope="module")
def tags():
    return tags_of(
        generation_id="01a2",
        prompt="lofi rain",
        model_name="musicgen-small",
        made_at=datetime(2026, 11, 26, tzinfo=UTC),
        facts={},
    )


def noise(channels):
    file = io.BytesIO()
    soundfile.write(file, NOISE[:, :channels], 32_000, "PCM_16", format="WAV")
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("codec", "rate", "kbps"),
    [
        *[("mp3", 22_050, 32), ("mp3", 24_000, 48), ("mp3", 44_100, 32), ("mp3", 44_100, 128)],
        *[("mp3", 48_000, 320), ("opus", 48_000, 64), ("opus", 48_000, 192)],
    ],
)
def test_a_lossy_file_has_its_rate_and_its_bit_rate(tags, codec, rate, kbps, channels):
    data = reencode(noise(channels), "wav", Encoding(codec, rate, kbps), tags)

    frames, found_rate = soundfile.read(io.BytesIO(data), always_2d=True)
    assert (found_rate, frames.shape[1]) == (rate, channels)
    assert len(frames) / rate == pytest.approx(SECONDS, abs=0.1)
    assert len(data) * 8 / SECONDS / 1_000 == pytest.approx(kbps, rel=0.15)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("codec", "rate", "frame_bytes"),
    [("pcm", 16_000, 2), ("pcm", 44_100, 2), ("ulaw", 8_000, 1), ("alaw", 8_000, 1)],
)
def test_raw_samples_have_no_header(tags, codec, rate, frame_bytes, channels):
    encoding = Encoding(codec, rate)

    data = reencode(noise(channels), "wav", encoding, tags)

    assert len(data) == SECONDS * rate * frame_bytes * encoding.channels_for(channels)
    assert encoding.channels_for(channels) == (channels if codec == "pcm" else 1)


def test_samples_stay_what_they_are_at_their_own_rate(tags):
    stored = audio_file(0.5)

    data = reencode(stored, "wav", Encoding("pcm"), tags)

    assert data == stored[44:]


def test_a_file_has_the_tags(tags):
    data = reencode(audio_file(0.5), "wav", Encoding("mp3", 44_100, 128), tags)

    assert data.startswith(b"ID3")
    assert "lofi rain".encode("utf-16-le") in data or b"lofi rain" in data


def test_what_is_no_audio_is_refused(tags):
    with pytest.raises(ArtifactError, match="The stored WAV file cannot be decoded"):
        reencode(b"no", "wav", Encoding("mp3"), tags)
