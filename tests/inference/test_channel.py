from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgx_music.audio.samples import Audio
from dgx_music.inference.channel import Decoder, decode_request, encode, encode_request
from tests.inference.factories import make_request

json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)
headers = st.dictionaries(st.text(), json_values, max_size=4)


@settings(deadline=None)
@given(st.lists(st.tuples(headers, st.binary(max_size=50))), st.integers(1, 40))
def test_messages_survive_a_stream_that_is_cut_anywhere(messages: list[tuple[dict, bytes]], size: int) -> None:
    stream = b"".join(encode(header, payload) for header, payload in messages)
    decoder = Decoder()

    received = [item for at in range(0, len(stream), size) for item in decoder.feed(stream[at : at + size])]

    assert [(header, bytes(payload)) for header, payload in received] == messages


def test_a_message_is_held_back_until_its_last_byte() -> None:
    stream = encode({"kind": "audio"}, b"1234")
    decoder = Decoder()

    assert list(decoder.feed(stream[:-1])) == []
    assert list(decoder.feed(stream[-1:])) == [({"kind": "audio"}, b"1234")]


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
    (message,) = Decoder().feed(encode_request(7, sent))

    received = decode_request(message)

    assert (message.header["kind"], message.header["key"], "clips" in message.header) == ("generate", 7, bool(clips))
    assert {name: value for name, value in vars(received).items() if name not in clips} == {
        name: value for name, value in vars(sent).items() if name not in clips
    }
    for name, given_clip in clips.items():
        assert getattr(received, name).sample_rate == given_clip.sample_rate
        np.testing.assert_array_equal(getattr(received, name).samples, given_clip.samples)
