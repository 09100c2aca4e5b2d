"""Weights of 8 bits, and the gate that they must pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.errors import EngineUnavailableError
from dgx_music.inference import drift, musicgen
from dgx_music.inference.decoder import Decoder, linear
from dgx_music.inference.quantised import Int8
from dgx_music.inference.slots import Slots
from dgx_music.inference.tiny import build_tiny
from tests.inference.test_conditions import make_codes
from tests.inference.test_musicgen import generate, load
from tests.inference.test_slots import MAX_STEPS, PROMPTS, decode, make_row, text_states


def make_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_decoder() -> Decoder:
    model, _ = build_tiny()
    return Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)


def test_a_matrix_is_kept_to_half_a_level_of_each_row() -> None:
    weight = make_matrix(96, 64) * torch.logspace(-3, 2, 96)[:, None]
    rounded = Int8.of(weight, may_pack=False)
    error = (rounded.values * rounded.scales[:, None] - weight).abs()
    assert rounded.values.dtype == torch.int8
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lines", [1, 2, 3, 16, 70])
def test_products_are_near_the_exact_ones(lines: int, dtype: torch.dtype) -> None:
    x, weight = make_matrix(lines, 64).to(dtype), make_matrix(96, 64, seed=1)
    exact = x.float() @ weight.T
    product = linear(x, Int8.of(weight))
    assert product.dtype == dtype
    assert (product - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="needs oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lines", [1, 3, 16])
def test_packed_weights_give_what_plain_ones_give(lines: int, dtype: torch.dtype) -> None:
    x, weight = make_matrix(lines, 64).to(dtype), make_matrix(96, 64, seed=1)
    packed, plain = Int8.of(weight), Int8.of(weight, may_pack=False)
    assert packed.packed is not None
    assert packed.nbytes == plain.nbytes == 96 * 64 + 96 * 4
    torch.testing.assert_close(packed.apply(x), plain.apply(x))


def test_a_line_of_zeros_stays_zero() -> None:
    assert torch.equal(linear(torch.zeros(2, 64), Int8.of(make_matrix(96, 64))), torch.zeros(2, 96))


def test_a_product_does_not_depend_on_who_shares_the_batch() -> None:
    x, weight = make_matrix(16, 64).bfloat16(), Int8.of(make_matrix(96, 64, seed=1))
    together = linear(x, weight)
    for line in range(16):
        assert torch.equal(linear(x[line : line + 1], weight)[0], together[line])


def test_all_that_is_read_at_every_step_is_rounded() -> None:
    decoder = make_decoder()
    before = decoder.weight_bytes
    decoder.quantise()
    for layer in decoder.layers:
        assert layer.cross is not None
        for weight in (layer.self_qkv, layer.self_out, layer.cross.q, layer.cross.out, layer.mlp_in, layer.mlp_out):
            assert isinstance(weight, Int8)
    assert decoder.weight_bytes < before


def test_a_seeded_row_is_the_same_alone_and_in_a_batch() -> None:
    decoder = make_decoder()
    decoder.quantise()
    alone = decode([make_row(PROMPTS[1], 20, seed=1)], slots=Slots(decoder, 1, MAX_STEPS))[0]
    rows = [make_row(prompt, 20 + seed, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    assert torch.equal(decode(rows, slots=Slots(decoder, 4, MAX_STEPS))[1][:, :17], alone[:, :17])


# the gate


def test_the_divergence_is_that_of_the_distributions() -> None:
    exact, other = make_matrix(3, 2, 4, 50), make_matrix(3, 2, 4, 50, seed=1)
    divergences = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=exact), torch.distributions.Categorical(logits=other)
    )
    torch.testing.assert_close(drift.divergence(exact, other).float(), divergences.mean((0, 1)))
    assert drift.divergence(exact, exact).abs().max() == 0


def test_own_tokens_are_what_the_slots_feed() -> None:
    decoder = make_decoder()
    text = decoder.read_text(text_states(PROMPTS[0]))
    tokens = drift.own_tokens(decoder, text)  # [step, K]
    logits = drift.teacher_forced(decoder, tokens, text)  # [step, half, K, V]
    uniforms = torch.rand(len(tokens), 4, generator=torch.Generator().manual_seed(drift._SEED))
    for step in range(len(tokens) - 1):
        top, candidates = logits[step, 0].topk(250)
        rank = (top.softmax(-1).cumsum(-1) <= uniforms[step, :, None]).sum(-1)
        drawn = candidates.gather(-1, rank[:, None])[:, 0]
        is_in_clip = tokens[step + 1] != decoder.pad_token
        assert torch.equal(tokens[step + 1][is_in_clip], drawn[is_in_clip])


def test_the_change_is_measured_before_and_after() -> None:
    decoder = make_decoder()
    assert drift.measure_change(decoder, [None], lambda: None) == 0
    assert drift.measure_change(decoder, [None], decoder.quantise) > 0
    assert drift.measure_change(decoder, [None], decoder.shrink_cache) > 0


BITS = [{"weights": "int8"}, {"kv_cache": "fp8"}, {"weights": "int8", "kv_cache": "fp8"}]


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_engine_says_what_it_saves_bits_on(bits: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(musicgen, "MOST_NATS", 10.0)
    facts: dict[str, Any] = dict(generate(load(**bits)).facts)
    assert {name: facts.get(name) for name in bits} == bits
    assert 0 < facts["drift_nats"] < 10


@pytest.mark.parametrize("measured", [1e-3, torch.nan])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_what_a_model_does_not_bear_is_refused(
    bits: dict[str, str], measured: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(musicgen, "MOST_NATS", 9e-4)
    monkeypatch.setattr(musicgen, "measure_change", lambda *_arguments: measured)
    with pytest.raises(EngineUnavailableError, match=f"{measured:.3g} nats") as caught:
        load(**bits)
    for name in ("weights", "kv_cache"):
        assert (f"DGX_MUSIC_{name.upper()}=full" in str(caught.value)) == (name in bits)


def test_the_gate_reads_texts_and_none(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    monkeypatch.setattr(
        musicgen, "measure_change", lambda _decoder, texts, _change: seen.append([t is None for t in texts]) or 0.0
    )
    load(weights="int8")
    assert seen == [[False, False, True]]


def test_without_such_settings_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(musicgen, "measure_change", None)
    assert "drift_nats" not in generate(load()).facts


# keys and values


@pytest.mark.parametrize("given", [None, 9])
def test_a_cache_of_8_bits_takes_half_the_room_of_16_and_serves_any_row(given: int | None) -> None:
    decoder, exact = make_decoder(), make_decoder()
    decoder.shrink_cache()
    assert decoder.slot_bytes == exact.slot_bytes / 4
    rows = [make_row(prompt, 20, given=make_codes(given) if given else None) for prompt in PROMPTS[:3]]
    codes = decode(rows, slots=Slots(decoder, 2, MAX_STEPS))
    assert [code.shape for code in codes] == [(4, 20)] * 3
    assert decoder.empty_cache(1).dtype == torch.float8_e4m3fn


def test_a_key_too_large_for_8_bits_is_not_lost() -> None:
    decoder = make_decoder()
    decoder.shrink_cache()
    kept = decoder._to_cache(torch.tensor([1e9, -1e9, 0.5])).float()
    assert kept.tolist() == [448, -448, 0.5]
