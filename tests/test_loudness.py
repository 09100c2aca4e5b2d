"""The loudness meter beside pyloudnorm's, whose numbers it has to the last digit."""

import numpy as np
import pyloudnorm
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgx_music.audio import loudness


def noise(seconds, rate=32_000, channels=2, amplitude=0.1):
    shape = (channels, round(seconds * rate))
    return (amplitude * np.random.default_rng(7).standard_normal(shape)).astype(np.float32)


def check_same(samples, rate):
    expected = pyloudnorm.Meter(rate).integrated_loudness(samples.T)
    assert loudness.measure(samples, rate) == (None if expected == -np.inf else expected)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 32_001, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("seconds", [0.41, 1.234, 5])
def test_noise_has_the_loudness_that_pyloudnorm_says(seconds, rate, channels):
    check_same(noise(seconds, rate, channels), rate)


def test_the_shortest_audio_with_a_loudness_is_one_block():
    check_same(noise(0.4), 32_000)
    assert loudness.measure(noise(0.4)[:, 1:], 32_000) is None


def test_quiet_parts_count_as_little_as_for_pyloudnorm():
    samples = noise(12)
    samples[:, 100_000:200_000] *= 0.1  # near the relative gate
    samples[:, 200_000:300_000] *= 0.001  # below the absolute one

    check_same(samples, 32_000)


def test_a_low_tone_after_a_high_one_is_filtered_across_the_parts():
    time = np.arange(5 * 32_000) / 32_000
    samples = np.where(time < 2, np.sin(2 * np.pi * 5_000 * time), np.sin(2 * np.pi * 40 * time))

    check_same(samples.astype(np.float32)[np.newaxis], 32_000)


def test_the_order_of_the_samples_in_memory_makes_no_difference():
    samples = noise(3)

    assert loudness.measure(np.asfortranarray(samples), 32_000) == loudness.measure(samples, 32_000)


@pytest.mark.parametrize("decibels", [-90, -75, -70, -68])
def test_the_absolute_gate_is_where_pyloudnorm_has_it(decibels):
    check_same(noise(2, amplitude=10 ** (decibels / 20)), 32_000)


def test_silence_has_no_loudness():
    assert loudness.measure(np.zeros((2, 32_000), np.float32), 32_000) is None


@settings(max_examples=40)
@given(
    levels=st.lists(st.integers(-80, 3), min_size=1, max_size=12),
    frames=st.integers(3_200, 9_000),
    channels=st.integers(1, 2),
)
def test_audio_of_changing_level_has_the_loudness_that_pyloudnorm_says(levels, frames, channels):
    samples = noise(len(levels) * frames / 8_000, 8_000, channels)
    samples *= np.repeat(10 ** (np.array(levels, np.float32) / 20), frames)

    check_same(samples, 8_000)
