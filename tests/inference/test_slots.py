"""The slots against transformers' own ``generate``: the same tokens.

From tiny random models, greedily, in float32.
"""

from __future__ import annotations

import random
from collections import defaultdict
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ByT5Tokenizer, GenerationConfig, MusicgenForConditionalGeneration

from dgx_music.errors import EngineError
from dgx_music.inference.musicgen.attention import Text
from dgx_music.inference.musicgen.batch import Row, delays
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.drift import divergence
from dgx_music.inference.musicgen.embedding import sinusoids
from dgx_music.inference.musicgen.launches import Span, text_room
from dgx_music.inference.musicgen.layers import linear
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny
from dgx_music.sampling import Sampling

PROMPTS = (
    "lo-fi piano",
    "a very fast and loud drum solo in a small wet cave",
    "choir",
    "heavy metal",
)
MAX_STEPS = 80
GREEDY = {"temperature": 0.0}


@cache
def reference(channels: int) -> tuple[MusicgenForConditionalGeneration, ByT5Tokenizer]:
    return build_tiny(channels)


@cache
def decoder(channels: int = 1, dtype: torch.dtype = torch.float32) -> Decoder:
    model = build_tiny(channels)[0].to(dtype)
    return Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)


def make_slots(slot_count: int = 4, **kind: Any) -> Slots:
    return Slots(decoder(**kind), slot_count, MAX_STEPS)


def text_states(prompt: str, channels: int = 1) -> Tensor:
    model, tokenizer = reference(channels)
    with torch.inference_mode():
        return model.text_encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state[0]


def make_row(
    prompt: str = PROMPTS[0], frames: int = 8, channels: int = 1, seed: int = 0, **options: Any
) -> Row:
    numbers = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(frames + 3, 4 * channels, generator=numbers)
    text = decoder(channels).read_text(text_states(prompt, channels))
    conditions = {name: options.pop(name) for name in ("negative", "given") if name in options}
    return Row(
        text=text, uniforms=uniforms, frame_count=frames, sampling=Sampling(**options), **conditions
    )


def decode(
    rows: list[Row],
    *,
    slot_count: int = 4,
    slots: Slots | None = None,
    given_up: dict[Row, int] | None = None,
) -> list[Any]:
    """Return each row's codes, ``None`` if given up; admit each row as soon as there is room.

    ``given_up`` says after how many steps to give a row up.
    """
    slots = slots or make_slots(slot_count, channels=rows[0].uniforms.shape[1] // 4)
    waiting, codes = [row for row in rows if row not in slots.rows], {}
    while waiting or slots.rows:
        while waiting and slots.has_room:
            slots.admit(waiting.pop(0))
        for row in list(slots.rows):
            is_given_up = given_up is not None and row.position == given_up.get(row)
            if row.is_done or is_given_up:
                codes[row] = None if is_given_up else slots.codes(row)
                slots.retire(row)
        if slots.rows:
            slots.step()
    return [codes[row] for row in rows]


def reference_codes(prompt: str, frames: int, guidance_scale: float, channels: int = 1) -> Tensor:
    """Return the codes ``[codebook, frame]`` that ``generate`` hands to the codec."""
    model, tokenizer = reference(channels)
    heard: list[Tensor] = []
    decode_audio = model.audio_encoder.decode

    def listen(codes: Tensor, audio_scales: list[None]) -> Any:
        heard.append(codes[0, 0])
        return decode_audio(codes, audio_scales)

    config = GenerationConfig(
        do_sample=False,
        guidance_scale=guidance_scale,
        max_new_tokens=frames + 3,
        decoder_start_token_id=2048,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.audio_encoder, "decode", listen)
        model.generate(**tokenizer(prompt, return_tensors="pt"), generation_config=config)
    # left and right alternate
    return heard[0] if channels == 1 else torch.stack(heard, dim=1).flatten(0, 1)


def test_the_reference_tells_prompts_and_guidance_apart() -> None:
    one, other = (reference_codes(prompt, 30, 3.0) for prompt in PROMPTS[:2])
    assert not torch.equal(one, other)
    assert not torch.equal(one, reference_codes(PROMPTS[0], 30, 1.0))
    assert len(one.unique()) > 30


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("frames", [4, 5, 8, 60])
def test_greedy_tokens_are_those_of_generate(
    channels: int, guidance_scale: float, frames: int
) -> None:
    rows = [
        make_row(text, frames, channels, guidance_scale=guidance_scale, **GREEDY)
        for text in PROMPTS[:2]
    ]
    for prompt, codes in zip(PROMPTS, decode(rows), strict=False):
        assert torch.equal(codes, reference_codes(prompt, frames, guidance_scale, channels))


@pytest.mark.parametrize("channels", [1, 2])
def test_guidance_is_each_rows_own(channels: int) -> None:
    scales = (3.0, 1.0, 2.0, 1.0)
    rows = [
        make_row(text, 20, channels, guidance_scale=scale, **GREEDY)
        for text, scale in zip(PROMPTS, scales, strict=True)
    ]
    for prompt, scale, codes in zip(PROMPTS, scales, decode(rows), strict=True):
        assert torch.equal(codes, reference_codes(prompt, 20, scale, channels))


@pytest.mark.parametrize("channels", [1, 2])
def test_rows_of_any_length_join_used_slots_in_mid_flight(channels: int) -> None:
    lengths = (40, 5, 9, 23, 7, 30)
    prompts = [PROMPTS[index % 4] for index in range(6)]
    rows = [
        make_row(text, frames, channels, guidance_scale=1.0 if frames == 9 else 3.0, **GREEDY)
        for text, frames in zip(prompts, lengths, strict=True)
    ]
    for prompt, row, codes in zip(prompts, rows, decode(rows, slot_count=2), strict=True):
        assert torch.equal(
            codes, reference_codes(prompt, row.frame_count, row.sampling.guidance_scale, channels)
        )


def test_a_clip_shorter_than_the_longest_delay_has_its_first_frames() -> None:
    """``generate`` does not delay so few; compared are the first frames of a longer clip."""
    short, long = decode([make_row(frames=1, **GREEDY), make_row(frames=8, **GREEDY)])
    assert short.shape == (4, 1)
    assert short[0, 0] == long[0, 0]


def test_the_cache_holds_what_the_longest_clip_needs() -> None:
    codes = decode([make_row(frames=MAX_STEPS - 3, **GREEDY)])[0]
    assert torch.equal(codes, reference_codes(PROMPTS[0], MAX_STEPS - 3, 3.0))


def test_a_clip_of_30_seconds_has_the_tokens_of_generate_to_the_end() -> None:
    model, _ = build_tiny()
    slots = Slots(Decoder(model.decoder, model.enc_to_dec_proj, 1504), 2, 1503)
    rows = [
        make_row(PROMPTS[1], 700, **GREEDY),
        make_row(PROMPTS[0], 1500, **GREEDY),
        make_row(PROMPTS[2], 30, **GREEDY),
    ]
    short, long, late = decode(rows, slots=slots)
    assert torch.equal(long, reference_codes(PROMPTS[0], 1500, 3.0))
    assert torch.equal(short, reference_codes(PROMPTS[1], 700, 3.0))
    assert torch.equal(late, reference_codes(PROMPTS[2], 30, 3.0))


MATES = [
    {"prompt": PROMPTS[1] * 2, "frames": 5, "temperature": 1.3, "top_k": 0},
    {"prompt": PROMPTS[2], "frames": 16, "guidance_scale": 1.0},
    {"prompt": PROMPTS[3], "frames": 27, "seed": 5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 1.0}, {"top_k": 0, "temperature": 5.0}], ids=str
)
@pytest.mark.parametrize("mates", [1, 3])
def test_a_seeded_row_is_the_same_alone_and_in_any_batch(
    dtype: torch.dtype, options: Any, mates: int
) -> None:
    """The logits agree to the last bit, so that a near tie falls the same way."""
    (alone,), exact = decode_watched([make_row(frames=60, seed=7, **options)], dtype)
    for place in range(mates + 1):
        rows = [make_row(**fields) for fields in MATES[:mates]]
        rows.insert(place, make_row(frames=60, seed=7, **options))
        codes, scores = decode_watched(rows, dtype)
        assert torch.equal(codes[place], alone)
        assert torch.equal(scores[rows[place]], exact[next(iter(exact))])


def decode_watched(rows: list[Row], dtype: torch.dtype) -> tuple[list[Tensor], dict[Row, Tensor]]:
    """Return the codes, and each row's logits: ``[step, pass, K, V]``."""
    slots, seen = make_slots(3, dtype=dtype), defaultdict(list)
    forward = slots._decoder.forward

    def watch(*arguments: Any, **options: Any) -> Tensor:
        logits = forward(*arguments, **options)
        for row, own in zip(slots.rows, logits, strict=True):
            seen[row].append(own[: 2 if row.sampling.guidance_scale > 1 else 1].clone())
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots._decoder, "forward", watch)
        for row in rows:
            row.text = row.text.to(dtype)
        codes = decode(rows, slots=slots)
    return codes, {row: torch.stack(scores) for row, scores in seen.items()}


def test_another_seed_differs() -> None:
    one, other = decode([make_row(seed=1), make_row(seed=2)])
    assert not torch.equal(one, other)


def test_every_step_and_codebook_has_a_random_number_of_its_own() -> None:
    row, same, later, deeper = (make_row(frames=20, top_k=0, temperature=2.0) for _ in range(4))
    later.uniforms[10:] = later.uniforms[10:].flip(0)
    deeper.uniforms[:, 2] = deeper.uniforms[:, 2].flip(0)
    codes, same_codes, later_codes, deeper_codes = decode([row, same, later, deeper])
    assert torch.equal(codes, same_codes)
    assert torch.equal(later_codes[0, :10], codes[0, :10])
    assert not torch.equal(later_codes[0, 10:], codes[0, 10:])
    assert torch.equal(deeper_codes[0, :3], codes[0, :3])
    assert deeper_codes[2, 0] != codes[2, 0]


@pytest.mark.parametrize("seed", range(6))
def test_rows_that_are_given_up_leave_the_others_tokens_unchanged(seed: int) -> None:
    dice = random.Random(seed)
    wanted = [
        {"prompt": prompt, "frames": dice.randint(9, 30), "seed": dice.randint(0, 99)}
        for prompt in PROMPTS
    ]
    rows = [make_row(**fields) for fields in wanted]
    given_up = {rows[index]: dice.randint(0, 8) for index in dice.sample(range(4), 2)}
    codes = decode(rows, given_up=given_up)
    for fields, row, code in zip(wanted, rows, codes, strict=True):
        assert (code is None) == (row in given_up)
        assert code is None or torch.equal(code, decode([make_row(**fields)])[0])


@pytest.mark.parametrize("places", [("broken", "far"), ("far", "broken")], ids=str)
def test_a_row_whose_numbers_overflow_fails_alone_and_leaves_no_trace(
    places: tuple[str, str],
) -> None:
    """The slot's next row lags behind the far one, so its masked remains are read: 0 * NaN is NaN."""
    rows = {
        "broken": make_row(frames=17),
        "far": make_row(frames=40, seed=1),
        "next": make_row(frames=20, seed=2),
    }
    rows["broken"].text = torch.full_like(rows["broken"].text, torch.nan)
    slots = make_slots(3)
    for name in places:
        slots.admit(rows[name])
    for step in range(20):
        if step == 15 and places[0] == "broken":
            slots.admit(rows["next"])  # in the last slot, from where it moves into the broken row's
        slots.step()
    with pytest.raises(EngineError, match="not finite"):
        slots.codes(rows["broken"])
    error, codes = slots.read([(rows["broken"], 0, 3), (rows["far"], 2, 9)]).codes()
    assert isinstance(error, EngineError)
    assert isinstance(codes, Tensor)
    assert torch.equal(codes, decode([make_row(frames=40, seed=1)])[0][:, 2:9])
    slots.retire(rows["broken"])
    far, after = decode([rows["far"], rows["next"]], slots=slots)
    assert torch.equal(far, decode([make_row(frames=40, seed=1)])[0])
    assert torch.equal(after, decode([make_row(frames=20, seed=2)])[0])


@pytest.mark.parametrize(("prompt", "kept"), [("x" * 40, 64), ("x" * 100, 32)])
def test_the_room_of_a_long_text_is_given_back_after_the_last_row(prompt: str, kept: int) -> None:
    """That of a usual text is not: on a GPU all recordings would be lost with it."""
    slots = make_slots()
    decode([make_row(prompt), make_row()], slots=slots)
    assert slots._texts.shape[-2] == max(kept, text_room(len(prompt) + 1))
    codes = decode([make_row(frames=9, **GREEDY)], slots=slots)[0]
    assert slots._texts.shape[-2] == slots._text_mask.shape[-1] == kept
    assert torch.equal(codes, reference_codes(PROMPTS[0], 9, 3.0))


def test_the_unconditional_pass_is_made_only_if_a_row_is_guided() -> None:
    slots = make_slots()
    slots.admit(make_row(guidance_scale=1.0))
    assert slots._plan(slots.rows).passes == 1
    slots.admit(make_row(guidance_scale=1.5))
    assert slots._plan(slots.rows).passes == 2


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, [0, 1, 2, 3]), (2, [0, 0, 1, 1, 2, 2, 3, 3])]
)
def test_delays_of_mono_and_stereo(channels: int, expected: list[int]) -> None:
    assert delays(4 * channels, channels) == expected


def test_positions_are_those_of_transformers() -> None:
    table = reference(1)[0].decoder.model.decoder.embed_positions.weights
    assert torch.equal(sinusoids(len(table), table.shape[1]), table)


def test_the_original_layers_are_dropped_as_they_are_fused() -> None:
    model, _ = build_tiny()
    weights = [layer.self_attn.q_proj.weight for layer in model.decoder.model.decoder.layers]
    fused = Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)
    assert len(model.decoder.model.decoder.layers) == 0
    assert torch.equal(fused.layers[1].self_qkv[:64], weights[1])


# in 16 bit


@torch.no_grad()
def teacher_forced(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Return the logits ``[step, pass, K, V]`` after each of ``[step, K]``, for the first prompt."""
    own = decoder.read_text(text_states(PROMPTS[0]))
    texts = decoder.empty_text(1, own.shape[-2])  # [L, slot, pass, 2, H, X, D]
    texts[:, 0, 0] = own
    text = Text(texts, torch.empty(0), torch.zeros(1, 1), 1, (Span(0, 1, own.shape[-2], False),))
    cache = decoder.empty_cache(1)
    steps = [
        decoder.forward(
            row[None],
            torch.tensor([at]),
            cache,
            text,
            passes=2,
            spans=(Span(0, 1, at + 1, False),),
            padded_rows=16,
        )
        for at, row in enumerate(tokens)
    ]
    return torch.cat(steps)


def test_bfloat16_errs_no_more_than_transformers_does() -> None:
    """Teacher-forced. Our sums and softmax may round at other places: a tenth more is accepted."""
    tokens = torch.randint(2048, (40, 4), generator=torch.Generator().manual_seed(1))  # [step, K]
    exact, rounded = (
        teacher_forced(decoder(dtype=dtype), tokens) for dtype in (torch.float32, torch.bfloat16)
    )
    ours = divergence(exact, rounded)
    model = build_tiny()[0].to(torch.bfloat16)
    with torch.inference_mode():
        text = model.enc_to_dec_proj(text_states(PROMPTS[0]).bfloat16())
        theirs = model.decoder(
            tokens.T.repeat(2, 1),  # [pass * K, step]
            encoder_hidden_states=torch.stack([text, torch.zeros_like(text)]),
            encoder_attention_mask=torch.tensor([[1], [0]]).expand(-1, len(text)),
        ).logits.view(2, 4, 40, -1)  # [pass, K, step, V]
    assert exact.dtype == torch.float32
    assert (ours <= 1.1 * divergence(exact, theirs.permute(2, 0, 1, 3))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
def test_products_are_those_of_a_linear_layer(rows: int, dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(6)
    x, weight = (torch.randn(count, 64, generator=numbers).to(dtype) for count in (rows, 96))
    torch.testing.assert_close(linear(x, weight, 16), functional.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_takes_the_fast_path(dtype: torch.dtype) -> None:
    """torch silently takes another path if a tensor's last dimension is not contiguous."""
    slots = make_slots(3, dtype=dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for prompt in PROMPTS[:3]:
            row = make_row(prompt)
            row.text = row.text.to(dtype)
            slots.admit(row)
            slots.step()
    assert [row.position > 0 for row in slots.rows] == [True] * 3


def test_a_model_with_another_epsilon_is_refused() -> None:
    model, _ = build_tiny()
    model.decoder.model.decoder.layer_norm.eps = 1e-6
    with pytest.raises(ValueError, match="epsilon is 1e-06 and not 1e-05"):
        Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)


def test_a_decoder_is_put_on_another_device_whole() -> None:
    model, _ = build_tiny()
    there = torch.device("meta")  # has no memory
    moved = Decoder(model.decoder, None, MAX_STEPS + 1, there)
    held = [value for value in vars(moved).values() if isinstance(value, Tensor | tuple)]
    held += [value for part in (moved._embedding, *moved.layers) for value in vars(part).values()]
    held += [value for layer in moved.layers for value in vars(layer.cross).values()]
    tensors = [t for value in held for t in (value if isinstance(value, tuple) else [value])]
    assert {t.device for t in tensors if isinstance(t, Tensor)} == {there}
    assert moved.device == there
