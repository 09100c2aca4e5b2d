from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgx_music.audio.samples import Audio
from dgx_music.inference.channel import Decoder, encode, encode_in_parts
from dgx_music.inference.messages import EngineInfo, Finished, Generate, Message, Progress, Ready
from tests.inference.factories import make_request

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5
)
infos = st.builds(
    EngineInfo, st.integers(), st.text(), st.text(), st.none() | st.text(), st.integers()
)
messages_of_all_shapes = st.one_of(
    st.builds(
        Generate,
        st.integers(),
        st.dictionaries(st.text(), json_values, max_size=4),
        st.just({}),
        st.binary(max_size=50),
    ),
    st.builds(Ready, st.text(), infos),
    st.builds(Progress, st.integers(), st.floats(0, 1)),
)


@given(st.lists(messages_of_all_shapes), st.integers(1, 40))
def test_messages_survive_a_stream_that_is_cut_anywhere(messages: list[Message], size: int) -> None:
    stream = b"".join(map(encode, messages))
    decoder = Decoder()

    received = [
        item for at in range(0, len(stream), size) for item in decoder.feed(stream[at : at + size])
    ]

    assert received == messages


def test_a_message_is_held_back_until_its_last_byte() -> None:
    message = Finished(1, [1, 1], 8_000, {}, b"1234")
    stream = encode(message)
    decoder = Decoder()

    assert list(decoder.feed(stream[:-1])) == []
    assert list(decoder.feed(stream[-1:])) == [message]


def clip(channels: int, frames: int, rate: int) -> Audio:
    samples = np.random.default_rng(frames).uniform(-1, 1, (channels, frames)).astype(np.float32)
    return Audio(samples, rate)


@pytest.mark.parametrize(
    "clips",
    [
        {},
        {"continuation": clip(2, 8_001, 16_000)},
        {"melody": clip(1, 9_000, 8_000)},
        {"continuation": clip(2, 8_001, 16_000), "melody": clip(1, 9_000, 8_000)},
    ],
)
def test_a_request_travels_with_its_clips(clips: dict[str, Audio]) -> None:
    sent = make_request(model="musicgen-melody", duration=5, negative_prompt="drums", **clips)
    (message,) = Decoder().feed(encode(Generate.of(7, sent)))

    assert isinstance(message, Generate)
    received = message.request()

    assert (message.key, message.clips.keys()) == (7, clips.keys())
    assert {name: value for name, value in vars(received).items() if name not in clips} == {
        name: value for name, value in vars(sent).items() if name not in clips
    }
    for name, given_clip in clips.items():
        assert getattr(received, name).sample_rate == given_clip.sample_rate
        np.testing.assert_array_equal(getattr(received, name).samples, given_clip.samples)


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_long_clip_is_sent_without_a_copy_and_read_to_where_it_stays() -> None:
    long = Audio(np.zeros((1, 320_000), np.float32), 32_000)
    finished = Finished.of(1, long)
    sent = encode(finished)
    pieces = [memoryview(sent)[at : at + 65_536] for at in range(0, len(sent), 65_536)]
    decoder = Decoder()

    assert peak_bytes(lambda: encode_in_parts(finished)) < 0.1 * long.samples.nbytes
    assert (
        peak_bytes(lambda: [message for piece in pieces for message in decoder.feed(piece)])
        < 1.1 * long.samples.nbytes
    )


def test_a_request_with_one_clip_is_sent_without_a_copy() -> None:
    tune = clip(1, 320_000, 32_000)
    request = make_request(model="musicgen-melody", duration=5, melody=tune)
    assert peak_bytes(lambda: encode_in_parts(Generate.of(1, request))) < 0.1 * tune.samples.nbytes
