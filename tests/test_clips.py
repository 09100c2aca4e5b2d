"""Audio given with a request, from a file of any kind to samples in a worker's hands."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dgx_music.audio import clips
from dgx_music.audio.clips import Clip, Reader, Source
from dgx_music.catalog import MODELS, find_model
from dgx_music.errors import GenerationRejectedError, InvalidRequestError
from tests.factories import audio_file

SMALL, STEREO, MELODY = (
    MODELS[name] for name in ("musicgen-small", "musicgen-stereo-small", "musicgen-stereo-melody")
)


def read(source: Source, model=SMALL, name: str = "continuation", duration: float = 60) -> Clip:
    return Reader().read({name: source}, model, duration)[name]


def refused(source: Source, **options) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        read(source, **options)
    return str(caught.value)


def samples_of(clip: Clip):
    return clips.load("continuation", clip.data, clip.sha256).samples


@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_of_16_bits_comes_back_as_it_was(channels: int) -> None:
    data = audio_file(channels=channels)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)

    loaded = read(data, STEREO if channels == 2 else SMALL)

    np.testing.assert_array_equal(samples_of(loaded), expected.T)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG"])
def test_every_usual_format_becomes_flac_at_the_models_rate(kind: str) -> None:
    clip = read(audio_file(2.0, 44_100, kind=kind))

    with soundfile.SoundFile(io.BytesIO(clip.data)) as file:
        assert (file.format, file.subtype, file.samplerate, file.channels) == (
            "FLAC",
            "PCM_16",
            32_000,
            1,
        )
    assert clip.duration_seconds == pytest.approx(2.0, abs=0.1)
    assert np.abs(samples_of(clip)).max() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("source", "model", "name", "channels"),
    [
        (1, STEREO, "continuation", 2),
        (2, SMALL, "continuation", 1),
        (4, STEREO, "continuation", 2),
        (2, MELODY, "melody", 1),
        (1, find_model("/models/mine"), "continuation", 1),
        (4, find_model("/models/mine"), "continuation", 2),
    ],
)
def test_the_channels_are_the_models_and_a_melody_has_one(source, model, name, channels) -> None:
    assert len(samples_of(read(audio_file(channels=source), model, name))) == channels


def test_a_long_melody_is_cut_and_a_long_continuation_refused() -> None:
    data = audio_file(301.5, 8_000)

    assert read(data, MELODY, "melody").duration_seconds == 300
    assert refused(data) == "continuation is 301.5 s long; use a clip of 0.08 to 30 seconds."


@pytest.mark.parametrize(("duration", "heard"), [(10, 30), (30, 30), (30.5, 50), (300, 50)])
def test_music_of_one_window_hears_30_s_of_a_melody_and_longer_music_all_of_it(
    duration: float, heard: float
) -> None:
    clip = read(audio_file(50, 8_000), MELODY, "melody")

    loaded = clips.load("melody", clip.data, clip.sha256, duration=duration)

    assert loaded.duration == heard
    np.testing.assert_array_equal(loaded.samples, samples_of(clip)[:, : loaded.samples.shape[1]])


@pytest.mark.parametrize("name", ["melody", "file"])
def test_a_melody_that_would_take_too_much_memory_is_cut_and_that_is_told(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(clips, "_MOST_SAMPLES", 40 * 2 * 8_000)
    data = audio_file(50, 8_000, channels=2)

    kept = read(data, MELODY, name) if name == "melody" else clips.read_forms(name, data).mono

    assert kept.duration_seconds == 40
    assert caplog.messages == [
        f"{name}: only its first 40 s are used; there is no room for more of it at its rate and "
        "with its channels"
    ]


def test_a_clip_of_the_whole_window_is_accepted() -> None:
    assert read(audio_file(30, 44_100)).duration_seconds == 30


def test_silence_is_music_too() -> None:
    assert not samples_of(read(audio_file(hertz=0))).any()


def test_what_is_too_loud_is_clipped_and_not_wrapped() -> None:
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.full(32_000, [1.5], dtype=np.float32), 32_000, format="WAV", subtype="FLOAT"
    )

    assert samples_of(read(buffer.getvalue())).min() > 0.999


# Audio that means something else


def floats(samples, subtype: str = "FLOAT") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.asarray(samples), 32_000, format="WAV", subtype=subtype)
    return buffer.getvalue()


def sine(level: float = 0.5, seconds: float = 1.0):
    return level * np.sin(np.arange(round(seconds * 32_000)) / 10)


@pytest.mark.parametrize("model", [SMALL, MELODY])
@pytest.mark.parametrize("others", [[-1.0], [-0.8], [-1.0, 1.0, -1.0]])
def test_channels_of_opposite_phase_leave_the_loudest(model, others, caplog) -> None:
    name = "melody" if model is MELODY else "continuation"
    clip = read(
        floats(np.stack([sine(), *(sine(0.5 * other) for other in others)], axis=1)), model, name
    )

    assert np.abs(samples_of(clip)).max() == pytest.approx(0.5, abs=0.001)
    assert caplog.messages == [
        f"{name}: channels of opposite phase would cancel each other; the loudest of them is used alone"
    ]


def test_one_second_of_opposite_phase_in_four_is_enough() -> None:
    left = sine(seconds=4)
    right = left * np.where(np.arange(len(left)) < 32_000, -1, 1)

    assert np.abs(samples_of(read(floats(np.stack([left, right], axis=1))))[0, :32_000]).max() > 0.4


@pytest.mark.parametrize(
    "other", [lambda x: x, np.zeros_like, lambda x: np.roll(x, 16), lambda x: -0.1 * x]
)
def test_other_channels_are_averaged_without_a_word(other, caplog) -> None:
    both = np.stack([sine(), other(sine())], axis=1)

    assert samples_of(read(floats(both))) == pytest.approx(
        both.mean(axis=1, keepdims=True).T, abs=1e-4
    )
    assert caplog.messages == []


def test_opposite_phase_stays_in_a_model_of_two_channels(caplog) -> None:
    left, right = samples_of(read(floats(np.stack([sine(), -sine()], axis=1)), STEREO))

    np.testing.assert_allclose(left, -right, atol=1e-4)
    assert caplog.messages == []


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("scale", [2**7, 2**15, 2**23, 2**31])
def test_integers_in_a_file_of_fractions_are_brought_to_scale(
    scale: int, subtype: str, caplog
) -> None:
    samples = np.rint(sine(0.9) * scale)
    clip = read(floats(samples, subtype))

    np.testing.assert_allclose(samples_of(clip)[0], samples / scale, atol=1e-4)
    assert caplog.messages == [
        f"continuation: its samples reach {np.float32(samples.max()):,.0f}, where 1 is full scale; they are divided by {scale:,}"
    ]


@pytest.mark.parametrize("level", [0.5, 0.9, 1.02, 1.5])
@pytest.mark.parametrize("scale", [2**7, 2**15, 2**23])
def test_integers_that_were_filtered_are_brought_to_scale_too(level: float, scale: int) -> None:
    samples = sine(level) * scale if scale > 2**7 else np.rint(sine(level) * scale)

    assert samples_of(read(floats(samples)))[0] == pytest.approx(
        np.clip(samples / scale, -1, 1), abs=1e-4
    )


@pytest.mark.parametrize(
    ("samples", "subtype"),
    [
        (np.rint(sine(0.9) * 32_767).astype(np.int32), "PCM_32"),
        (sine(0.9) / 32_768, "FLOAT"),
        (sine(0.5) / 32_768 / 256, "DOUBLE"),
    ],
)
def test_a_clip_far_quieter_than_any_recording_is_told(samples, subtype: str, caplog) -> None:
    read(floats(samples, subtype))

    (message,) = caplog.messages
    assert re.fullmatch(r"continuation: its sound is (91|97|144) dB below full scale, .*", message)


def test_a_mix_far_too_loud_is_turned_down(caplog) -> None:
    clip = read(floats(sine(8.0)))

    np.testing.assert_allclose(samples_of(clip)[0], sine(1.0), atol=1e-3)
    assert caplog.messages == [
        "continuation: it is 18 dB louder than full scale; it is turned down by that"
    ]


@pytest.mark.parametrize("stray", [1e4, 3e9, 1e30])
def test_a_stray_sample_is_refused_and_silences_nothing(stray: float) -> None:
    samples = sine()
    samples[100] = stray

    assert refused(floats(samples)) == (
        f"continuation holds samples of {stray:.3g}, where 1 is full scale; use another clip."
    )


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
def test_silence_and_a_constant_level_are_told(level: float, caplog) -> None:
    read(floats(np.full(32_000, level)))

    assert caplog.messages == ["continuation: it holds no sound, only silence or a constant level"]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (b"", "continuation is not audio that can be read; use WAV, FLAC, MP3 or OGG."),
        (
            b"not audio" * 99,
            "continuation is not audio that can be read; use WAV, FLAC, MP3 or OGG.",
        ),
        (audio_file(0), "continuation holds no audio; use another clip."),
        (audio_file(0.05), "continuation is 0.05 s long; use a clip of 0.08 to 30 seconds."),
        (
            audio_file(kind="AIFF"),
            "continuation is audio of the format AIFF; use WAV, FLAC, MP3 or OGG.",
        ),
        (
            audio_file(rate=7_999),
            "continuation has a sample rate of 7,999 Hz; use one of 8,000 to 192,000 Hz.",
        ),
        (audio_file(channels=9), "continuation has 9 channels; use at most 8."),
        (7, "continuation is of the type int; use the path of an audio file, or its bytes."),
        (
            "a.wav",
            "continuation is text; use pathlib.Path(...) for a file of this machine, or the bytes of one.",
        ),
        (
            Path("nowhere.wav"),
            "continuation 'nowhere.wav' cannot be read (no such file or directory); name an audio file.",
        ),
        (Path("/dev/null"), "continuation '/dev/null' is not a file; name an audio file."),
        (Path("/"), "continuation '/' is not a file; name an audio file."),
        (
            Path("a\0b"),
            "continuation 'a\\x00b' cannot be read (embedded null byte); name an audio file.",
        ),
    ],
)
def test_what_is_no_clip_is_refused_in_one_sentence(source, sentence: str) -> None:
    assert refused(source) == sentence


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0.0, bad] * 8_000), 8_000, format="WAV", subtype="FLOAT")

    assert (
        refused(buffer.getvalue())
        == "continuation holds NaN or infinite samples; use another clip."
    )


def test_a_file_too_big_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "big.wav"
    path.touch()
    os.truncate(path, 200_000_000)  # of holes

    assert refused(path) == f"continuation {str(path)!r} has 200 MB; use at most 100 MB."


def test_a_clip_as_long_as_the_music_is_refused() -> None:
    assert refused(audio_file(1.0), duration=1.0).startswith(
        "continuation is 1 s long, and the duration of 1 s counts"
    )


def test_equal_music_is_one_clip_whatever_file_it_came_in() -> None:
    first, second = read(audio_file()), read(audio_file(kind="FLAC"))

    assert first.sha256 == second.sha256
    assert first.source_sha256 != second.source_sha256


@pytest.mark.parametrize("other", [{"hertz": 441}, {"seconds": 1.001}, {"channels": 2}])
def test_other_music_is_another_clip(other) -> None:
    model = STEREO if "channels" in other else SMALL

    assert read(audio_file(**other), model).sha256 != read(audio_file()).sha256


def test_a_source_that_many_requests_share_is_read_once(tmp_path: Path, monkeypatch) -> None:
    made = []
    monkeypatch.setattr(
        clips, "_make", lambda *given, make=clips._make: made.append(given) or make(*given)
    )
    path, data, reader = tmp_path / "a.wav", audio_file(hertz=500), Reader()
    path.write_bytes(audio_file())

    for source in (path, Path(str(path)), data, data, bytes(bytearray(data))):
        reader.read({"continuation": source}, SMALL, 60)

    assert (len(made), len(reader.data)) == (2, 2)


def test_a_source_for_a_whole_batch_is_hashed_once(monkeypatch) -> None:
    data, reader, hashed = audio_file(), Reader(), []
    reader.read({"continuation": data}, SMALL, 60)
    monkeypatch.setattr("hashlib.sha256", hashed.append)

    reader.read({"continuation": data}, SMALL, 60)

    assert hashed == []


def test_clips_that_would_fill_the_memory_are_refused(monkeypatch) -> None:
    reader = Reader()
    first = reader.read({"continuation": audio_file()}, SMALL, 60)["continuation"]
    monkeypatch.setattr(clips, "MAX_BATCH_BYTES", len(first.data))

    with pytest.raises(InvalidRequestError, match="send fewer requests at a time"):
        reader.read({"continuation": audio_file(hertz=500)}, SMALL, 60)


@pytest.mark.parametrize("harm", ["gone", "cut", "another"])
def test_a_damaged_clip_is_rejected_for_good(harm: str) -> None:
    clip = read(audio_file())
    data = {"gone": b"", "cut": clip.data[:-200], "another": read(audio_file(hertz=441)).data}[harm]

    with pytest.raises(
        GenerationRejectedError,
        match=r"^The melody is damaged in the database; enqueue the request",
    ):
        clips.load("melody", data, clip.sha256)
