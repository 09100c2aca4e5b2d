"""Chroma and prefixes against transformers' feature extractor and ``generate``."""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer, GenerationConfig, MusicgenMelodyForConditionalGeneration

from dgx_music.inference.musicgen.melody import MelodyReader, chroma
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from tests.inference.references import PAD, melody_inputs, melody_prefix

CPU = torch.device("cpu")

RATE = 32_000
PROMPTS = ("lo-fi piano", "a very fast and loud drum solo in a small wet cave", "", None)
LENGTHS = [0, 1, 2, 8_191, 8_193, 16_383, 16_384, 16_385, 20_480, 100_000]


def tone(hertz: float, seconds: float = 1.0, rate: int = RATE) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * rate)) / rate)


def noise(sample_count: int, seed: int = 0) -> Tensor:
    return torch.randn(sample_count, generator=torch.Generator().manual_seed(seed))


def song(sample_count: int, seed: int) -> Tensor:
    """Return a random sum of notes that come and go, with some noise, and silence in the middle."""
    dice = torch.Generator().manual_seed(seed)
    time = torch.arange(sample_count) / RATE
    hertz, loudness, beat = (
        55 * 2 ** (5 * torch.rand(9, 1, generator=dice)),
        *torch.rand(2, 9, 1, generator=dice),
    )
    notes = loudness * torch.sin(2 * math.pi * hertz * time) * (torch.sin(9 * beat * time) > 0)
    is_silent = (time - time.mean()).abs() < 1
    return (notes.sum(0) + 0.03 * noise(sample_count, seed)).masked_fill(is_silent, 0)


def classes(samples: Tensor, rate: int = RATE) -> list[int]:
    """Return the pitch class of each frame."""
    made = chroma(samples, rate)
    assert made.dtype == torch.float32
    assert made.shape[1] == 12
    assert torch.equal(made.sum(1), torch.ones(len(made)))
    assert torch.equal(made.amax(1), torch.ones(len(made)))
    return made.argmax(1).tolist()


@pytest.mark.parametrize("octave", range(-2, 4))
@pytest.mark.parametrize("pitch_class", range(12))
def test_a_tone_is_its_pitch_class_in_every_octave(pitch_class: int, octave: int) -> None:
    """A of 440 Hz is class 9, and the C below it 0."""
    hertz = 440 * 2 ** ((pitch_class - 9) / 12 + octave)
    assert set(classes(tone(hertz))) == {pitch_class}


@pytest.mark.parametrize(("cents", "expected"), [(-40, 9), (40, 9), (60, 10), (-60, 8)])
def test_a_tone_out_of_tune_is_the_nearest_pitch_class(cents: int, expected: int) -> None:
    assert set(classes(tone(440 * 2 ** (cents / 1200)))) == {expected}


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_the_sample_rate_counts(rate: int) -> None:
    assert set(classes(tone(440, 1, rate), rate)) == {9}


def test_the_melody_is_followed() -> None:
    notes = [4, 2, 0, 2, 4]
    samples = torch.cat([tone(440 * 2 ** ((note - 9) / 12)) for note in notes])
    heard = classes(samples)
    centres = [round((index + 0.5) * RATE / 4096) for index in range(len(notes))]
    assert [heard[frame] for frame in centres] == notes


@pytest.mark.parametrize("loudness", [1e-9, 1e-4, 1e4])
def test_loudness_does_not_matter(loudness: float) -> None:
    assert classes(loudness * song(90_000, 1)) == classes(song(90_000, 1))


@pytest.mark.parametrize("sample_count", LENGTHS)
def test_silence_is_the_same_as_no_melody(sample_count: int) -> None:
    assert set(classes(torch.zeros(sample_count))) == {0}


def test_so_is_silence_between_notes() -> None:
    heard = classes(torch.cat([tone(440, 2), torch.zeros(2 * RATE), tone(440, 2)]))
    assert set(heard[:13]) == set(heard[-13:]) == {9}
    assert set(heard[19:29]) == {0}


@pytest.mark.parametrize(
    ("sample_count", "frame_count"),
    [
        (0, 5),
        (1, 5),
        (16_384, 5),
        (20_479, 5),
        (20_480, 6),
        (959_999, 235),
        (960_000, 235),
        (2_000_000, 235),
    ],
)
def test_a_frame_is_4096_samples_and_30_s_are_the_most(sample_count: int, frame_count: int) -> None:
    assert len(classes(noise(sample_count))) == frame_count


def test_what_comes_after_30_s_is_not_heard() -> None:
    samples = torch.cat([tone(440, 30), tone(300, 5)])
    assert set(classes(samples)) == {9}


def test_samples_of_any_float_format_are_the_same_melody() -> None:
    assert classes(song(90_000, 2).double()) == classes(song(90_000, 2))


class Spectrogram:
    """What torchaudio documents of its transform for these arguments.

    The short-time Fourier transform, centred, with a periodic Hann window; divided by the root of
    the window's summed squares (``normalized``); then the ``power`` of its magnitudes.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options

    def __call__(self, samples: Tensor) -> Tensor:
        """Return ``[batch, frequency, frame]``."""
        assert self._options | {"center": True, "pad": 0, "normalized": True} == self._options
        size, power = self._options["n_fft"], self._options["power"]
        window = torch.hann_window(self._options["win_length"])
        edges = (size // 2, size // 2)
        padded = torch.nn.functional.pad(samples[:, None], edges, mode="reflect")[:, 0]
        frames = padded.unfold(-1, size, self._options["hop_length"])  # [batch, frame, size]
        spectrum = torch.fft.rfft(frames * window) / window.square().sum().sqrt()
        return spectrum.abs().pow(power).transpose(1, 2)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformers' own extractor; its one need of torchaudio is replaced."""
    theirs = import_module("transformers.models.musicgen_melody.feature_extraction_musicgen_melody")
    torchaudio = SimpleNamespace(transforms=SimpleNamespace(Spectrogram=Spectrogram))
    monkeypatch.setattr(theirs, "torchaudio", torchaudio, raising=False)
    return theirs.MusicgenMelodyFeatureExtractor()


@pytest.mark.parametrize("sample_count", [*LENGTHS[1:], 320_000, 960_000, 1_000_000])
@pytest.mark.parametrize("make", [song, noise])
def test_chroma_is_that_of_the_feature_extractor(
    extractor: Any, make: Any, sample_count: int
) -> None:
    samples = make(sample_count, sample_count)
    expected = extractor(samples.numpy(), sampling_rate=RATE, return_tensors="pt").input_features[0]
    assert torch.equal(chroma(samples, RATE), expected)


# the prefix


@cache
def toy(channels: int = 1) -> tuple[MusicgenMelodyForConditionalGeneration, ByT5Tokenizer]:
    return build_tiny_melody(channels)


@cache
def reader(channels: int = 1) -> MelodyReader:
    return MelodyReader(toy(channels)[0], CPU)


@torch.inference_mode()
def text_states(prompt: str | None, channels: int = 1) -> Tensor | None:
    model, tokenizer = toy(channels)
    if prompt is None:
        return None
    encoded = model.text_encoder(**tokenizer(prompt, return_tensors="pt"))
    return encoded.last_hidden_state[0]  # [X, width]


def melody(frame_count: int | None) -> Tensor | None:
    if frame_count is None:
        return None
    return torch.eye(12)[
        torch.randint(12, (frame_count,), generator=torch.Generator().manual_seed(frame_count))
    ]


def generates_with(
    prompt: str | None, melody: Tensor | None, guidance_scale: float, channels: int
) -> Tensor:
    """Return the prefix ``[pass, E, hidden]`` that ``generate`` gives its decoder at first."""
    model, tokenizer = toy(channels)
    seen: list[Tensor | None] = []
    hook = model.decoder.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["encoder_hidden_states"]),
        with_kwargs=True,
    )
    config = GenerationConfig(
        do_sample=False, guidance_scale=guidance_scale, max_new_tokens=8, decoder_start_token_id=PAD
    )
    with hook:
        model.generate(**melody_inputs(tokenizer, prompt, melody), generation_config=config)
    assert len(seen) == 8
    assert isinstance(seen[0], Tensor)
    assert seen[1:] == [None] * 7
    return seen[0]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("prompt", [PROMPTS[0], "", None])
@pytest.mark.parametrize("frame_count", [None, 1, 47, 234, 235, 236])
def test_the_prefix_is_that_of_generate(
    frame_count: int | None, prompt: str | None, channels: int
) -> None:
    expected = generates_with(prompt, melody(frame_count), 3.0, channels)
    made = reader(channels).prefix(text_states(prompt, channels), melody(frame_count), None)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("frame_count", [None, 47])
def test_the_conditional_pass_alone_is_that_of_generate_unguided(frame_count: int | None) -> None:
    expected = generates_with(PROMPTS[0], melody(frame_count), 1.0, 1)
    made = reader().prefix(text_states(PROMPTS[0]), melody(frame_count), None)
    torch.testing.assert_close(made[:1], expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("frame_count", [None, 47, 300])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", PROMPTS)
def test_the_shorter_text_is_padded_as_transformers_masks_padding(
    negative: str | None, prompt: str | None, frame_count: int | None
) -> None:
    expected = melody_prefix(*toy(), [prompt, negative], melody(frame_count))
    made = reader().prefix(text_states(prompt), melody(frame_count), text_states(negative))
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)
    assert made.shape == (2, 235 + max(len(text or "") + 1 for text in (prompt, negative)), 64)


def test_no_text_is_one_zero() -> None:
    made = reader().prefix(None, melody(47), None)
    assert made.shape == (2, 236, 64)
    assert made[:, 235:].count_nonzero() == 0
    assert reader().melody_length == 235


def test_the_unconditional_pass_has_no_melody() -> None:
    one, other = (
        reader().prefix(text_states(PROMPTS[0]), melody(frames), None) for frames in (47, None)
    )
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_prefix_is_in_the_decoders_number_format(dtype: torch.dtype) -> None:
    model, _ = build_tiny_melody()
    for part in (model.decoder, model.enc_to_dec_proj, model.audio_enc_to_dec_proj):
        part.to(dtype)
    made = MelodyReader(model, CPU).prefix(
        text_states(PROMPTS[0]), melody(47), text_states(PROMPTS[1])
    )
    assert made.dtype == dtype
    exact = reader().prefix(text_states(PROMPTS[0]), melody(47), text_states(PROMPTS[1]))
    torch.testing.assert_close(made.float(), exact, atol=0.05, rtol=0.05)


def test_widths_that_agree_need_no_projection() -> None:
    """As in transformers, which has none in this case."""
    decoder = SimpleNamespace(lm_heads=[torch.nn.Linear(12, 5)])
    model: Any = SimpleNamespace(config=SimpleNamespace(chroma_length=7), decoder=decoder)
    bare = MelodyReader(model, CPU)
    made = bare.prefix(torch.ones(3, 12), melody(7), None)
    assert torch.equal(made[0], torch.cat([melody(7), torch.ones(3, 12)]))
    assert made[1, :, 0].tolist() == [1] * 7 + [0] * 3


def test_the_reader_copies_no_weights() -> None:
    model, _ = build_tiny_melody()
    before = MelodyReader(model, CPU)
    with torch.no_grad():
        model.audio_enc_to_dec_proj.bias += 1
    after = MelodyReader(model, CPU)
    assert torch.equal(before.prefix(None, None, None), after.prefix(None, None, None))


def test_the_prefix_is_where_the_projections_are_and_not_the_decoder() -> None:
    """The decoder's weights stay on the host until its layers are fused."""
    model, _ = build_tiny_melody()
    model.decoder.to("meta")
    made = MelodyReader(model, CPU).prefix(text_states(PROMPTS[0]), melody(47), None)
    assert torch.equal(made, reader().prefix(text_states(PROMPTS[0]), melody(47), None))


# the toys


@pytest.mark.parametrize("build", [build_tiny, build_tiny_melody])
@pytest.mark.parametrize("channels", [1, 2])
def test_toys_are_the_same_each_time_and_leave_the_random_state_alone(
    build: Any, channels: int
) -> None:
    state = torch.get_rng_state()
    one, other = build(channels)[0].state_dict(), build(channels)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), state)
