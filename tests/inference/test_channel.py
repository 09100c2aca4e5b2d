from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dgx_music.inference.channel import Decoder, encode

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
