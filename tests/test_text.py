"""What is shown of text that is not what it seems, and what is left of text that is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgx_music.text import plain, plain_json, says_something

any_text = st.text(st.characters(exclude_categories=())) | st.text()

UNSEEN = {
    "C0": "\x1b",
    "C1": "\x9b",
    "delete": "\x7f",
    "soft hyphen": "\xad",
    "grapheme joiner": "\u034f",
    "arabic letter mark": "\u061c",
    "hangul filler": "\u3164",
    "hangul jungseong filler": "\u1160",
    "mongolian vowel separator": "\u180e",
    "zero-width space": "\u200b",
    "right-to-left mark": "\u200f",
    "line separator": "\u2028",
    "paragraph separator": "\u2029",
    "bidi override": "\u202e",
    "bidi isolate": "\u2067",
    "word joiner": "\u2060",
    "braille blank": "\u2800",
    "byte order mark": "\ufeff",
    "lone surrogate": "\udce9",
    "private use": "\ue000",
    "unassigned": "\u0378",
    "tag letter": "\U000e0041",
    "variation selector": "\U000e0100",
}


@pytest.mark.parametrize("character", UNSEEN.values(), ids=UNSEEN)
def test_what_cannot_be_seen_is_escaped_and_says_nothing(character: str) -> None:
    escaped = character.encode("unicode_escape").decode()

    assert plain(f"a{character}{character}b").endswith(f"{escaped}b")
    assert plain(character) == escaped
    assert not says_something(f" {character}{character} ")


@pytest.mark.parametrize("character", ["\ufffc", "\ufffd"])
def test_what_stands_for_something_lost_is_shown_and_says_nothing(character: str) -> None:
    assert plain(character) == character
    assert not says_something(f" {character}{character} ")
    assert says_something(f"caf{character} music")


@pytest.mark.parametrize(
    "text",
    [
        "trap beat, 140 BPM, ruhig ☂",
        "می‌خواهم آرام باشد",
        "क्‍ष",
        "שלום עולם",
        "雨の音　静か",
        "👩🏽‍💻 and ❤️‍🔥 and 🏳️‍🌈",
        "葛\U000e0100",
        "1️⃣ café",
        "\U0001faf8",
    ],
)
def test_text_of_every_script_is_shown_as_it_is(text: str) -> None:
    assert plain(text) == text
    assert says_something(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ad\u200dmin", "ad\\u200dmin"),
        ("\u200d", "\\u200d"),
        ("می\u200c", "می\\u200c"),
        ("👩\u200d\u200d💻", "👩\\u200d\\u200d💻"),
        ("😀\ufe0f\ufe0e", "😀\ufe0f\\ufe0e"),
        ("one\ntwo\tthree", "one\\x0atwo\\x09three"),
    ],
)
def test_a_joiner_or_a_selector_in_the_wrong_place_is_escaped(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"), [("\ufe0fa", "\\ufe0fa"), ("\u02ff\u200d\u02ff", "\u02ff\\u200d\u02ff")]
)
def test_a_selector_belongs_to_what_is_before_it_and_a_joiner_to_no_latin(
    text: str, shown: str
) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize("text", ["", " \n", "\u0301\u0308", "\u200b\ufeff\u3000"])
def test_accents_and_white_space_alone_say_nothing(text: str) -> None:
    assert not says_something(text)


@given(any_text)
def test_json_means_what_it_meant(text: str) -> None:
    shown = plain_json(json.dumps([text], ensure_ascii=False))

    assert json.loads(shown) == [text]
    assert not [character for character in UNSEEN.values() if character in shown]


@given(any_text)
def test_what_is_plain_stays_as_it_is(text: str) -> None:
    assert plain(plain(text)) == plain(text)
