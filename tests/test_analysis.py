"""Tempo and key, on pieces of music that are made from seeds, and on what has neither.

The constants were chosen on the seeds 0 to 299 of ``benchmarks/pieces.py``; these are others.
"""

import numpy as np
import pytest

from benchmarks import analysis as benchmark
from benchmarks.analysis import measure, relative_of
from benchmarks.pieces import (
    KEYS,
    RATE,
    make_clicks,
    make_drone,
    make_drums,
    make_noise,
    make_piece,
)
from dgx_music.audio.analysis import Analysis, analyse
from dgx_music.audio.conversion import resample
from dgx_music.audio.facts import AudioFacts
from dgx_music.audio.files import finish
from dgx_music.audio.key import NAMES
from dgx_music.audio.samples import Audio

SEEDS = range(70_000, 70_050)
NOTHING = Analysis()
LOWEST_RATE = 8_000


@pytest.fixture(scope="module")
def results():
    return [measure(make_piece(seed, seconds=8.0)) for seed in SEEDS]


def scale(rate, tonic, seconds=8.0):
    """Return a major scale of pure tones, up and down, in quarters at 120 beats per minute."""
    steps = [0, 2, 4, 5, 7, 9, 11, 12, 11, 9, 7, 5, 4, 2, 0, 0]
    note = np.arange(rate // 2) / rate
    tones = [
        np.sin(2 * np.pi * 261.63 * 2 ** ((tonic + step) / 12) * note) * np.exp(-3 * note)
        for step in steps
    ]
    return np.concatenate(tones).astype(np.float32)[np.newaxis, : round(seconds * rate)]


def facts_of(audio):
    file = finish(audio, sample_rate=RATE, channels=1, audio_format="wav", loudness="lufs")
    return AudioFacts.read(file.facts)


def test_the_tempo_is_right_or_an_octave_off_in_95_of_100_pieces(results):
    right = [each.has_tempo(0.04, octaves=(0.5, 1, 2)) for each in results]

    assert np.mean(right) >= 0.95


def test_the_key_is_right_in_80_of_100_pieces(results):
    assert np.mean([each.found.key == each.piece.key for each in results]) >= 0.8


def test_a_higher_confidence_in_the_key_is_right_more_often(results):
    sure = [
        each.found.key == each.piece.key
        for each in results
        if (each.found.key_confidence or 0) > 0.7
    ]
    unsure = [
        each.found.key == each.piece.key
        for each in results
        if (each.found.key_confidence or 0) < 0.5
    ]

    assert np.mean(sure) > np.mean(unsure)


def test_it_takes_less_than_20_ms_of_cpu_time_for_each_second(results):
    assert sum(each.cpu_seconds for each in results) < 0.02 * 8 * len(results)


@pytest.mark.parametrize("bpm", [60, 75, 90, 105, 120, 128, 140, 160, 180])
def test_a_metronome_has_its_tempo_or_an_octave_of_it_and_no_key(bpm):
    found = analyse(make_clicks(bpm), RATE)

    assert any(found.bpm == pytest.approx(bpm * octave, rel=0.005) for octave in (0.5, 1, 2))
    assert (found.key, found.key_confidence) == (None, None)


@pytest.mark.parametrize("tonic", range(12))
def test_a_scale_is_in_its_key(tonic):
    assert analyse(scale(RATE, tonic), RATE).key == NAMES[tonic]


@pytest.mark.parametrize("rate", [LOWEST_RATE, 22_050, 44_100, 48_000])
def test_the_sample_rate_makes_no_difference(rate):
    piece = make_piece(70_000, 120, "F#m", 8.0)
    found = analyse(resample(piece.samples, RATE, rate), rate)

    assert (found.bpm, found.key) == (pytest.approx(120, rel=0.01), "F#m")


@pytest.mark.parametrize("cents", [-40, 40])
def test_instruments_that_are_out_of_tune_keep_their_key(cents):
    detuned = scale(round(RATE * 2 ** (cents / 1200)), 6)

    assert analyse(detuned, RATE).key == "F#"


def test_the_level_makes_no_difference():
    piece = make_piece(70_001, seconds=6.0)

    assert analyse(piece.samples * np.float32(0.01), RATE) == analyse(piece.samples, RATE)


def test_channels_of_opposite_phase_are_not_silence():
    piece = make_piece(70_001, seconds=6.0).samples[:1]

    assert analyse(np.concatenate([piece, -piece]), RATE) == analyse(piece, RATE)


@pytest.mark.parametrize("seconds", [4.0, 12.0])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("make", [make_noise, make_drone])
def test_noise_and_drones_have_neither_tempo_nor_key(make, seed, seconds):
    assert analyse(make(seed, seconds), RATE) == NOTHING


def test_drums_have_a_tempo_and_hardly_ever_a_key():
    found = [analyse(make_drums(seed, 8.0), RATE) for seed in range(10)]

    assert [each.key for each in found].count(None) >= 9
    assert None not in [each.bpm for each in found]


def test_music_that_is_buried_in_noise_has_no_key():
    piece = make_piece(70_000, seconds=6.0).samples

    assert analyse(piece, RATE).key is not None
    assert analyse(piece + 2 * make_noise(0, 6.0), RATE).key is None


def test_one_note_with_pauses_full_of_hiss_has_no_key():
    time = np.arange(8 * RATE) / RATE
    note = np.where(time % 2 < 1.4, np.sin(2 * np.pi * 440 * time), 0)

    assert analyse(np.float32(note + 0.5 * make_noise(0, 8.0)), RATE).key is None


@pytest.mark.parametrize("level", [0.0, 0.0001, 0.5])
def test_a_constant_level_has_neither(level):
    assert analyse(np.full((2, 5 * RATE), level, np.float32), RATE) == NOTHING


def test_one_click_at_the_very_end_is_not_music():
    samples = np.zeros((1, 5 * RATE + 1), np.float32)
    samples[0, -1] = 1

    assert analyse(samples, RATE) == NOTHING


def test_less_than_four_seconds_are_not_measured():
    samples = make_piece(70_002, seconds=4.0).samples

    assert analyse(samples[:, :-1], RATE) == NOTHING
    assert analyse(samples, RATE) != NOTHING


def test_the_relative_key_has_the_same_notes():
    assert [relative_of(key) for key in ("C", "Am", "F#m", "D#")] == ["Am", "C", "A", "Cm"]
    assert {relative_of(key) for key in KEYS} == {*KEYS}


def test_the_benchmark_prints_its_table(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "LENGTHS", (4.0,))

    benchmark.main(["--first", "70000", "--pieces", "1", "--skip", "1"])

    shown = capsys.readouterr().out.splitlines()
    assert shown[2].startswith("| 4 | ")
    assert shown[-1] == "drone: something claimed in 0 of 1"


def test_a_finished_file_tells_its_tempo_and_key():
    piece = make_piece(70_000, 120, "F#m", 8.0)

    facts = facts_of(Audio(piece.samples, RATE))

    assert (facts.bpm, facts.key) == (pytest.approx(120, rel=0.01), "F#m")
    assert 0.2 <= facts.bpm_confidence <= 1
    assert 0 < facts.key_confidence <= 1


def test_untrained_weights_have_neither_tempo_nor_key():
    piece = make_piece(70_000, 120, "F#m", 8.0)

    facts = facts_of(Audio(piece.samples, RATE, {"is_untrained": True}))

    assert (facts.bpm, facts.bpm_confidence, facts.key, facts.key_confidence) == (None,) * 4


def test_facts_that_an_older_version_stored_are_read_without_tempo_and_key():
    stored = facts_of(Audio(make_noise(0, 1.0), RATE)).to_dict()
    older = {name: stored[name] for name in stored if name not in vars(NOTHING)}

    assert AudioFacts.read(older) == AudioFacts.read(stored)
