"""The references against ``generate``, as far as it can do the same."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import ByT5Tokenizer

from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from tests.inference.references import (
    Model,
    audiocraft_long_form,
    generated_codes,
    melody_inputs,
    melody_prefix,
    melody_reference_codes,
    plain_greedy,
)

PROMPTS = ("lo-fi piano", "a very fast and loud drum solo in a small wet cave")


@cache
def toy(kind: str, channels: int = 1) -> tuple[Model, ByT5Tokenizer]:
    return (build_tiny_melody if kind == "melody" else build_tiny)(channels)


def tune(*classes: int) -> Tensor:
    return torch.eye(12)[list(classes)]  # [frame, 12]


MELODIES = {"plain": None, "melody": tune(4, 2, 0, 2, 4, 4, 4)}

every_model = pytest.mark.parametrize(
    ("kind", "channels"), [("plain", 1), ("plain", 2), ("melody", 1), ("melody", 2)]
)


@every_model
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("frames", [4, 20])
def test_the_plain_loop_is_generate(
    kind: str, channels: int, guidance_scale: float, frames: int
) -> None:
    model, tokenizer = toy(kind, channels)
    for prompt in PROMPTS:
        inputs = melody_inputs(tokenizer, prompt, MELODIES[kind])
        expected = generated_codes(model, frames, guidance_scale, **inputs)
        assert expected.shape == (4 * channels, frames)
        codes = plain_greedy(
            model, tokenizer, prompt, frames, guidance_scale, chroma=MELODIES[kind]
        )
        assert torch.equal(codes, expected)


@every_model
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("given", [1, 5])
def test_a_continuation_is_that_of_generate(
    kind: str, channels: int, guidance_scale: float, given: int
) -> None:
    model, tokenizer = toy(kind, channels)
    forced = torch.randint(
        2048, (4 * channels, given), generator=torch.Generator().manual_seed(given)
    )
    inputs = melody_inputs(tokenizer, PROMPTS[0], MELODIES[kind])
    expected = generated_codes(model, 12, guidance_scale, **inputs, decoder_input_ids=forced)
    codes = plain_greedy(
        model, tokenizer, PROMPTS[0], 12, guidance_scale, forced=forced, chroma=MELODIES[kind]
    )
    assert torch.equal(codes, expected)
    assert torch.equal(codes[:, :given], forced)


@every_model
def test_without_a_prompt_the_plain_loop_is_generate_of_masked_text(
    kind: str, channels: int
) -> None:
    model, tokenizer = toy(kind, channels)
    expected = generated_codes(model, 12, 3.0, **melody_inputs(tokenizer, None, MELODIES[kind]))
    codes = plain_greedy(model, tokenizer, None, 12, 3.0, chroma=MELODIES[kind])
    assert torch.equal(codes, expected)


@every_model
def test_a_negative_prompt_matters(kind: str, channels: int) -> None:
    model, tokenizer = toy(kind, channels)
    without, one, other = (
        plain_greedy(
            model, tokenizer, PROMPTS[0], 12, 3.0, negative=negative, chroma=MELODIES[kind]
        )
        for negative in (None, PROMPTS[1], "choir")
    )
    assert not torch.equal(without, one)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["plain", "melody"])
def test_guiding_a_prompt_away_from_itself_is_no_guidance(kind: str) -> None:
    model, tokenizer = toy(kind)
    guided = plain_greedy(model, tokenizer, PROMPTS[0], 12, 3.0, negative=PROMPTS[0])
    assert torch.equal(guided, plain_greedy(model, tokenizer, PROMPTS[0], 12, 1.0))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_melody_toy_hears_prompt_and_melody(guidance_scale: float, channels: int) -> None:
    codes = [
        melody_reference_codes(*toy("melody", channels), prompt, 12, guidance_scale, melody)
        for prompt in (None, *PROMPTS)
        for melody in (None, tune(4), tune(4, 5))
    ]
    assert len({tuple(code.flatten().tolist()) for code in codes}) == len(codes)
    assert min(len(code.unique()) for code in codes) > 12


@pytest.mark.parametrize("channels", [1, 2])
def test_the_melody_toy_hears_earlier_tokens_of_every_codebook(channels: int) -> None:
    model, tokenizer = toy("melody", channels)
    states = melody_prefix(model, tokenizer, [PROMPTS[0], None], tune(4))[:1]
    tokens = torch.randint(2047, (4 * channels, 5), generator=torch.Generator().manual_seed(1))
    before = model.decoder(tokens, encoder_hidden_states=states).logits[:, -1]
    for codebook in range(4 * channels):
        tokens[codebook, 1] += 1
        after = model.decoder(tokens, encoder_hidden_states=states).logits[:, -1]
        assert (after - before).abs().max() > 0.01
        before = after


# long form


@pytest.mark.parametrize("kind", ["plain", "melody"])
def test_what_fits_into_a_window_is_one_generation(kind: str) -> None:
    model, tokenizer = toy(kind)
    for total in (9, 10):
        codes = audiocraft_long_form(model, tokenizer, PROMPTS[0], total, 3.0, window=10, stride=6)
        assert torch.equal(codes, plain_greedy(model, tokenizer, PROMPTS[0], total, 3.0))


@pytest.mark.parametrize("total", [11, 16, 17, 25])
@pytest.mark.parametrize("given", [0, 3])
def test_each_window_continues_the_end_of_the_one_before(total: int, given: int) -> None:
    model, tokenizer = toy("plain")
    forced = torch.arange(4 * given).view(4, given) if given else None
    codes = audiocraft_long_form(
        model, tokenizer, PROMPTS[0], total, 3.0, window=10, stride=6, forced=forced
    )
    assert codes.shape == (4, total)
    assert torch.equal(
        codes[:, :10], plain_greedy(model, tokenizer, PROMPTS[0], 10, 3.0, forced=forced)
    )
    last = (total - 10 + 5) // 6 * 6  # where the last window starts
    again = plain_greedy(
        model, tokenizer, PROMPTS[0], total - last, 3.0, forced=codes[:, last : last + 4]
    )
    assert torch.equal(codes[:, last:], again)


def test_each_window_has_the_melody_of_its_own_place() -> None:
    model, tokenizer = toy("melody")
    heard: list[int] = []

    def chroma_at(offset: int) -> Tensor:
        heard.append(offset)
        return tune(offset % 12)

    codes = audiocraft_long_form(
        model, tokenizer, PROMPTS[0], 20, 3.0, window=10, stride=7, chroma_at=chroma_at
    )
    assert heard == [0, 7, 14]
    last = plain_greedy(
        model, tokenizer, PROMPTS[0], 6, 3.0, forced=codes[:, 14:17], chroma=tune(2)
    )
    assert torch.equal(codes[:, 14:], last)
