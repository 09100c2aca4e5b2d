"""The tune of a mix: pieces made from seeds, on which the constants were not chosen."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from benchmarks import tune as benchmark
from benchmarks.mixes import RATE, make_mix, make_solo
from benchmarks.tune import Result, is_a_mix
from dgx_music.inference.musicgen.melody import chroma
from dgx_music.inference.musicgen.mix import Reader, choose_reader, tune_of
from dgx_music.validation import MelodyKind
from tests.inference.test_melody import classes, noise, song, tone

HARD = (50_013, 50_023, 50_033)
"""Seeds of mixes in which the loudest pitch class is mostly that of the bass."""
SOLOS = (*range(50_000, 50_006), 50_010, 50_017, 50_024, 50_027)


@cache
def read_hard() -> list[Result]:
    return [Result(make_mix(seed, 8.0)) for seed in HARD]


def chosen(samples: Tensor, kind: MelodyKind, rate: int = RATE) -> Tensor:
    """Return what is read of a clip."""
    return choose_reader(samples, rate, kind)(samples, rate)


def test_the_tune_above_a_loud_bass_is_followed() -> None:
    frames = sum(int(each.voiced.sum()) for each in read_hard())
    assert sum(each.plain for each in read_hard()) < 0.3 * frames
    assert sum(each.followed for each in read_hard()) > 0.8 * frames


def test_auto_follows_the_tune_of_a_mix() -> None:
    for each in read_hard():
        samples = torch.from_numpy(each.mix.samples)
        assert torch.equal(chosen(samples, "auto"), tune_of(samples, RATE))
        assert torch.equal(chosen(samples, "mix"), tune_of(samples, RATE))
        assert torch.equal(chosen(samples, "solo"), chroma(samples, RATE))


@pytest.mark.parametrize("seed", SOLOS)
def test_auto_reads_a_tune_alone_as_it_was_read_before(seed: int) -> None:
    samples = torch.from_numpy(make_solo(seed, 8.0))
    assert torch.equal(chosen(samples, "auto"), chroma(samples, RATE))


@pytest.mark.parametrize("hertz", [60.0, 110.0, 199.0, 201.0, 440.0, 1_500.0])
def test_the_overtones_of_a_low_note_make_no_mix(hertz: float) -> None:
    """As of a deep voice, most of whose strength is above the bass."""
    overtones = zip(range(1, 9), (0.5, 1.0, 0.8, 0.9, 0.4, 0.2, 0.1, 0.05), strict=True)
    assert not is_a_mix(sum((loud * tone(k * hertz, 3) for k, loud in overtones), torch.zeros(1)))


@pytest.mark.parametrize("sample_count", [0, 1, 16_384, 20_480, 100_000, 1_000_000])
def test_a_clip_of_any_length_has_the_frames_of_a_solo(sample_count: int) -> None:
    samples = noise(sample_count)
    assert tune_of(samples, RATE).shape == chroma(samples, RATE).shape
    assert chosen(samples, "auto").shape == chroma(samples, RATE).shape


@pytest.mark.parametrize("kind", ["auto", "solo", "mix"])
def test_silence_is_the_same_as_no_melody(kind: MelodyKind) -> None:
    assert set(chosen(torch.zeros(3 * RATE), kind).argmax(1).tolist()) == {0}


def test_silence_within_a_mix_is_no_melody() -> None:
    both = tone(110, 2) + tone(659.26, 2)
    heard = tune_of(torch.cat([both, torch.zeros(2 * RATE)]), RATE).argmax(1).tolist()
    assert set(heard[:13]) == {4}
    assert set(heard[19:]) == {0}


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_the_sample_rate_counts(rate: int) -> None:
    both = tone(110, 2, rate) + 0.2 * tone(659.26, 2, rate)
    assert set(classes(both, rate)) == {9}
    assert set(tune_of(both, rate).argmax(1).tolist()) == {4}


@pytest.mark.parametrize("loudness", [1e-9, 1e4])
def test_loudness_does_not_matter(loudness: float) -> None:
    samples = song(90_000, 1)
    assert torch.equal(tune_of(loudness * samples, RATE), tune_of(samples, RATE))


@pytest.mark.parametrize("pitch_class", range(12))
def test_a_tune_alone_is_read_as_a_mix_too(pitch_class: int) -> None:
    hertz = 440 * 2 ** ((pitch_class - 9) / 12)
    assert set(tune_of(tone(hertz), RATE).argmax(1).tolist()) == {pitch_class}


def test_the_benchmark_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--first", "50004", "--pieces", "1", "--seconds", "5"])
    printed = capsys.readouterr().out
    assert "| all | 1 |" in printed
    assert "mixes that auto takes for mixes: 1 of 1" in printed


# clips of any length


@pytest.mark.parametrize(
    ("first", "then", "reader"),
    [
        (tone(587.33, 2), tone(587.33, 20) + tone(110, 20), tune_of),
        (tone(587.33, 4) + tone(110, 4), tone(587.33, 4), chroma),
    ],
    ids=["a mix after a tune alone", "a tune alone after a mix"],
)
def test_a_long_clip_is_judged_by_all_of_it(
    first: Tensor, then: Tensor, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgx_music.inference.musicgen.mix.LONGEST_SECONDS", 2)
    assert choose_reader(torch.cat([first, then]), RATE, "auto") is reader


def test_a_tune_is_read_for_30_s_at_most() -> None:
    samples = song(31 * RATE, 1)
    assert torch.equal(tune_of(samples, RATE), tune_of(samples[: 30 * RATE], RATE))
