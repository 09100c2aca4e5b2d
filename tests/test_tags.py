"""Tags in files, read back by a library that had no part in writing them."""

import io
import struct
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from tinytag import TinyTag

from dgx_music.audio import clips, wav
from dgx_music.audio.files import encode
from dgx_music.audio.formats import FORMATS
from dgx_music.audio.tags import SOFTWARE, riff_info, tags_of
from dgx_music.catalog import MODELS, TONE_NOTICE, UNTRAINED_NOTICE

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
SILENCE = np.zeros((1, 3_200), np.float32)
ODD_TEXT = st.text(max_size=300).filter(lambda text: text.strip() != "")


def tags(**given):
    values = {
        "generation_id": "01a21733-0000-7000-8000-00000000abcd",
        "prompt": "lofi rain",
        "model_name": "musicgen-small",
        "made_at": NOON,
        "facts": {"seed": 7, "engine": "musicgen", "is_untrained": False},
    }
    return tags_of(**values | given)


def read_back(audio_format, tags):
    """Return title, artist, date, comment, licence and software as tinytag reads them in a file."""
    file = encode(SILENCE, 32_000, audio_format, tags)
    found = TinyTag.get(filename=f"x.{audio_format}", file_obj=io.BytesIO(file))
    more = found.other
    licence = more.get("license") or more.get("copyright") or [None]
    software = [*more.get("software", []), *more.get("isft", []), *more.get("encoder_settings", [])]
    return found.title, found.artist, found.year, found.comment, licence[0], software


@pytest.mark.parametrize("audio_format", FORMATS)
def test_another_library_reads_what_a_file_says_of_itself(audio_format):
    title, artist, date, comment, licence, software = read_back(
        audio_format, tags(title="Ä título 日本 🎵")
    )

    assert (title, artist, date) == ("Ä título 日本 🎵", "musicgen-small", "2026-01-31")
    assert comment.splitlines() == [
        "Prompt: lofi rain",
        "Model: musicgen-small",
        "Seed: 7",
        "Generation: 01a21733-0000-7000-8000-00000000abcd",
        f"Licence: {licence}",
    ]
    assert licence == "made with the weights of musicgen-small, whose licence is CC-BY-NC 4.0"
    assert any(text.startswith(SOFTWARE) for text in software)


@pytest.mark.parametrize("audio_format", FORMATS)
@pytest.mark.parametrize(
    ("facts", "notice"),
    [
        ({"is_untrained": True}, UNTRAINED_NOTICE),
        ({"engine": "tone"}, TONE_NOTICE),
        ({}, UNTRAINED_NOTICE),
    ],
)
def test_a_file_says_that_it_is_no_music(audio_format, facts, notice):
    _, _, _, comment, licence, _ = read_back(
        audio_format, tags(model_name="musicgen-tiny-untrained", facts=facts)
    )

    assert f"Note: {notice}" in comment.splitlines()
    assert licence is None


def test_a_sine_wave_has_no_licence_of_weights():
    assert tags(facts={"engine": "tone"}).licence == ""


@pytest.mark.parametrize("audio_format", FORMATS)
def test_the_audio_is_the_same_with_tags_and_without(audio_format):
    noise = np.random.default_rng(7).uniform(-0.5, 0.5, (2, 32_000)).astype(np.float32)

    plain, tagged = [
        soundfile.read(io.BytesIO(encode(noise, 32_000, audio_format, each)))[0]
        for each in (None, tags(title="x" * 150))
    ]

    np.testing.assert_array_equal(plain, tagged)


@pytest.mark.parametrize("audio_format", FORMATS)
@given(title=ODD_TEXT, prompt=ODD_TEXT)
def test_any_text_can_be_a_title(audio_format, title, prompt):
    made = tags(title=title, prompt=prompt)

    found, _, _, comment, _, _ = read_back(audio_format, made)

    assert found == made.title
    assert comment == made.comment


@pytest.mark.parametrize(
    ("title", "shown"),
    [
        ("a\0b\r\n\tc\x1b[31m", "a b c [31m"),
        ("x" * 500, "x" * 199 + "…"),
        ("\ud800", "lofi rain"),
        ("\0", "lofi rain"),
    ],
)
def test_a_title_is_one_line_of_clean_text(title, shown):
    assert tags(title=title).title == shown


def test_without_a_title_the_prompt_is_it_and_of_nothing_nothing():
    assert tags(prompt="trap\nbeat").title == "trap beat"
    assert tags(prompt="").title == "untitled"
    assert "Prompt" not in tags(prompt="").comment


def test_the_longest_prompt_is_there_in_full():
    assert f"Prompt: {'日' * 2_000}" in tags(prompt="日" * 2_000).comment.splitlines()


def test_a_local_folder_is_named_without_the_folders_above_it():
    made = tags(model_name="/home/me/secret/my-model")

    assert made.artist == "my-model"
    assert "/home" not in made.comment


def test_the_date_is_that_of_utc():
    late = datetime(2026, 2, 1, 1, tzinfo=timezone(timedelta(hours=2)))

    assert tags(made_at=late).date == "2026-01-31"


def test_tags_of_a_wav_file_have_the_bytes_that_libsndfile_writes():
    names = {"title": b"INAM", "comment": b"ICMT", "software": b"ISFT", "artist": b"IART"}
    texts = dict(zip(names, ["odd", "even", "a libsndfile", "日本"], strict=True))
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 32_000, 1, "PCM_16", format="WAV") as file:
        for name, text in texts.items():
            setattr(file, name, text)
        file.write(SILENCE.T)

    chunk = riff_info((names[name], text) for name, text in texts.items())
    assert wav.encode(SILENCE, 32_000, chunk) == buffer.getvalue()


def test_the_sizes_in_an_mp3s_tags_are_those_of_the_frames():
    data = tags(prompt="日" * 2_000).id3()
    size = int("".join(f"{byte:07b}" for byte in data[6:10]), 2)

    assert (data[:3], 10 + size) == (b"ID3", len(data))
    assert struct.unpack(">B", data[3:4]) == (4,)


@pytest.mark.parametrize("audio_format", FORMATS)
def test_a_file_with_tags_can_be_continued(audio_format):
    wave = 0.5 * np.sin(np.arange(32_000) / 10).astype(np.float32)[None]
    file = encode(wave, 32_000, audio_format, tags(prompt="日" * 2_000))

    clip = clips.Reader().read({"melody": file}, MODELS["musicgen-melody"], 10.0)["melody"]

    assert clip.duration_seconds == pytest.approx(1, abs=0.05)
