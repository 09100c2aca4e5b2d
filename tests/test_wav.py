"""WAV files beside those of libsndfile."""

import io

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgx_music.audio import wav

STEP = 2.0**-15  # of 16 bits
EDGES = [
    -1,
    -1 + STEP,
    -STEP,
    -STEP / 2,
    -(2.0**-31),
    -(2.0**-32),
    -1e-30,
    0,
    1e-30,
    STEP / 2,
    STEP,
    1 - STEP,
    1,
]


def libsndfile_wav(samples, rate):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.T, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


@given(
    samples=arrays(
        np.float32,
        st.tuples(st.integers(1, 2), st.integers(1, 300)),
        elements=st.floats(-1, 1, width=32),
    ),
    rate=st.integers(8_000, 192_000),
)
def test_a_file_has_the_bytes_that_libsndfile_writes(samples, rate):
    assert wav.encode(samples, rate) == libsndfile_wav(samples, rate)


@pytest.mark.parametrize("towards", [-2, 2])
def test_samples_at_the_edge_of_a_step_are_rounded_as_libsndfile_rounds_them(towards):
    edges = np.array(EDGES, np.float32)
    beside = np.clip(np.nextafter(edges, np.float32(towards)), -1, 1)
    samples = np.stack([edges, beside])

    assert wav.encode(samples, 32_000) == libsndfile_wav(samples, 32_000)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_long_file_has_the_bytes_that_libsndfile_writes(order):
    samples = np.random.default_rng(7).uniform(-1, 1, (2, 200_000)).astype(np.float32, order=order)

    assert wav.encode(samples, 44_100) == libsndfile_wav(samples, 44_100)
