"""What a row starts from and reads, against references made of transformers' modules.

The tokens are the same, greedily, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.conditioning import Conditioner
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.melody import MelodyReader
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from dgx_music.sampling import Sampling
from tests.inference.factories import make_request
from tests.inference.references import plain_greedy
from tests.inference.test_slots import (
    GREEDY,
    PROMPTS,
    decode,
    decoder,
    make_row,
    reference,
    reference_codes,
    text_states,
)
from tests.patience import PATIENCE

CPU = torch.device("cpu")

NEGATIVE = "drums"


def make_negative(text: str = NEGATIVE, channels: int = 1) -> Tensor:
    return decoder(channels).read_text(text_states(text, channels))


def make_codes(frames: int, channels: int = 1, seed: int = 3) -> Tensor:
    return torch.randint(
        2048, (4 * channels, frames), generator=torch.Generator().manual_seed(seed)
    )


# a negative prompt, and none at all


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    "negative",
    [NEGATIVE, "a text that is a good deal longer than the prompt which it stands beside"],
)
def test_a_negative_prompt_is_what_the_unconditional_pass_reads(
    channels: int, negative: str
) -> None:
    row = make_row(PROMPTS[0], 20, channels, negative=make_negative(negative, channels), **GREEDY)
    expected = plain_greedy(*reference(channels), PROMPTS[0], 20, 3.0, negative=negative)
    assert torch.equal(decode([row])[0], expected)
    assert not torch.equal(expected, reference_codes(PROMPTS[0], 20, 3.0, channels))


def test_rows_with_and_without_negative_prompts_share_a_batch() -> None:
    rows = [
        make_row(PROMPTS[0], 20, negative=make_negative(), **GREEDY),
        make_row(PROMPTS[1], 12, **GREEDY),
        make_row(PROMPTS[2], 25, guidance_scale=1.0, **GREEDY),
        make_row(PROMPTS[3], 9, negative=make_negative(PROMPTS[1]), guidance_scale=2.0, **GREEDY),
    ]
    first, second, third, fourth = decode(rows, slot_count=3)
    assert torch.equal(first, plain_greedy(*reference(1), PROMPTS[0], 20, 3.0, negative=NEGATIVE))
    assert torch.equal(second, reference_codes(PROMPTS[1], 12, 3.0))
    assert torch.equal(third, reference_codes(PROMPTS[2], 25, 1.0))
    assert torch.equal(fourth, plain_greedy(*reference(1), PROMPTS[3], 9, 2.0, negative=PROMPTS[1]))


@pytest.mark.parametrize("companion", [None, PROMPTS[1], PROMPTS[1] * 3])
def test_a_row_without_text_is_unconditional(companion: str | None) -> None:
    row = make_row(frames=20, guidance_scale=1.0, **GREEDY)
    row.text = None
    rows = [row] if companion is None else [row, make_row(companion, 25, **GREEDY)]
    assert torch.equal(decode(rows)[0], plain_greedy(*reference(1), None, 20, 1.0))


def test_a_negative_prompt_needs_no_prompt() -> None:
    row = make_row(frames=20, negative=make_negative(), **GREEDY)
    row.text = None
    assert torch.equal(
        decode([row])[0], plain_greedy(*reference(1), None, 20, 3.0, negative=NEGATIVE)
    )


# continuation


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("given", [1, 2, 3, 4, 5, 19])
def test_a_continuation_starts_with_the_codes_it_is_given(channels: int, given: int) -> None:
    codes = make_codes(given, channels)
    decoded = decode([make_row(PROMPTS[0], 20, channels, given=codes, **GREEDY)])[0]
    assert torch.equal(decoded[:, :given], codes)
    assert torch.equal(
        decoded, plain_greedy(*reference(channels), PROMPTS[0], 20, 3.0, forced=codes)
    )


def test_continuations_join_a_running_batch_and_used_slots() -> None:
    lengths, given = (30, 9, 22, 15), (0, 5, 11, 2)
    rows = [
        make_row(prompt, frames, given=make_codes(count) if count else None, **GREEDY)
        for prompt, frames, count in zip(PROMPTS, lengths, given, strict=True)
    ]
    for prompt, row, codes in zip(PROMPTS, rows, decode(rows, slot_count=2), strict=True):
        expected = plain_greedy(*reference(1), prompt, row.frame_count, 3.0, forced=row.given)
        assert torch.equal(codes, expected)


@pytest.mark.parametrize(
    "options",
    [{"guidance_scale": 1.0}, {"negative": make_negative()}],
    ids=["unguided", "negative"],
)
def test_a_continuation_reads_what_any_row_reads(options: dict[str, Any]) -> None:
    row = make_row(PROMPTS[1], 20, given=make_codes(8), **options, **GREEDY)
    negative = NEGATIVE if "negative" in options else None
    expected = plain_greedy(
        *reference(1),
        PROMPTS[1],
        20,
        row.sampling.guidance_scale,
        negative=negative,
        forced=row.given,
    )
    assert torch.equal(decode([row])[0], expected)


def test_given_frames_are_read_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = make_codes(40)
    (whole,) = decode([make_row(frames=60, given=codes, **GREEDY)])
    monkeypatch.setattr("dgx_music.inference.musicgen.decoder._PREFILL_POSITIONS", 7)
    (pieces,) = decode([make_row(frames=60, given=codes, **GREEDY)])
    assert torch.equal(whole, pieces)


# melodies


@cache
def melody_parts(channels: int) -> tuple[Decoder, MelodyReader]:
    model, _ = build_tiny_melody(channels)
    reader = MelodyReader(model, CPU)
    return Decoder(model.decoder, None, 235 + 60 + 40), reader


def make_melody_row(
    prompt: str | None,
    frames: int,
    chroma: Tensor | None,
    channels: int = 1,
    negative: str | None = None,
    given: Tensor | None = None,
    **options: Any,
) -> Row:
    model, tokenizer = build_tiny_melody(channels)

    def states(text: str | None) -> Tensor | None:
        return (
            None
            if text is None
            else model.text_encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        )

    with torch.inference_mode():
        prefix = melody_parts(channels)[1].prefix(states(prompt), chroma, states(negative))
    sampling = Sampling(**options)
    uniforms = torch.rand(frames + 3, 4 * channels)
    return Row(uniforms=uniforms, frame_count=frames, prefix=prefix, given=given, sampling=sampling)


def make_chroma(frames: int = 100, seed: int = 0) -> Tensor:
    classes = torch.randint(12, (frames,), generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.one_hot(classes, 12).float()


def decode_melodies(rows: list[Row], channels: int = 1, slot_count: int = 3) -> list[Any]:
    return decode(rows, slots=Slots(melody_parts(channels)[0], slot_count, 36))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    "chroma", [None, make_chroma(100), make_chroma(300)], ids=["none", "short", "long"]
)
def test_a_melody_is_followed_as_transformers_does(
    channels: int, guidance_scale: float, chroma: Tensor | None
) -> None:
    row = make_melody_row(PROMPTS[0], 16, chroma, channels, guidance_scale=guidance_scale, **GREEDY)
    expected = plain_greedy(
        *build_tiny_melody(channels), PROMPTS[0], 16, guidance_scale, chroma=chroma
    )
    assert torch.equal(decode_melodies([row], channels)[0], expected)


def test_rows_with_prefixes_of_any_length_share_a_batch() -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "frames": 12, "chroma": make_chroma()},
        {"prompt": PROMPTS[1], "frames": 20, "chroma": None},
        {"prompt": PROMPTS[2], "frames": 9, "chroma": make_chroma(40, 1), "negative": NEGATIVE},
        {"prompt": None, "frames": 15, "chroma": make_chroma(40, 2)},
    ]
    rows = [make_melody_row(**fields, **GREEDY) for fields in asked]
    for fields, codes in zip(asked, decode_melodies(rows, slot_count=2), strict=True):
        prompt, frames, options = fields["prompt"], fields["frames"], {"chroma": fields["chroma"]}
        options["negative"] = fields.get("negative")
        assert torch.equal(
            codes, plain_greedy(*build_tiny_melody(), prompt, frames, 3.0, **options)
        )


def test_a_melody_and_a_continuation_go_together() -> None:
    codes, tune = make_codes(7), make_chroma()
    row = make_melody_row(PROMPTS[0], 16, tune, given=codes, **GREEDY)
    expected = plain_greedy(*build_tiny_melody(), PROMPTS[0], 16, 3.0, forced=codes, chroma=tune)
    assert torch.equal(decode_melodies([row])[0], expected)


# one thread


@pytest.mark.parametrize("hears_melody", [False, True])
def test_requests_of_many_threads_are_read_in_one(
    monkeypatch: pytest.MonkeyPatch, hears_melody: bool
) -> None:
    """Tokenizers are not safe in two, and a GPU's libraries take memory for each one."""
    model, tokenizer = build_tiny_melody() if hears_melody else build_tiny()
    projection = None if hears_melody else model.enc_to_dec_proj
    own = Decoder(model.decoder, projection, 600)
    conditioner = Conditioner(model, tokenizer, own, 32_000)
    threads: set[int] = set()

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            threads.add(threading.get_ident())
            return function(*arguments, **options)

        return noted

    monkeypatch.setattr(conditioner, "_tokenizer", note(tokenizer))
    monkeypatch.setattr(conditioner, "_text_encoder", note(model.text_encoder))
    if hears_melody:
        monkeypatch.setattr(conditioner._melody, "prefix", note(conditioner._melody.prefix))
    else:
        monkeypatch.setattr(own, "read_text", note(own.read_text))
    together = threading.Barrier(8)

    def read(number: int) -> Tensor:
        together.wait(PATIENCE)
        found = conditioner.read(make_request(prompt=PROMPTS[number % 4]))
        return found.prefix if hears_melody else found.text

    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(read, range(8)))
    assert len(threads) == 1
    assert threads.isdisjoint({threading.get_ident()})
    for number, states in enumerate(found):
        assert torch.equal(states, found[number % 4])
    conditioner.close()
