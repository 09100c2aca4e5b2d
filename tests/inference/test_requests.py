"""Requests of every kind through the whole engine: the audio is that of transformers, greedily."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgx_music.audio.samples import Audio
from dgx_music.errors import GenerationCancelledError, GenerationRejectedError
from dgx_music.inference.musicgen.conditioning import LONGEST_PREFIX_TEXT
from dgx_music.inference.musicgen.engine import MusicGenEngine
from dgx_music.inference.musicgen.melody import chroma
from dgx_music.inference.musicgen.mix import tune_of
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from dgx_music.inference.musicgen.windows import Window, WindowRun, cut
from tests.inference.references import audiocraft_long_form, plain_greedy
from tests.inference.test_musicgen import FakeRun, generate, load

RATE, FRAME = 32_000, 640
WINDOW = {"window": 25, "stride": 15}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy models as folders, by kind."""
    root = tmp_path_factory.mktemp("models")
    for name, (model, tokenizer) in {name: make() for name, make in MODELS.items()}.items():
        for part in (model, tokenizer):
            part.save_pretrained(root / name)
    return {name: root / name for name in MODELS}


MODELS = {
    "mono": cache(lambda: build_tiny()),
    "stereo": cache(lambda: build_tiny(2)),
    "melody": cache(lambda: build_tiny_melody()),
    "stereo melody": cache(lambda: build_tiny_melody(2)),
}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, MusicGenEngine]:
    return {name: load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def short_windows(folders: dict[str, Path]) -> Iterator[dict[str, MusicGenEngine]]:
    """Engines with a window of half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dgx_music.inference.musicgen.engine.WINDOW_SECONDS", 0.5)
        patch.setattr("dgx_music.inference.musicgen.conditioning.WINDOW_SECONDS", 0.5)
        patch.setattr("dgx_music.inference.musicgen.budget.WINDOW_SECONDS", 0.5)
        yield {name: load(folder) for name, folder in folders.items()}


def greedy(
    engine: MusicGenEngine, prompt: str, frames: int, run: FakeRun | None = None, **fields: Any
) -> Any:
    fields = {"model": "/models/toy", "temperature": 0, **fields}
    return generate(engine, run, prompt=prompt, duration=frames * FRAME / RATE, **fields).samples


def sound(name: str, codes: Tensor) -> Any:
    """Return the samples ``[channel, sample]`` that transformers' codec makes of the codes."""
    codec, sides = MODELS[name]()[0].audio_encoder, 2 if "stereo" in name else 1
    with torch.inference_mode():
        parts = [
            codec.decode(codes[None, None, side::sides], [None]).audio_values[0]
            for side in range(sides)
        ]
    return torch.cat(parts).numpy()


def make_clip(frames: int, channels: int = 1, hertz: float = 440.0) -> Audio:
    samples = np.sin(2 * np.pi * hertz * np.arange(frames * FRAME) / RATE) * 0.3
    return Audio(np.repeat(samples[None].astype(np.float32), channels, axis=0), RATE)


def encode(name: str, clip: Audio) -> Tensor:
    """Return the codes ``[K, frame]`` that transformers' codec makes of a clip."""
    codec = MODELS[name]()[0].audio_encoder
    with torch.inference_mode():
        sides = [
            codec.encode(torch.from_numpy(side)[None, None]).audio_codes[0, 0]
            for side in clip.samples
        ]
    return torch.stack(sides, dim=1).flatten(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_prompt_is_unconditional(engines: dict[str, MusicGenEngine], name: str) -> None:
    expected = plain_greedy(*MODELS[name](), None, 12, 1.0)
    assert np.array_equal(greedy(engines[name], "", 12), sound(name, expected))


@pytest.mark.parametrize("name", MODELS)
def test_a_negative_prompt_is_steered_away_from(
    engines: dict[str, MusicGenEngine], name: str
) -> None:
    expected = plain_greedy(*MODELS[name](), "choir", 12, 3.0, negative="drums")
    assert np.array_equal(
        greedy(engines[name], "choir", 12, negative_prompt="drums"), sound(name, expected)
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_negative_prompt_guides_without_a_prompt(
    engines: dict[str, MusicGenEngine], name: str
) -> None:
    expected = plain_greedy(*MODELS[name](), None, 12, 3.0, negative="drums")
    assert np.array_equal(
        greedy(engines[name], "", 12, negative_prompt="drums"), sound(name, expected)
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_clip_is_continued(engines: dict[str, MusicGenEngine], name: str) -> None:
    clip = make_clip(7, 2 if "stereo" in name else 1)
    expected = plain_greedy(*MODELS[name](), "choir", 20, 3.0, forced=encode(name, clip))
    assert np.array_equal(
        greedy(engines[name], "choir", 20, continuation=clip), sound(name, expected)
    )


def test_a_clip_of_other_channels_and_rate_is_fitted(engines: dict[str, MusicGenEngine]) -> None:
    mono, stereo = make_clip(7), make_clip(7, 2)
    expected = greedy(engines["stereo"], "choir", 20, continuation=stereo)
    assert np.array_equal(greedy(engines["stereo"], "choir", 20, continuation=mono), expected)
    slow = Audio(stereo.samples[:, ::2], RATE // 2)
    assert greedy(engines["mono"], "choir", 20, continuation=slow).shape == (1, 20 * FRAME)


def test_a_clip_that_ends_in_the_last_frame_leaves_one_to_be_made(
    engines: dict[str, MusicGenEngine],
) -> None:
    clip = Audio(make_clip(10).samples[:, :-10], RATE)
    assert greedy(engines["mono"], "choir", 10, continuation=clip).shape == (1, 10 * FRAME)


@pytest.mark.parametrize("name", ["melody", "stereo melody"])
def test_a_melody_is_followed(engines: dict[str, MusicGenEngine], name: str) -> None:
    tune = make_clip(100, hertz=523.25)
    expected = plain_greedy(
        *MODELS[name](), "choir", 12, 3.0, chroma=chroma(torch.from_numpy(tune.samples[0]), RATE)
    )
    assert np.array_equal(greedy(engines[name], "choir", 12, melody=tune), sound(name, expected))


@pytest.mark.parametrize(("kind", "read"), [("solo", chroma), ("mix", tune_of)])
def test_how_a_melody_is_read_is_as_the_request_says(
    engines: dict[str, MusicGenEngine], kind: str, read: Callable[[Tensor, int], Tensor]
) -> None:
    both = make_clip(100, hertz=110.0).samples + 0.2 * make_clip(100, hertz=659.26).samples
    samples = torch.from_numpy(both[0])
    assert not torch.equal(chroma(samples, RATE), tune_of(samples, RATE))
    heard = read(samples, RATE)
    expected = plain_greedy(*MODELS["melody"](), "choir", 12, 3.0, chroma=heard)
    made = greedy(engines["melody"], "choir", 12, melody=Audio(both, RATE), melody_kind=kind)
    assert np.array_equal(made, sound("melody", expected))


def test_a_melody_needs_no_prompt(engines: dict[str, MusicGenEngine]) -> None:
    tune = make_clip(100, hertz=523.25)
    expected = plain_greedy(
        *MODELS["melody"](), None, 12, 3.0, chroma=chroma(torch.from_numpy(tune.samples[0]), RATE)
    )
    assert np.array_equal(greedy(engines["melody"], "", 12, melody=tune), sound("melody", expected))


@pytest.mark.parametrize(
    ("name", "prompt", "rate"),
    [("melody", "choir", RATE), ("melody", "", 24_000), ("stereo melody", "choir", 24_000)],
)
def test_a_melody_that_is_not_silence_is_heard(
    engines: dict[str, MusicGenEngine], name: str, prompt: str, rate: int
) -> None:
    """An A: a C has the class of silence, and would be the same audio without a melody."""
    tune = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)[None].astype(np.float32)
    heard = torch.eye(12)[[9]]
    expected = plain_greedy(*MODELS[name](), prompt or None, 12, 3.0, chroma=heard)
    assert not torch.equal(expected, plain_greedy(*MODELS[name](), prompt or None, 12, 3.0))
    assert np.array_equal(
        greedy(engines[name], prompt, 12, melody=Audio(tune, rate)), sound(name, expected)
    )


@pytest.mark.parametrize(
    ("name", "other"), [("mono", "musicgen-melody"), ("stereo", "musicgen-stereo-melody")]
)
def test_a_model_that_hears_no_melody_rejects_it(
    engines: dict[str, MusicGenEngine], name: str, other: str
) -> None:
    with pytest.raises(GenerationRejectedError, match=f"hears no melody; use {other}[.]"):
        greedy(engines[name], "choir", 12, melody=make_clip(50))


def test_a_text_too_long_for_a_melody_model_is_rejected(
    engines: dict[str, MusicGenEngine],
) -> None:
    with pytest.raises(GenerationRejectedError, match=f"at most {LONGEST_PREFIX_TEXT} tokens"):
        greedy(engines["melody"], "x" * (LONGEST_PREFIX_TEXT + 1), 12)
    assert greedy(engines["melody"], "x" * (LONGEST_PREFIX_TEXT - 1), 12).shape == (1, 12 * FRAME)


# longer than a window


@pytest.mark.parametrize("name", ["mono", "stereo"])
@pytest.mark.parametrize("frames", [26, 40, 41, 70])
def test_long_clips_are_made_in_audiocrafts_windows(
    short_windows: dict[str, MusicGenEngine], name: str, frames: int
) -> None:
    expected = audiocraft_long_form(*MODELS[name](), "choir", frames, 3.0, **WINDOW)
    # More than a second of audio takes the codec two windows, which round a little differently.
    made = greedy(short_windows[name], "choir", frames)
    assert np.allclose(made, sound(name, expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("given", [4, 20, 25])
def test_a_long_continuation_is_made_in_windows_too(
    short_windows: dict[str, MusicGenEngine], given: int
) -> None:
    clip = make_clip(given)
    forced = encode("mono", clip)
    expected = audiocraft_long_form(
        *MODELS["mono"](), "choir", 50, 3.0, negative="drums", forced=forced, **WINDOW
    )
    made = greedy(short_windows["mono"], "choir", 50, continuation=clip, negative_prompt="drums")
    assert np.array_equal(made, sound("mono", expected))


def test_each_window_hears_its_own_part_of_the_melody(
    short_windows: dict[str, MusicGenEngine],
) -> None:
    tune = np.concatenate([make_clip(20, hertz=hertz).samples[0] for hertz in (261.63, 440.0)])

    def chroma_at(offset: int) -> Tensor:
        heard = np.resize(np.roll(tune, -offset * FRAME), 25 * FRAME)  # from there on, repeated
        return chroma(torch.from_numpy(heard), RATE)

    assert not torch.equal(chroma_at(0), chroma_at(15))
    expected = audiocraft_long_form(
        *MODELS["melody"](), "choir", 45, 3.0, chroma_at=chroma_at, **WINDOW
    )
    made = greedy(short_windows["melody"], "choir", 45, melody=Audio(tune[None], RATE))
    assert np.array_equal(made, sound("melody", expected))


def test_progress_of_a_long_clip_never_goes_back_and_its_slot_is_freed_once(
    short_windows: dict[str, MusicGenEngine],
) -> None:
    run = FakeRun()
    greedy(short_windows["mono"], "choir", 70, run)
    assert run.progress == sorted(run.progress)
    assert run.progress[-1] == 1
    assert run.freed_at == len(run.progress) - 1


def test_a_seed_gives_a_long_clip_the_same_audio(short_windows: dict[str, MusicGenEngine]) -> None:
    one, same, other = (
        generate(short_windows["mono"], duration=1.0, seed=seed).samples for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("total", "given", "expected"),
    [
        (4, 0, [(0, 4, 0)]),
        (1500, 0, [(0, 1500, 0)]),
        (1501, 0, [(0, 1500, 0), (900, 601, 600)]),
        (2400, 0, [(0, 1500, 0), (900, 1500, 600)]),
        (1550, 1500, [(900, 650, 600)]),
        (3000, 100, [(0, 1500, 100), (900, 1500, 600), (1800, 1200, 600)]),
        (15000, 0, [(900 * n, min(1500, 15000 - 900 * n), 600 if n else 0) for n in range(16)]),
    ],
)
def test_windows_overlap_by_600_frames(
    total: int, given: int, expected: list[tuple[int, int, int]]
) -> None:
    assert list(cut(total, given, 1500)) == [Window(*window) for window in expected]


def test_a_windows_run_tells_its_share_of_the_whole_and_asks_for_it() -> None:
    run = FakeRun(cancel_at=3)
    run.make_room = lambda: True  # type: ignore[method-assign]
    of_window = WindowRun(run, Window(900, 600, 300), 1500)
    for progress in (0.0, 0.75, 1.0):
        of_window.check_cancelled()
        of_window.report_progress(progress)

    assert run.progress == [0.8, 0.9, 1.0]
    assert of_window.make_room()
    with pytest.raises(GenerationCancelledError):
        of_window.check_cancelled()
