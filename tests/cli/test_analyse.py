from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from benchmarks.pieces import RATE, make_noise, make_piece
from dgx_music.audio import reading
from dgx_music.audio.facts import AudioFacts
from tests.cli.conftest import Run


@pytest.fixture
def song(place: Path) -> str:
    """A piece at 120 beats per minute in F sharp minor, and the name of its file."""
    soundfile.write("song.wav", make_piece(70_000, 120, "F#m", 8.0).samples.T, RATE)
    return "song.wav"


@pytest.fixture
def noise(place: Path) -> str:
    soundfile.write("noise.flac", make_noise(0, 5.0).T, RATE)
    return "noise.flac"


def test_each_file_has_one_line(run: Run, song: str, noise: str) -> None:
    result = run("analyse", song, noise)

    first, second = result.out.splitlines()
    assert first.startswith("song.wav: 8.0 s, 32,000 Hz, stereo, peak -1.9 dBFS, -")
    assert " BPM (0." in first
    assert ", F#m (0." in first
    assert second.endswith(" LUFS, no clear tempo, no clear key")
    assert (result.code, result.err) == (0, "")


def test_json_has_one_object_on_each_line_with_the_names_of_the_metadata(
    run: Run, song: str, noise: str
) -> None:
    first, second = map(json.loads, run("analyse", "--json", song, noise).out.splitlines())

    assert {*first} == {"file", *AudioFacts.__dataclass_fields__} - {"format", "waveform"}
    assert (first["file"], first["channels"], first["key"]) == ("song.wav", 2, "F#m")
    assert first["bpm"] == pytest.approx(120, rel=0.01)
    assert (second["bpm"], second["key_confidence"]) == (None, None)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_every_format_is_read(run: Run, place: Path, suffix: str) -> None:
    samples = make_piece(70_000, 120, "F#m", 8.0).samples
    soundfile.write(f"song.{suffix}", samples.T[: 6 * RATE], RATE)

    assert ", F#m (" in run("analyse", f"song.{suffix}").out


@pytest.mark.parametrize("content", [b"hello", b""])
def test_what_is_no_audio_ends_2_with_one_sentence(run: Run, song: str, content: bytes) -> None:
    Path("notes.txt").write_bytes(content)

    result = run("analyse", "notes.txt", song)

    assert result.code == 2
    assert "notes.txt is not audio that can be read; use WAV, FLAC, MP3 or OGG." in result.err
    assert result.err.count("\n") == 1
    assert result.out.startswith("song.wav: ")  # the others are measured all the same


def test_a_file_that_is_not_there_ends_2(run: Run) -> None:
    result = run("analyse", "nothing.wav")

    assert (result.code, result.out) == (2, "")
    assert (
        "nothing.wav cannot be read (no such file or directory); name an audio file" in result.err
    )


def test_a_folder_ends_2(run: Run, place: Path) -> None:
    result = run("analyse", place)

    assert result.code == 2
    assert "is not a file; name an audio file." in result.err


def test_a_file_that_is_too_long_ends_2(
    run: Run, song: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONGEST_SECONDS", 6)

    result = run("analyse", song)

    assert (result.code, result.out) == (2, "")
    assert "song.wav is longer than 0 min; use a shorter file" in result.err


def test_samples_that_are_no_numbers_end_2(run: Run, place: Path) -> None:
    soundfile.write("nan.wav", np.full((RATE, 1), np.nan), RATE, subtype="FLOAT")

    assert "nan.wav holds NaN or infinite samples" in run("analyse", "nan.wav").err


def test_silence_and_many_channels_are_told(run: Run, place: Path) -> None:
    soundfile.write("silence.wav", np.zeros((RATE, 3)), RATE)

    line = run("analyse", "silence.wav").out.rstrip("\n")

    assert line.endswith("3 channels, silent, no loudness, no clear tempo, no clear key")
