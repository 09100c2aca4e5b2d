"""Music of many windows: its tokens are audiocraft's, and nobody hears where windows meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from dgx_music.audio.samples import Audio
from dgx_music.inference.musicgen import heap
from dgx_music.inference.musicgen.engine import MusicGenEngine
from dgx_music.inference.musicgen.live_clip import LiveClip
from dgx_music.inference.musicgen.melody import chroma
from dgx_music.inference.musicgen.mix import Reader, choose_reader
from dgx_music.validation import MelodyKind
from tests.inference import test_requests
from tests.inference.references import long_form_shortfall
from tests.inference.test_musicgen import load
from tests.inference.test_requests import FRAME, MODELS, RATE, encode, greedy, make_clip

folders = test_requests.folders

ROUNDING = 1e-3
"""In logits. The next likeliest token is hardly ever so near."""


def make_codes(engine: MusicGenEngine, frames: int, **fields: Any) -> Tensor:
    """Return the codes ``[K, frame]`` of greedy music, before they become audio."""
    heard: list[Tensor] = []
    push = LiveClip.push

    def listen(clip: LiveClip, codes: Tensor) -> None:
        heard.append(codes)
        push(clip, codes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveClip, "push", listen)
        greedy(engine, "choir", frames, **fields)
    return torch.cat(heard, dim=1)


class Scale:
    """How long a window is, and engines whose windows are so long."""

    def __init__(self, window: int, engines: dict[str, MusicGenEngine]) -> None:
        self.window, self.engines = window, engines

    def frames(self, seconds: float) -> int:
        """Return the frames of so many seconds, if windows had 30 s."""
        return round(seconds * self.window / 30)

    def shortfall(self, name: str, codes: Tensor, **options: Any) -> float:
        own = {"window": self.window, "stride": round(self.window * 0.6)}
        return long_form_shortfall(*MODELS[name](), "choir", codes, 3.0, **own, **options)


@pytest.fixture(
    scope="module", params=["half a second", pytest.param("30 s", marks=pytest.mark.soak)]
)
def scale(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Scale]:
    """The length of windows: a sixtieth of the true one, and in `make soak` the true one as well."""
    seconds = 30.0 if request.param == "30 s" else 0.5
    with pytest.MonkeyPatch.context() as patch:
        for module in ("engine", "conditioning", "budget"):
            patch.setattr(f"dgx_music.inference.musicgen.{module}.WINDOW_SECONDS", seconds)
        yield Scale(round(50 * seconds), {name: load(folder) for name, folder in folders.items()})


@pytest.mark.parametrize("seconds", [31, 48, 66, 300])
@pytest.mark.parametrize("name", ["mono", "stereo"])
def test_a_long_clip_has_audiocrafts_tokens_to_its_end(
    scale: Scale, name: str, seconds: int
) -> None:
    codes = make_codes(scale.engines[name], scale.frames(seconds))
    assert codes.shape[1] == scale.frames(seconds)
    assert scale.shortfall(name, codes) < ROUNDING


@pytest.mark.parametrize("name", ["mono", "stereo"])
@pytest.mark.parametrize(("clip_seconds", "seconds"), [(4.8, 66), (30, 66), (30, 300)])
def test_a_clip_goes_on_for_minutes(
    scale: Scale, name: str, clip_seconds: float, seconds: int
) -> None:
    clip = make_clip(scale.frames(clip_seconds), MODELS[name]()[0].decoder.config.audio_channels)
    codes = make_codes(scale.engines[name], scale.frames(seconds), continuation=clip)
    given = scale.frames(clip_seconds)
    assert torch.equal(codes[:, :given], encode(name, clip))
    assert scale.shortfall(name, codes, given=given) < ROUNDING


@pytest.mark.parametrize("name", ["melody", "stereo melody"])
@pytest.mark.parametrize("clip_seconds", [0, 10])
def test_a_tune_longer_than_a_window_is_heard_to_its_end_and_again(
    scale: Scale, name: str, clip_seconds: float
) -> None:
    notes = [261.63, 440.0, 329.63, 493.88, 349.23]  # a fifth of the tune each
    tune = np.concatenate([make_clip(scale.frames(10), hertz=note).samples[0] for note in notes])
    given = scale.frames(clip_seconds)
    clip = {"continuation": make_clip(given, 1 + ("stereo" in name))} if given else {}

    def chroma_at(offset: int) -> Tensor:
        heard = np.resize(np.roll(tune, -offset * FRAME), scale.window * FRAME)
        return chroma(torch.from_numpy(heard), RATE)

    melody = Audio(tune[None], RATE)
    codes = make_codes(scale.engines[name], scale.frames(90), melody=melody, **clip)
    assert scale.shortfall(name, codes, given=given, chroma_at=chroma_at) < ROUNDING
    assert scale.shortfall(name, codes, given=given, chroma_at=lambda _: chroma_at(0)) > ROUNDING


@pytest.mark.parametrize("scale", ["half a second"], indirect=True)
@pytest.mark.parametrize(("frames", "seconds"), [(90, 1.5), (20, 0.5)])
def test_how_a_tune_is_read_is_chosen_once(
    scale: Scale, frames: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[float] = []

    def choose(samples: Tensor, rate: int, kind: MelodyKind) -> Reader:
        heard.append(len(samples) / rate)
        return choose_reader(samples, rate, kind)

    monkeypatch.setattr("dgx_music.inference.musicgen.conditioning.choose_reader", choose)
    greedy(scale.engines["melody"], "choir", frames, melody=make_clip(75))
    assert heard == [seconds]


@pytest.mark.parametrize("scale", ["half a second"], indirect=True)
@pytest.mark.parametrize(("seconds", "count"), [(30, 0), (66, 2)])
def test_free_memory_is_given_back_between_windows(
    scale: Scale, seconds: float, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trim = Mock(wraps=heap.return_free_memory)
    monkeypatch.setattr("dgx_music.inference.musicgen.engine.return_free_memory", trim)
    greedy(scale.engines["mono"], "choir", scale.frames(seconds))
    assert trim.call_count == count


@pytest.mark.parametrize("scale", ["30 s"], indirect=True)
def test_66_seconds_have_audiocrafts_tokens_at_the_true_size_of_windows(scale: Scale) -> None:
    codes = make_codes(scale.engines["mono"], 3_300)
    assert scale.shortfall("mono", codes) < ROUNDING
    codes[0, 2_400] += 1  # the first frame of the third window
    assert scale.shortfall("mono", codes) > ROUNDING


# where windows meet


def changes(samples: Any) -> dict[str, Any]:
    """Return how much the sound changes from each frame to the next, by three measures."""
    frames = samples.reshape(-1, FRAME)
    levels = 20 * np.log10(np.sqrt(np.square(frames).mean(axis=1)))
    spectra = np.log(np.abs(np.fft.rfft(frames * np.hanning(FRAME))) + 1e-3)
    bends = np.abs(np.diff(samples, n=2, prepend=0, append=0)).reshape(-1, FRAME)
    return {
        "level": np.abs(np.diff(levels)),
        "click": np.maximum(bends[:-1, -8:].max(axis=1), bends[1:, :8].max(axis=1)),
        "spectrum": np.abs(np.diff(spectra, axis=0)).mean(axis=1),
    }


def outstanding(samples: Any, joints: list[int]) -> set[str]:
    """Return the measures by which the joints, each before this frame, differ from other places.

    The mean of their ranks is then off by more than three standard deviations, or one of them is
    larger than all of its neighbours by a quarter.
    """
    found = set()
    for name, sizes in changes(samples).items():
        own = sizes[np.array(joints) - 1]
        others = np.delete(sizes, np.array(joints) - 1)
        ranks = (others[:, None] < own).mean(axis=0)
        if ranks.mean() > 0.5 + 3 / np.sqrt(12 * len(joints)) or own.max() > 1.25 * others.max():
            found.add(name)
    return found


@pytest.mark.parametrize("scale", ["half a second"], indirect=True)
def test_nobody_hears_where_windows_meet(scale: Scale) -> None:
    frames = scale.frames(300)
    samples = greedy(scale.engines["mono"], "choir", frames, temperature=1, seed=3)[0]
    of_tokens, of_codec = list(range(25, frames, 15)), list(range(50, frames, 50))
    assert outstanding(samples, of_tokens) == set()
    assert outstanding(samples, of_codec) == set()
    for joint in of_codec:
        samples[joint * FRAME - 2] *= 9  # a click that it would hear
    assert outstanding(samples, of_codec) >= {"click"}
