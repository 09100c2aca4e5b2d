"""File names from patterns: pure, so laws are tried on any text."""

import unicodedata
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dgx_music.client.names import (
    DEFAULT_PATTERN,
    PLACEHOLDERS,
    DistinctNames,
    Pattern,
    first_words,
)
from dgx_music.errors import InvalidRequestError

VALUES = {
    "title": "Rainy Night",
    "prompt": "lofi rain, vinyl",
    "bpm": "138",
    "key": "F#m",
    "seed": "7",
    "take": "2",
    "id": "01a21733-0000-7000-8000-00000000abcd",
    "short_id": "0000abcd",
    "date": "2026-01-31",
    "model": "musicgen-small",
}
RESERVED = ["CON", "prn", "Aux", "NUL", "COM1", "lpt9", "COM²", "CONIN$"]
ANY_VALUES = st.fixed_dictionaries(
    dict.fromkeys(PLACEHOLDERS, st.text(max_size=400)) | {"id": st.just(VALUES["id"])}
)


def fill(pattern, suffix=".wav", **values):
    return str(Pattern(pattern).fill(VALUES | values, suffix))


@pytest.mark.parametrize(
    ("pattern", "values", "name"),
    [
        (DEFAULT_PATTERN, {}, "Rainy Night_take2_F#m_138bpm_0000abcd.wav"),
        (DEFAULT_PATTERN, dict.fromkeys(["take", "key", "bpm"], ""), "Rainy Night_0000abcd.wav"),
        (DEFAULT_PATTERN, {"bpm": ""}, "Rainy Night_take2_F#m_0000abcd.wav"),
        ("{title} - {key} - {seed}", {"key": ""}, "Rainy Night - 7.wav"),
        ("{key} - {title}", {"key": ""}, "Rainy Night.wav"),
        ("{title} ({key})", {"key": ""}, "Rainy Night.wav"),
        ("{title} ({key})", {}, "Rainy Night (F#m).wav"),
        ("{title}{bpm}", {"bpm": ""}, "Rainy Night.wav"),
        ("lo-fi {bpm}", {"bpm": ""}, "lo-fi.wav"),
        ("{bpm}{key}", {"bpm": "", "key": ""}, f"{VALUES['id']}.wav"),
        ("{{{title}}}", {}, "{Rainy Night}.wav"),
        ("{title}.flac", {}, "Rainy Night.flac"),
        ("{title}.FLAC", {}, "Rainy Night.FLAC"),
        ("{title}", {"title": "mix.flac"}, "mix.flac.wav"),
        ("{title}.v2", {}, "Rainy Night.v2.wav"),
        ("song", {}, "song.wav"),
        (".hidden", {}, ".hidden.wav"),
        ("{title}", {"title": "AC/DC: what? \\ <live>"}, "AC-DC- what - live.wav"),
        ("{title}", {"title": "../../etc/passwd"}, "etc-passwd.wav"),
        ("{title}", {"title": "-rf\x00 \u202ewav.exe\n"}, "rf wav.exe.wav"),
        ("{title}", {"title": "Cafe\u0301"}, "Café.wav"),
        ("{title}", {"title": "🎵 日本 👩\u200d🎤"}, "🎵 日本 👩\u200d🎤.wav"),
        ("{title}", {"title": "end..."}, "end.wav"),
    ],
)
def test_a_pattern_becomes_a_name(pattern, values, name):
    assert fill(pattern, **values) == name


@pytest.mark.parametrize(
    ("pattern", "values", "path"),
    [
        ("{model}/{title}", {}, "musicgen-small/Rainy Night.wav"),
        ("/music/.new/{key}/{title}", {}, "/music/.new/F#m/Rainy Night.wav"),
        ("{key}/{title}", {"key": ""}, "Rainy Night.wav"),
        ("../x/", {"take": ""}, "../x/Rainy Night_F#m_138bpm_0000abcd.wav"),
        ("{title}/{seed}", {"title": ".."}, "7.wav"),
        ("/{title}", {}, "/Rainy Night.wav"),
    ],
)
def test_a_pattern_may_have_folders(pattern, values, path):
    assert fill(pattern, **values) == path


@pytest.mark.parametrize("name", [*RESERVED, "con.mix", "nul ", "COM1.tar.gz"])
def test_the_name_of_a_device_is_not_used(name):
    assert fill("{title}", title=name).startswith("_")
    assert fill("{title}/x", title=name).startswith("_")


@pytest.mark.parametrize("name", ["CONCERT", "auxiliary", "COM10", "nulla"])
def test_a_name_that_only_begins_like_a_devices_is(name):
    assert fill("{title}", title=name) == f"{name}.wav"


@given(
    values=ANY_VALUES,
    pattern=st.sampled_from(
        [DEFAULT_PATTERN, *(f"{{{name}}}" for name in PLACEHOLDERS), "{model}/{date} {prompt}"]
    ),
    number=st.integers(1, 1_000),
)
@example(values=VALUES | {"title": "é" * 400, "prompt": "日" * 2_000}, pattern="{prompt}", number=2)
@example(values=VALUES | {"title": "e" + "\u0301" * 400}, pattern="{title}", number=1)
@example(values=VALUES | {"title": "x" * 246 + "." * 9}, pattern="{title}", number=1)
@example(values=VALUES | {"title": "x" * 300, "key": "y" * 300}, pattern=DEFAULT_PATTERN, number=1)
def test_any_values_make_names_that_every_file_system_takes(values, pattern, number):
    path = Pattern(pattern).fill(values, ".flac", number)

    assert path.name.endswith(".flac")
    for part in path.parts:
        assert 1 <= len(part.encode()) <= 255
        assert part[0] not in " .-~"
        assert part[-1] not in " ."
        assert not {*part} & {*'<>:"/\\|?*'}
        assert not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in part)
        assert unicodedata.is_normalized("NFC", part)
        assert part.partition(".")[0].rstrip().upper() not in map(str.upper, RESERVED)


@given(st.text("{}title/._- aA~", min_size=1, max_size=30))
def test_any_text_is_a_pattern_or_is_refused(text):
    with suppress(InvalidRequestError):
        path = Pattern(text).fill(VALUES, ".wav")

        assert path.name.endswith(".wav")
        assert path.is_absolute() == text.startswith("/")


@given(present=st.sets(st.sampled_from(["title", "key", "bpm", "take"])))
def test_empty_values_leave_no_separators_behind(present):
    values = {name: VALUES[name] if name in present else "" for name in VALUES}
    name = fill("{title}_take{take}_{key}_{bpm}bpm", ".wav", **values | {"id": "the id"})

    assert "__" not in name
    assert not name.startswith("_")
    assert not name.removesuffix(".wav").endswith("_")


@given(st.text(min_size=1, max_size=60), st.integers(1, 3_000))
def test_a_long_title_is_cut_and_what_stands_after_it_stays(text, times):
    name = fill(DEFAULT_PATTERN, title=f"x{text * times}")

    assert name.endswith("_take2_F#m_138bpm_0000abcd.wav")


@pytest.mark.parametrize("last", ["q\u0323\u0323", "👩\u200d🎤"])
@pytest.mark.parametrize("count", range(242, 251))
def test_a_long_title_is_cut_between_two_characters_as_people_see_them(last, count):
    name = fill("{title}", title="x" * count + last)

    is_whole = count + len(last.encode()) <= 250
    assert name == "x" * count + (last if is_whole else "") + ".wav"


@given(st.lists(st.sampled_from(["a", "A", "é", "E\u0301", "x" * 300, ""]), max_size=12))
def test_no_two_files_of_one_call_have_the_same_name(titles):
    names = DistinctNames(Pattern("{title}"))
    paths = [str(names.path_for(VALUES | {"title": title}, ".wav")) for title in titles]

    folded = {unicodedata.normalize("NFC", path).casefold() for path in paths}
    assert len(folded) == len(paths)
    assert all(len(path.encode()) <= 255 for path in paths)


def test_many_files_of_one_name_are_numbered_without_trying_each_number_again(monkeypatch):
    filled, really = [], Pattern.fill

    def fill(self, values, suffix, number=1):
        filled.append(number)
        return really(self, values, suffix, number)

    monkeypatch.setattr(Pattern, "fill", fill)
    names = DistinctNames(Pattern("{title}"))
    paths = [names.path_for(VALUES | {"title": "x" * 300}, ".wav") for _ in range(300)]

    assert str(paths[-1]).endswith("x-300.wav")
    assert len(filled) < 700


def test_the_second_file_of_a_name_has_a_number():
    names = DistinctNames(Pattern("song.flac"))

    assert [str(names.path_for(VALUES, ".flac")) for _ in range(3)] == [
        "song.flac",
        "song-2.flac",
        "song-3.flac",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{tempo}", "pattern has the placeholder {tempo}, which is not known; use {title}, "),
        ("{bpm:03d}", "pattern has the placeholder {bpm:03d}, which is not known; use {title}, "),
        ("{title!r}", "pattern has the placeholder {title!r}, which is not known; use "),
        ("{title.x}", "pattern has the placeholder {title.x}, which is not known; use "),
        ("{}", "pattern has the placeholder {}, which is not known; use {title}, "),
        ("{title", "pattern has a brace that belongs to no placeholder; write {{ or }} for a "),
        ("title}", "pattern has a brace that belongs to no placeholder; write {{ or }} for a "),
        ("", "pattern has 0 characters; use 1 to 4,096."),
        ("a\0b", "pattern has the control character U+0000; use printable "),
    ],
)
def test_a_pattern_that_cannot_be_filled_is_one_sentence(pattern, message):
    with pytest.raises(InvalidRequestError) as caught:
        Pattern(pattern)

    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trap\n beat", "trap beat"),
        ("word " * 30, "word word word word word word word word word word word word"),
        ("x" * 100, "x" * 60),
        ("", ""),
    ],
)
def test_the_first_words_end_between_two_words(text, words):
    assert first_words(text) == words


@pytest.mark.parametrize("text", ["a.aac", "{title}.M4A", "a/{seed}_x.opus"])
def test_a_suffix_of_audio_that_cannot_be_written_is_refused(text):
    with pytest.raises(InvalidRequestError, match="a format that cannot be written"):
        Pattern(text)
