"""Melodies whose drums and bass a second model takes away; a stand-in plays demucs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineError, GenerationRejectedError
from dgx_music.inference.musicgen import conditioning, stems
from dgx_music.inference.musicgen.conditioning import Conditioner
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.melody import chroma
from dgx_music.inference.musicgen.stems import separate
from dgx_music.inference.musicgen.tiny import build_tiny_melody
from tests.inference.factories import make_request

CPU = torch.device("cpu")
RATE, THEIR_RATE = 32_000, 44_100
BASS_CLASS, TUNE_CLASS = 9, 4  # A, E


def tone(hertz: float, seconds: float, rate: int) -> np.ndarray[Any, Any]:
    time = np.arange(round(seconds * rate)) / rate
    return np.sin(2 * math.pi * hertz * time).astype(np.float32)


def mixed(seconds: float = 2.0, rate: int = RATE) -> Audio:
    """Return a loud A in the bass, and a soft E above it."""
    samples = tone(110.0, seconds, rate) + 0.2 * tone(659.26, seconds, rate)
    return Audio(samples[None], rate)


def split_at_300_hz(_model: object, mix: Tensor, shifts: int, device: torch.device) -> Tensor:
    """Return what lies below as the bass, and what lies above as the voice and the other stem."""
    assert (shifts, device) == (0, CPU)
    spectrum = torch.fft.rfft(mix)
    is_low = torch.fft.rfftfreq(mix.shape[-1], 1 / THEIR_RATE) < 300
    low = torch.fft.irfft(spectrum * is_low, mix.shape[-1])
    high = mix - low
    return torch.stack([torch.zeros_like(mix), low, 0.25 * high, 0.75 * high], dim=1)


@pytest.fixture
def demucs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    """Stands for the package; returns what loads its models."""
    model = SimpleNamespace(
        sources=["drums", "bass", "other", "vocals"], samplerate=THEIR_RATE, audio_channels=2
    )
    get_model = Mock(return_value=SimpleNamespace(eval=lambda: model))
    apply, pretrained = ModuleType("demucs.apply"), ModuleType("demucs.pretrained")
    vars(apply)["apply_model"], vars(pretrained)["get_model"] = split_at_300_hz, get_model
    for module in (ModuleType("demucs"), apply, pretrained):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    stems._load.cache_clear()
    yield get_model
    stems._load.cache_clear()


def most_heard(clip: Audio) -> int:
    """Return the pitch class of most frames."""
    samples = torch.from_numpy(clip.samples.mean(axis=0))
    return int(chroma(samples, clip.sample_rate).sum(0).argmax())


def test_the_tune_is_what_remains_without_drums_and_bass(demucs: Mock) -> None:
    both = mixed()
    assert most_heard(both) == BASS_CLASS
    kept = separate(both, CPU)
    assert most_heard(kept) == TUNE_CLASS
    assert abs(kept.samples).mean() == pytest.approx(0.2 * 2 / math.pi, rel=0.05)
    assert (kept.sample_rate, kept.samples.shape) == (THEIR_RATE, (2, 2 * THEIR_RATE))
    separate(both, CPU)
    demucs.assert_called_once_with("htdemucs")


def read_prefix(clip: Audio, kind: str, *, is_long: bool = False) -> Tensor:
    """Return what a melody model reads of a request with this melody."""
    model, tokenizer = build_tiny_melody()
    decoder = Decoder(model.decoder, None, 340)
    request = make_request(model="musicgen-melody", prompt="choir", melody=clip, melody_kind=kind)
    prefix = Conditioner(model, tokenizer, decoder, RATE).open(request, is_long=is_long)(0).prefix
    assert prefix is not None
    return prefix


def test_a_request_for_stems_follows_that_tune(demucs: Mock) -> None:
    both = mixed()
    read = read_prefix(both, "stems")
    alone = Audio(separate(both, CPU).samples[:1], THEIR_RATE)
    assert torch.equal(read, read_prefix(alone, "solo"))
    assert not torch.equal(read, read_prefix(both, "solo"))


@pytest.mark.parametrize(("is_long", "seconds"), [(False, 0.5), (True, 1.0)])
def test_only_what_the_music_follows_is_separated(
    demucs: Mock, monkeypatch: pytest.MonkeyPatch, is_long: bool, seconds: float
) -> None:
    separated: list[float] = []

    def note(clip: Audio, device: torch.device) -> Audio:
        separated.append(clip.samples.shape[1] / clip.sample_rate)
        return separate(clip, device)

    monkeypatch.setattr(conditioning, "separate", note)
    monkeypatch.setattr(conditioning, "WINDOW_SECONDS", 0.5)
    read_prefix(mixed(1.0), "stems", is_long=is_long)
    assert separated == [seconds]


def test_without_demucs_the_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stems._load.cache_clear()
    monkeypatch.setitem(sys.modules, "demucs.apply", None)
    with pytest.raises(GenerationRejectedError, match=r"no demucs; install it there .* or use mix"):
        separate(mixed(0.1), CPU)


def test_weights_that_cannot_be_loaded_may_be_there_later(demucs: Mock) -> None:
    demucs.side_effect = OSError("Name or service not known")
    with pytest.raises(EngineError, match=r"cannot load its weights \(OSError: Name"):
        separate(mixed(0.1), CPU)
    demucs.side_effect = None
    assert separate(mixed(0.1), CPU).samples.any()
