from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from enum import IntEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgx_music import validation
from dgx_music.catalog import MODELS
from dgx_music.errors import InvalidRequestError

any_text = st.text(st.characters(exclude_categories=())) | st.text()
anything = st.one_of(
    any_text,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(),
    st.lists(st.integers()),
)


def refused(check: Callable[..., object], *arguments: object) -> str:
    """Return the sentence with which the check refuses."""
    with pytest.raises(InvalidRequestError) as caught:
        check(*arguments)
    return str(caught.value)


def accepted(check: Callable[..., Any], *arguments: object) -> Any:
    """Return what the check returns, ``None`` if it refuses."""
    try:
        return check(*arguments)
    except InvalidRequestError:
        return None


# text


def test_a_prompt_loses_the_white_space_around_it() -> None:
    assert validation.check_prompt("  warm\tpads\nand rain \n") == "warm\tpads\nand rain"


def test_an_empty_prompt_asks_for_unconditional_music() -> None:
    assert validation.check_prompt("") == ""


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "negative_prompt is empty; say what the music must not be like, or leave it out."),
        (" \n", "negative_prompt is empty; say what the music must not be like, or leave it out."),
        ("x" * 2_001, "negative_prompt has 2,001 characters; use at most 2,000."),
        (7, "negative_prompt is 7; use text."),
    ],
)
def test_a_negative_prompt_is_refused_in_one_sentence(text: object, sentence: str) -> None:
    assert refused(validation.check_negative_prompt, text) == sentence


@pytest.mark.parametrize("kind", ["", "drums", 7, None, ["mix"]])
def test_another_kind_of_melody_is_refused(kind: object) -> None:
    message = f"melody_kind is {validation.shown(kind)}; use auto, solo, mix or stems."
    assert refused(validation.check_melody_kind, kind) == message


def test_a_kind_of_melody_needs_a_melody() -> None:
    told = "melody_kind is mix, but there is no melody; give a melody, or leave it out."
    assert refused(validation.check_has_melody, "mix") == told
    validation.check_has_melody("auto")


def test_a_negative_prompt_is_clean_text_too() -> None:
    assert validation.check_negative_prompt(" drums\r\nand bass ") == "drums\nand bass"


def test_a_negative_prompt_without_guidance_has_no_effect() -> None:
    told = "negative_prompt has no effect with a guidance_scale of 1; use one above 1, or leave it out."
    assert refused(validation.check_guided, "negative_prompt", 1.0) == told
    validation.check_guided("negative_prompt", 1.01)


@pytest.mark.parametrize("length", [1, 2_000])
def test_a_prompt_of_the_least_and_greatest_length_is_accepted(length: int) -> None:
    assert len(validation.check_prompt(" " + "ü" * length)) == length


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (
            " ",
            "prompt is only white space; describe the music, or give an empty prompt for unconditional music.",
        ),
        (
            "\r\n\t",
            "prompt is only white space; describe the music, or give an empty prompt for unconditional music.",
        ),
        ("x" * 2_001, "prompt has 2,001 characters; use at most 2,000."),
        (None, "prompt is missing; use text."),
        (b"rain", "prompt is b'rain'; use text."),
        (["x" * 50], "prompt is a list too long to show; use text."),
        (
            "a\x00b",
            "prompt has the control character U+0000; newlines and tabs are the only control characters allowed.",
        ),
        (
            "a\ud800",
            "prompt has a lone surrogate, which is not a character; send well-formed Unicode.",
        ),
    ],
)
def test_a_prompt_is_refused_in_one_sentence(prompt: object, sentence: str) -> None:
    assert refused(validation.check_prompt, prompt) == sentence


INVISIBLE = [
    "\u200b",
    "\u202e \u2066",
    "\U000e0041\U000e0042",
    "\ufe0f",
    "\u3164",
    "\u0301",
    "\ue000",
    "\u0378",
    "\u2800",
]


@pytest.mark.parametrize("text", INVISIBLE)
@pytest.mark.parametrize(
    "check", [validation.check_prompt, validation.check_negative_prompt, validation.check_search]
)
def test_text_that_nobody_can_see_is_refused(check: Callable[..., str], text: str) -> None:
    assert "has no character that can be seen on its own; " in refused(check, f" {text}{text}")
    assert check(f"{text}雨") == f"{text}雨"


@pytest.mark.parametrize("name", INVISIBLE)
def test_a_name_that_nobody_can_see_is_refused(name: str) -> None:
    assert refused(validation.check_name, "tenant", name).startswith(
        "tenant has no character that can be seen"
    )


def test_bytes_that_are_no_text_are_named() -> None:
    told = "prompt has the byte 0xE9, which is no text here; send UTF-8, in a locale of UTF-8 such as C.UTF-8."
    assert refused(validation.check_prompt, b"caf\xe9".decode(errors="surrogateescape")) == told


class Word(str):
    __slots__ = ()


def test_of_a_subclass_only_the_text_and_the_number_are_kept() -> None:
    assert type(validation.check_prompt(Word("rain"))) is str
    assert type(validation.check_integer("x", IntEnum("Number", {"TWO": 2})(2), 0, 9)) is int


@pytest.mark.parametrize("check", [validation.check_name, validation.check_path])
def test_a_name_of_a_subclass_is_plain_text(check: Callable[..., str]) -> None:
    assert type(check("model", Word("rain"))) is str


@pytest.mark.parametrize("byte", [0x80, 0xFF])
def test_the_least_and_the_greatest_byte_that_is_no_text_are_named(byte: int) -> None:
    assert f"has the byte 0x{byte:02X}, " in refused(validation.check_prompt, chr(0xDC00 + byte))


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)])
def test_tab_and_newline_are_the_only_control_characters(code: int) -> None:
    assert (accepted(validation.check_prompt, f"a{chr(code)}b") is not None) == (
        chr(code) in "\t\n"
    )


@given(anything)
def test_an_accepted_prompt_survives_every_encoding_and_a_second_check(value: object) -> None:
    prompt = accepted(validation.check_prompt, value)
    if prompt is not None:
        assert prompt.encode().decode() == json.loads(json.dumps(prompt)) == prompt
        assert validation.check_prompt(prompt) == prompt


# clips


@pytest.mark.parametrize("seconds", [0.08, 30])
def test_a_clip_of_the_least_and_greatest_length_is_accepted(seconds: float) -> None:
    validation.check_continuation(seconds, 31)


@pytest.mark.parametrize(
    ("seconds", "duration", "sentence"),
    [
        (0.079, 10, "continuation is 0.079 s long; use a clip of 0.08 to 30 seconds."),
        (30.01, 60, "continuation is 30.01 s long; use a clip of 0.08 to 30 seconds."),
        (
            10,
            10,
            "continuation is 10 s long, and the duration of 10 s counts from its start; "
            "use a longer duration, or a shorter clip.",
        ),
    ],
)
def test_what_music_cannot_go_on_from_is_refused(
    seconds: float, duration: float, sentence: str
) -> None:
    assert refused(validation.check_continuation, seconds, duration) == sentence


@pytest.mark.parametrize(
    ("model", "able"),
    [("musicgen-small", "musicgen-melody"), ("musicgen-stereo-large", "musicgen-stereo-melody")],
)
def test_a_melody_for_a_model_that_hears_none_is_refused_with_one_that_does(
    model: str, able: str
) -> None:
    told = f"melody is given for {model}, which hears none; use {able}."
    assert refused(validation.check_hears_melody, MODELS[model]) == told


@pytest.mark.parametrize(
    "model", ["musicgen-melody", "musicgen-stereo-melody-large", "/models/mine"]
)
def test_a_model_that_may_hear_a_melody_gets_it(model: str) -> None:
    validation.check_hears_melody(validation.check_model(model))


@pytest.mark.parametrize("name", ["k", "k" * 200, "order 7/é"])
def test_a_name_is_returned_as_it_is(name: str) -> None:
    assert validation.check_name("idempotency_key", name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("k" * 201, "has 201 characters"),
        ("a\nb", "has a line break or tab"),
        ("a\tb", "has a line break or tab"),
        ("a\x7f", "has the control character U+007F"),
        ("\udfff", "has a lone surrogate"),
        (7, "is 7; use text"),
    ],
)
def test_a_name_is_refused(name: object, problem: str) -> None:
    assert refused(validation.check_name, "idempotency_key", name).startswith(
        f"idempotency_key {problem}"
    )


@given(anything)
def test_an_accepted_name_survives_every_encoding(value: object) -> None:
    name = accepted(validation.check_name, "name", value)
    if name is not None:
        assert name.encode().decode() == json.loads(json.dumps(name)) == value


@pytest.mark.parametrize("length", [1, validation.MAX_PATH_CHARACTERS])
def test_a_path_of_the_least_and_greatest_length_is_accepted(length: int) -> None:
    assert validation.check_path("file_path", "p" * length) == "p" * length


@pytest.mark.parametrize(
    "path", ["", "p" * (validation.MAX_PATH_CHARACTERS + 1), "a\x00b", "\ud800", None, b"p"]
)
def test_a_path_is_refused(path: object) -> None:
    assert refused(validation.check_path, "file_path", path).startswith("file_path ")


@given(any_text)
def test_a_tidy_text_is_one_that_every_database_keeps(message: str) -> None:
    text = validation.tidy_text(message)

    assert text.encode().decode() == text
    assert 1 <= len(text) <= validation.MAX_MESSAGE_CHARACTERS
    assert validation._clean_text("message", text, "") == text


def test_what_cannot_be_printed_is_shown_in_a_tidy_text() -> None:
    assert validation.tidy_text(" a\x00b\ud800\n") == "a\ufffdb\ufffd"
    assert validation.tidy_text(" \n") == "no message"


def test_a_tidy_text_is_cut_after_2000_characters() -> None:
    assert validation.tidy_text("x" * 2_000 + "y") == "x" * 2_000


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_the_catalog_is_known(name: str) -> None:
    assert validation.check_model(name) is MODELS[name]


def test_an_absolute_path_is_a_model() -> None:
    assert validation.check_model("/models/mine").name == "/models/mine"


@pytest.mark.parametrize("name", ["musicgen", "models/mine", "./mine"])
def test_an_unknown_model_is_refused_with_those_that_are_known(name: str) -> None:
    sentence = refused(validation.check_model, name)

    assert sentence.startswith(f"model {name!r} is not known; use musicgen-small, ")
    assert sentence.endswith("or a local folder's absolute path.")


# numbers


@pytest.mark.parametrize("seconds", [0.08, 1, 29.999, 30])
def test_a_duration_within_the_limits_is_a_float(seconds: float) -> None:
    duration = validation.check_duration(seconds, 30)

    assert (duration, type(duration)) == (seconds, float)


@pytest.mark.parametrize(
    "seconds", [math.nextafter(0.08, 0), 0, -0.0, -1, math.nextafter(30, 31), 10**400]
)
def test_a_duration_just_past_a_limit_is_refused(seconds: float) -> None:
    assert refused(validation.check_duration, seconds, 30).startswith("duration is ")


@pytest.mark.parametrize(
    ("seconds", "told"), [(300.0001, "300.0001"), (math.nextafter(0.08, 0), "0.07999999999999999")]
)
def test_a_number_just_past_a_limit_is_not_told_as_the_limit(seconds: float, told: str) -> None:
    assert (
        refused(validation.check_duration, seconds, 300)
        == f"duration is {told} s; use 0.08 to 300 seconds."
    )
    assert f"is {told}" in refused(validation.check_clip, "melody", seconds)
    assert (
        refused(validation.check_between, "x", seconds, 1, 300)
        == f"x is {told}; use a number from 1 to 300."
    )


@pytest.mark.parametrize("value", [-1, 2**64 - 1, 1.5, "7", True])
def test_a_seed_that_is_none_is_told_how_to_ask_for_a_random_one(value: object) -> None:
    told = "; use a whole number from 0 to 9223372036854775807, or leave it out for a random one."
    assert refused(validation.check_seed, value).endswith(told)


class Unspeakable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("value", [10**5000, Unspeakable()], ids=["number", "object"])
def test_what_cannot_be_shown_is_refused_in_a_sentence_all_the_same(value: object) -> None:
    for check in (
        validation.check_prompt,
        validation.check_metadata,
        validation.check_run_at,
        validation.check_seed,
    ):
        assert f"is a {type(value).__name__} too long to show; " in refused(check, value)
    assert "too long to show; use a number above 0." in refused(
        validation.check_positive, "x", value
    )


NOT_NUMBERS = [None, "1", True, math.nan, math.inf, -math.inf, 1j, [1], 10**400]


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    for check, limits in ((validation.check_duration, (30,)), (validation.check_between, (0, 1))):
        arguments = ("x", value) if check is validation.check_between else (value,)
        assert "; use " in refused(check, *arguments, *limits)
    assert refused(validation.check_positive, "x", value).endswith("; use a number above 0.")


@pytest.mark.parametrize("value", [5e-324, 1, 1e308])
def test_a_number_above_zero_is_positive(value: float) -> None:
    assert validation.check_positive("speed", value) == value


@pytest.mark.parametrize("value", [0, -0.0, -5e-324])
def test_zero_and_below_is_not_positive(value: float) -> None:
    assert refused(validation.check_positive, "speed", value).startswith("speed is ")


@given(st.floats(), st.floats(-5, 5), st.floats(0, 5))
def test_a_number_is_accepted_just_when_it_lies_between(
    value: float, low: float, width: float
) -> None:
    high = low + width

    assert accepted(validation.check_between, "x", value, low, high) == (
        value if low <= value <= high else None
    )


@given(st.integers(), st.integers(-50, 50), st.integers(0, 50))
def test_a_whole_number_is_accepted_just_when_it_lies_between(
    value: int, low: int, width: int
) -> None:
    high = low + width

    assert accepted(validation.check_integer, "x", value, low, high) == (
        value if low <= value <= high else None
    )


@pytest.mark.parametrize("value", [-1, 4, 1.0, "1", True, None, math.nan])
def test_what_is_no_whole_number_within_the_limits_is_refused(value: object) -> None:
    assert refused(validation.check_integer, "top_k", value, 0, 3).endswith(
        "; use a whole number from 0 to 3."
    )


def test_a_huge_number_is_not_shown() -> None:
    sentence = refused(validation.check_integer, "seed", 10**60, 0, 9)

    assert sentence == "seed is a int too long to show; use a whole number from 0 to 9."


def test_a_value_is_shown_in_at_most_40_characters() -> None:
    assert [validation.shown("x" * 38), validation.shown("x" * 39)] == [
        f"'{'x' * 38}'",
        "a str too long to show",
    ]


# time


def test_a_moment_is_returned_in_utc() -> None:
    moment = datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=2)))

    assert validation.check_run_at(moment).isoformat() == "2025-12-31T23:00:00+00:00"


def test_a_moment_may_be_iso_text() -> None:
    assert validation.check_run_at("2026-01-31T13:00:00+01:00") == datetime(
        2026, 1, 31, 12, tzinfo=UTC
    )


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (datetime(2026, 1, 1), "has no time zone; add one"),  # noqa: DTZ001 - that is the point
        ("2026-01-01", "has no time zone; add one"),
        (
            datetime.max.replace(tzinfo=timezone(-timedelta(hours=1))),
            "is 9999-12-31T23:59:59.999999-01:00; use a date",
        ),
        ("0001-01-01T00:00:00+01:00", "is 0001-01-01T00:00:00+01:00; use a date"),
        (1_700_000_000, "is 1700000000; use a datetime"),
        ("tomorrow", "is 'tomorrow'; use a time such as"),
        ("", "is ''; use a time such as"),
        (None, "is missing; use a datetime"),
    ],
)
def test_a_moment_is_refused(value: object, problem: str) -> None:
    assert refused(validation.check_run_at, value).startswith(f"run_at {problem}")


@given(st.datetimes(timezones=st.timezones()))
def test_an_accepted_moment_is_the_same_moment(value: datetime) -> None:
    moment = accepted(validation.check_run_at, value)
    if moment is not None:
        assert (moment, moment.tzinfo) == (value.astimezone(UTC), UTC)


# metadata

json_leaves = st.none() | st.booleans() | st.integers() | st.floats() | any_text
json_like = st.recursive(
    json_leaves | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=12,
)


@given(st.dictionaries(any_text, json_like, max_size=4))
def test_accepted_metadata_survives_json_and_utf8(value: dict[str, Any]) -> None:
    metadata = accepted(validation.check_metadata, value)
    if metadata is not None:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        assert json.loads(text.encode().decode()) == value


def nested(levels: int) -> dict[str, Any]:
    return {"inner": nested(levels - 1)} if levels > 1 else {}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": [1, 2.5, None, True, "x\n"]},
        {"n": 2**63 - 1, "m": 1 - 2**63},
        nested(8),
        {"t": "x" * (16_384 - 9)},
    ],
)
def test_plain_json_is_returned_as_it_is(value: dict[str, Any]) -> None:
    assert validation.check_metadata(value) == value


def test_metadata_is_a_copy_of_plain_lists_and_text() -> None:
    value = {"tags": (1, [2]), "mood": Word("calm")}
    metadata = validation.check_metadata(value)

    assert metadata == {"tags": [1, [2]], "mood": "calm"}
    assert (metadata is value, type(metadata["mood"])) == (False, str)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "is missing"),
        ([], "is []"),
        ("{}", "is '{}'"),
        ({"t": "x" * (16_384 - 8)}, "takes 16,385 bytes as JSON"),
        ({"t": "ü" * 8_189}, "takes 16,387 bytes as JSON"),
        (nested(9), "is nested too deeply"),
        ({1: "x"}, "has the key 1"),
        ({"a\x00": 1}, "has the control character U+0000"),
        ({"a": ["\x1b"]}, "has the control character U+001B"),
        ({"a": "\ud800"}, "has a lone surrogate, which is not a character"),
        ({"a": math.nan}, "holds nan"),
        ({"a": [-math.inf]}, "holds -inf"),
        ({"a": 2**63}, "holds a whole number of more than 63 bits"),
        ({"a": {"b": b"x"}}, "holds b'x'"),
        ({"a": {1}}, "holds {1}"),
    ],
)
def test_metadata_is_refused(value: object, problem: str) -> None:
    assert refused(validation.check_metadata, value).startswith(f"metadata {problem}; ")


def test_metadata_that_holds_itself_is_refused() -> None:
    value: dict[str, Any] = {}
    value["self"] = value

    assert "nested too deeply" in refused(validation.check_metadata, value)
