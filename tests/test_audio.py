import io
import math
import subprocess
import sys
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import get_args

import numpy as np
import pyloudnorm
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgx_music.audio.files import PEAK_LIMIT, check_format, finish, warm_up
from dgx_music.audio.formats import FORMATS
from dgx_music.audio.samples import Audio
from dgx_music.cli.output import waveform_text
from dgx_music.config import Loudness
from dgx_music.errors import EngineError, GenerationRejectedError
from dgx_music.validation import AudioFormat

RATE = 32_000
LOUDNESSES = get_args(Loudness)
ONE_STEP = 1 / 32_768  # of 16 bits
SAMPLE_RATES = st.sampled_from([8_000, 11_025, 22_050, 32_000, 32_001, 44_100, 48_000, 96_000])


def sine(seconds=1.0, hertz=997.0, amplitude=0.1, channels=1, rate=RATE):
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return Audio(np.tile(wave.astype(np.float32), (channels, 1)), rate)


def noise(seconds, channels=2, amplitude=0.2):
    shape = (channels, round(seconds * RATE))
    return Audio(
        (amplitude * np.random.default_rng(7).standard_normal(shape)).astype(np.float32), RATE
    )


def constant(value, frames):
    return Audio(np.full((1, frames), value, np.float32), RATE)


def finished(audio, **given):
    options = {
        "sample_rate": audio.sample_rate,
        "channels": audio.samples.shape[0],
        "audio_format": "wav",
    }
    return finish(audio, **options | {"loudness": "lufs"} | given)


def decode(file):
    """Return the file's samples, float64 [frame, channel], and its sample rate."""
    return soundfile.read(io.BytesIO(file.data), always_2d=True)


def peak_of(file):
    return np.abs(decode(file)[0]).max()


# Loudness


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_sine_at_minus_20_dbfs_lands_at_minus_14_lufs(audio_format, channels):
    file = finished(sine(3, 1_000, 0.1, channels), audio_format=audio_format)

    samples, rate = decode(file)
    assert pyloudnorm.Meter(rate).integrated_loudness(samples) == pytest.approx(-14, abs=0.1)
    assert file.facts["loudness_lufs"] == -14


def test_a_sine_at_minus_14_lufs_has_the_amplitude_that_bs1770_says():
    """The oracle is ITU-R BS.1770 itself: a full-scale sine of 997 Hz in one channel reads -3.01 LKFS."""
    file = finished(sine(3, 997))

    assert 20 * math.log10(peak_of(file)) == pytest.approx(-14 + 3.01, abs=0.05)


def test_a_clip_with_sharp_peaks_stops_at_the_peak_limit_before_minus_14_lufs():
    audio = sine(3, amplitude=0.01)
    audio.samples[0, RATE] = 1.0

    file = finished(audio)

    assert peak_of(file) == pytest.approx(PEAK_LIMIT, abs=ONE_STEP)
    assert file.facts["loudness_lufs"] < -40


@pytest.mark.parametrize("loudness", LOUDNESSES)
def test_the_loudness_told_is_the_loudness_of_the_file(loudness):
    file = finished(noise(2), loudness=loudness)

    samples, rate = decode(file)
    assert file.facts["loudness_lufs"] == pytest.approx(
        pyloudnorm.Meter(rate).integrated_loudness(samples), abs=0.02
    )


@pytest.mark.parametrize("amplitude", [0.001, 0.5, 1.5])
def test_peak_scales_to_minus_1_dbfs_from_both_sides(amplitude):
    file = finished(sine(1, amplitude=amplitude), loudness="peak")

    assert peak_of(file) == pytest.approx(10 ** (-1 / 20), abs=ONE_STEP)


def test_none_leaves_the_samples_as_they_are():
    audio = noise(0.5, amplitude=0.1)

    samples, _ = decode(finished(audio, loudness="none"))

    np.testing.assert_allclose(samples.T, audio.samples, atol=ONE_STEP)


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
def test_an_overshoot_is_clipped_and_never_wraps(audio_format):
    audio = Audio(np.array([[1.5, -1.5, 0.5]], np.float32), RATE)

    samples, _ = decode(finished(audio, loudness="none", audio_format=audio_format))

    np.testing.assert_allclose(samples[:, 0], [1, -1, 0.5], atol=ONE_STEP)


# Odd clips


@pytest.mark.parametrize("loudness", LOUDNESSES)
@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize("seconds", [0.08, 2])
def test_silence_stays_silence(seconds, audio_format, loudness):
    file = finished(
        constant(0, round(seconds * RATE)), audio_format=audio_format, loudness=loudness
    )

    assert not decode(file)[0].any()
    assert (file.facts["peak"], file.facts["loudness_lufs"]) == (0, None)


@pytest.mark.parametrize("loudness", ["lufs", "peak"])
def test_a_hiss_below_the_gate_is_not_made_music(loudness):
    file = finished(noise(1, amplitude=0.00005), loudness=loudness)

    assert peak_of(file) < 0.001


@pytest.mark.parametrize(("decibels", "peak"), [(-71, 10 ** (-71 / 20)), (-69, PEAK_LIMIT)])
def test_what_is_above_the_gate_is_music(decibels, peak):
    file = finished(sine(amplitude=10 ** (decibels / 20)), loudness="peak")

    assert peak_of(file) == pytest.approx(peak, abs=ONE_STEP)


@pytest.mark.parametrize("frames", [1, 2_560, 12_799])
@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_clip_too_short_for_a_loudness_gets_the_peak_limit(audio_format, frames):
    file = finished(constant(0.2, frames), audio_format=audio_format)

    assert file.facts["peak"] == pytest.approx(PEAK_LIMIT, abs=1e-4)
    assert file.facts["loudness_lufs"] is None
    assert len(decode(file)[0]) == frames


def test_the_shortest_clip_with_a_loudness_is_0_4_seconds():
    assert finished(sine(0.4)).facts["loudness_lufs"] == -14


def test_a_constant_offset_survives():
    assert peak_of(finished(constant(0.5, RATE))) <= PEAK_LIMIT + ONE_STEP


@pytest.mark.parametrize("loudness", LOUDNESSES)
@pytest.mark.parametrize("sample_rate", [RATE, 44_100])
def test_the_largest_numbers_survive(sample_rate, loudness):
    audio = Audio(np.full((2, RATE), np.finfo(np.float32).max), RATE)

    file = finished(audio, channels=1, sample_rate=sample_rate, loudness=loudness)

    assert 0.5 < peak_of(file) <= 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_samples_that_are_not_finite_are_refused(bad):
    audio = sine()
    audio.samples[0, 100] = bad

    with pytest.raises(EngineError, match="NaN or infinite"):
        finished(audio)


@pytest.mark.parametrize("shape", [(1, 0), (3, 100), (100,), (1, 1, 100)])
def test_audio_of_another_shape_is_refused(shape):
    audio = Audio(np.zeros(shape, np.float32), RATE)

    with pytest.raises(EngineError, match="shape"):
        finished(audio, channels=1)


@settings(max_examples=60)
@given(
    samples=arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(1, 5_000)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
        fill=st.just(0.25),
    ),
    channels=st.integers(1, 2),
    sample_rate=SAMPLE_RATES,
    loudness=st.sampled_from(LOUDNESSES),
)
def test_any_finite_input_gives_finite_samples_within_full_scale(
    samples, channels, sample_rate, loudness
):
    file = finished(
        Audio(samples, 8_000), channels=channels, sample_rate=sample_rate, loudness=loudness
    )

    assert np.isfinite(decode(file)[0]).all()
    assert 0 <= file.facts["peak"] <= (1 if loudness == "none" else PEAK_LIMIT + 1e-4)
    assert all(0 <= point <= 1 for point in file.facts["waveform"])


# Channels, sample rates, formats


def test_each_format_of_the_setting_is_in_the_table():
    assert {*FORMATS} == {*get_args(AudioFormat)}


def test_mono_is_duplicated_to_two_channels():
    samples, _ = decode(finished(sine(), channels=2))

    assert samples.shape == (RATE, 2)
    np.testing.assert_array_equal(samples[:, 0], samples[:, 1])


def test_stereo_is_averaged_to_one_channel():
    audio = Audio(np.stack([np.full(100, 0.5), np.full(100, -0.1)]).astype(np.float32), RATE)

    samples, _ = decode(finished(audio, channels=1, loudness="none"))

    np.testing.assert_allclose(samples, np.full((100, 1), 0.2), atol=ONE_STEP)


def test_channels_of_opposite_phase_do_not_become_silence() -> None:
    left = sine(amplitude=0.25).samples
    audio = Audio(np.concatenate([left, -0.9 * left]), RATE)

    samples, _ = decode(finished(audio, channels=1, loudness="none"))

    assert np.abs(samples).max() == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(("right", "peak"), [(-0.5, 0.25), (-0.4, 0.075)])
def test_the_loudest_channel_stands_for_all_where_less_than_a_quarter_would_be_left(right, peak):
    left = sine(amplitude=0.25).samples
    audio = Audio(np.concatenate([left, right * left]), RATE)

    assert peak_of(finished(audio, channels=1, loudness="none")) == pytest.approx(peak, abs=1e-3)


@pytest.mark.parametrize(("opposite_seconds", "peak"), [(1, 0.1875), (2, 0.25)])
def test_a_tenth_of_the_music_may_be_lost_in_the_average(opposite_seconds, peak):
    audio = sine(20, amplitude=0.25, channels=2)
    audio.samples[1] *= 0.5
    audio.samples[1, 5 * RATE : (5 + opposite_seconds) * RATE] *= -1.8

    assert peak_of(finished(audio, channels=1, loudness="none")) == pytest.approx(peak, abs=1e-3)


@settings(max_examples=60)
@given(
    frames=st.integers(1, 20_000),
    from_rate=SAMPLE_RATES,
    to_rate=SAMPLE_RATES,
    audio_format=st.sampled_from(["wav", "flac"]),
)
def test_a_lossless_file_has_exactly_the_frames_of_its_duration(
    frames, from_rate, to_rate, audio_format
):
    audio = Audio(np.full((1, frames), 0.1, np.float32), from_rate)

    file = finished(audio, sample_rate=to_rate, audio_format=audio_format)

    samples, rate = decode(file)
    assert (rate, len(samples)) == (to_rate, max(1, round(frames * to_rate / from_rate)))


@pytest.mark.parametrize("frames", [1, 2, 10, 18, 160])
def test_a_length_between_two_frames_is_rounded_and_never_0(frames):
    file = finished(constant(0.1, frames), sample_rate=8_000)

    assert len(decode(file)[0]) == max(1, round(frames / 4))


def test_resampling_keeps_the_pitch():
    samples, rate = decode(finished(sine(1, 1_000), sample_rate=44_100))

    assert rate == 44_100
    assert np.abs(np.fft.rfft(samples[:, 0])).argmax() == 1_000


@pytest.mark.parametrize("audio_format", ["mp3", "ogg"])
@pytest.mark.parametrize("seconds", [0.08, 3])
def test_a_lossy_file_lasts_as_long_within_the_padding_of_its_codec(seconds, audio_format):
    file = finished(sine(seconds, channels=2), audio_format=audio_format)

    samples, rate = decode(file)
    assert rate == RATE
    assert abs(len(samples) - seconds * RATE) <= 1_152


@pytest.mark.parametrize("audio_format", ["mp3", "ogg"])
def test_a_lossy_file_sounds_like_what_went_in(audio_format):
    chord = sum(sine(2, hertz, 0.05).samples for hertz in (110, 277, 440, 880, 1_760, 3_520))

    samples, _ = decode(finished(Audio(chord, RATE), loudness="none", audio_format=audio_format))

    noise_power = np.square(samples.T - chord).mean()
    assert 10 * math.log10(np.square(chord).mean() / noise_power) > 20


@pytest.mark.parametrize("sample_rate", FORMATS["mp3"].sample_rates)
def test_mp3_holds_each_of_its_sample_rates(sample_rate):
    file = finished(sine(0.1), sample_rate=sample_rate, audio_format="mp3")

    assert decode(file)[1] == sample_rate


@pytest.mark.parametrize("sample_rate", [31_999, 96_000])
def test_a_sample_rate_that_mp3_cannot_hold_is_rejected_before_any_work(sample_rate):
    with pytest.raises(
        GenerationRejectedError, match=r"32,000, 44,100, 48,000 Hz, or another audio format"
    ):
        check_format("mp3", sample_rate)
    with pytest.raises(GenerationRejectedError):
        finished(constant(math.nan, 1), sample_rate=sample_rate, audio_format="mp3")


@pytest.mark.soak
@pytest.mark.parametrize("audio_format", FORMATS)
def test_five_minutes_of_stereo_survive(audio_format):
    file = finished(noise(300), audio_format=audio_format, sample_rate=44_100)

    info = soundfile.info(io.BytesIO(file.data))
    assert info.frames == pytest.approx(300 * 44_100, abs=1_152)


# Facts and the picture


def reference_lufs(samples, rate):
    if samples.shape[1] < 0.4 * rate:
        return None
    return float(pyloudnorm.Meter(rate).integrated_loudness(samples.T))


def reference_levels(audio, loudness):
    """Return the samples at the level asked for, and their loudness as pyloudnorm measures it."""
    if loudness == "none":
        samples = np.clip(audio.samples, -1, 1)
        return samples, reference_lufs(samples, audio.sample_rate)
    samples = audio.samples * np.float32(PEAK_LIMIT / float(np.abs(audio.samples).max()))
    lufs = reference_lufs(samples, audio.sample_rate)
    if loudness == "peak" or lufs is None or lufs < -14:
        return samples, lufs
    return samples * np.float32(10 ** ((-14 - lufs) / 20)), -14


def reference_file(samples, rate, audio_format):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, format=audio_format, subtype="PCM_16")
    return buffer.getvalue()


def reference_waveform(samples):
    frames = samples.shape[1]
    edges = [point * frames // 1_000 for point in range(1_001)]
    peaks = [float(np.abs(samples[:, start:end]).max()) for start, end in pairwise(edges)]
    return np.round(peaks, 4).tolist()


@pytest.mark.parametrize("loudness", LOUDNESSES)
@pytest.mark.parametrize("audio_format", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("seconds", "amplitude"), [(0.08, 0.2), (3, 0.01), (3, 0.5), (2.345, 3)])
def test_file_and_facts_are_those_of_soundfile_and_pyloudnorm(
    seconds, amplitude, channels, audio_format, loudness
):
    audio = noise(seconds, channels, amplitude)
    samples, lufs = reference_levels(audio, loudness)

    file = finished(audio, audio_format=audio_format, loudness=loudness)

    assert file.data == reference_file(samples, RATE, audio_format)
    assert file.facts["peak"] == round(float(np.abs(samples).max()), 4)
    assert file.facts["loudness_lufs"] == (None if lufs is None else round(lufs, 2))
    assert file.facts["waveform"] == reference_waveform(samples)


def test_finishing_leaves_the_samples_of_the_engine_alone():
    audio = noise(1, amplitude=3)
    audio.samples.flags.writeable = False

    assert finished(audio, loudness="none").facts["peak"] == 1


def test_the_facts_describe_the_file():
    facts = finished(
        sine(2, amplitude=0.5), channels=2, sample_rate=16_000, audio_format="flac", loudness="none"
    ).facts

    assert facts["duration_seconds"] == 2
    assert (facts["sample_rate"], facts["channels"], facts["format"]) == (16_000, 2, "flac")
    assert facts["peak"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("frames", "points"), [(1, 1), (999, 999), (1_000, 1_000), (1_001, 1_000), (96_007, 1_000)]
)
def test_the_waveform_has_at_most_1000_points(frames, points):
    assert len(finished(constant(0.5, frames)).facts["waveform"]) == points


def test_the_waveform_follows_the_louder_channel_over_time():
    samples = np.zeros((2, 10_000), np.float32)
    samples[1, 5_000:] = -0.1

    waveform = finished(Audio(samples, RATE), loudness="none").facts["waveform"]

    assert waveform == [0] * 500 + [0.1] * 500


def test_the_picture_is_a_line_of_blocks():
    assert waveform_text([0, 0.2, 0.4, 0.6, 0.8, 1.0]) == "▁▂▄▅▇█"


def test_the_picture_keeps_the_peak_of_each_part():
    assert waveform_text([0.0, 1.0, 0.0, 0.0], width=2) == "█▁"


@given(st.lists(st.floats(0, 1)), st.integers(1, 200))
def test_the_picture_fits_its_width(waveform, width):
    assert len(waveform_text(waveform, width)) == min(len(waveform), width)


# Threads and imports


def test_many_threads_leave_the_warning_filters_alone():
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: finished(constant(0, 12_800), loudness="none"), range(300)))
    finally:
        sys.setswitchinterval(interval)
    assert warnings.filters == before


@pytest.mark.parametrize(("frames", "is_imported"), [(12_799, False), (12_800, True)])
def test_the_meter_is_imported_only_for_a_clip_long_enough_to_be_measured(frames, is_imported):
    code = (
        "import sys, numpy; from dgx_music.audio.files import Audio, finish;"
        f"audio = Audio(numpy.full((1, {frames}), 0.1, numpy.float32), 32000);"
        "finish(audio, sample_rate=32000, channels=1, audio_format='wav', loudness='lufs');"
        "print('pyloudnorm' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(
        is_imported
    )


def test_warm_up_imports_the_meter(monkeypatch):
    monkeypatch.delitem(sys.modules, "pyloudnorm")

    warm_up()

    assert "pyloudnorm" in sys.modules


@pytest.mark.parametrize("audio_format", ["wav", "flac"])
@pytest.mark.parametrize(("may_overwrite", "copies"), [(False, 1.7), (True, 0.7)])
def test_a_longer_clip_takes_its_file_and_one_copy_of_its_samples(
    audio_format, may_overwrite, copies
):
    """The copy is at the level of the file; in place, there is none."""

    def peak_bytes(seconds):
        clip = noise(seconds, channels=1)
        tracemalloc.start()
        finished(clip, audio_format=audio_format, may_overwrite=may_overwrite)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    assert peak_bytes(90) - peak_bytes(60) < copies * noise(30, channels=1).samples.nbytes


@pytest.mark.parametrize("loudness", ["lufs", "peak", "none"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_file_is_the_same_whether_its_samples_may_be_overwritten_or_not(loudness, channels):
    clip = noise(2, channels=1)
    options = {"loudness": loudness, "channels": channels}
    kept, before = finished(clip, **options), clip.samples.copy()

    assert np.array_equal(clip.samples, before)
    assert finished(clip, **options, may_overwrite=True).data == kept.data


def test_samples_that_cannot_be_overwritten_are_copied():
    clip = noise(1, channels=1)
    clip.samples.flags.writeable = False

    assert finished(clip, may_overwrite=True).data == finished(clip).data
