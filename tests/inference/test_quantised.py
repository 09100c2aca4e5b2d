"""Weights of 8 and of 4 bits, and the gate that they must pass."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.musicgen import drift
from dgx_music.inference.musicgen import engine as musicgen
from dgx_music.inference.musicgen.batch import Row, delays
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.layers import linear
from dgx_music.inference.musicgen.quantised import Int4, Int8
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from dgx_music.sampling import Sampling
from tests.inference.test_conditions import make_codes
from tests.inference.test_launches import BucketLauncher
from tests.inference.test_musicgen import generate, load
from tests.inference.test_slots import MAX_STEPS, PROMPTS, decode, make_row, text_states


def make_matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_decoder() -> Decoder:
    model, _ = build_tiny()
    return Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)


def test_a_matrix_is_exact_to_half_a_level_of_each_row() -> None:
    weight = make_matrix(96, 64) * torch.logspace(-3, 2, 96)[:, None]
    rounded = Int8.of(weight, may_pack=False)
    error = (rounded.values * rounded.scales[:, None] - weight).abs()
    assert rounded.values.dtype == torch.int8
    assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.5001).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_matrix_of_4_bits_is_exact_to_half_a_level_of_each_group(dtype: torch.dtype) -> None:
    weight = (make_matrix(96, 64) * torch.logspace(-3, 2, 96)[:, None]).to(dtype)
    rounded = Int4.of(weight).apply(torch.eye(64, dtype=dtype)).T.float()
    groups = weight.float().unflatten(1, (2, 32))
    levels = (groups.amax(-1) - groups.amin(-1)) / 15
    error = (rounded - weight.float()).unflatten(1, (2, 32)).abs().amax(-1)
    rounding = 2 * torch.finfo(dtype).eps * weight.float().abs().amax(1, keepdim=True)
    assert (error <= 0.5001 * levels + 2 * rounding).all()


def test_equal_weights_are_exact_in_4_bits() -> None:
    weight = torch.full((16, 64), 0.25)
    weight[3] = 0.0
    assert torch.equal(Int4.of(weight).apply(torch.eye(64)).T, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 70])
def test_products_are_near_the_exact_ones(rows: int, dtype: torch.dtype) -> None:
    x, weight = make_matrix(rows, 64).to(dtype), make_matrix(96, 64, seed=1)
    exact = x.float() @ weight.T
    product = linear(x, Int8.of(weight), 16)
    assert product.dtype == dtype
    assert (product - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_pointwise"), reason="needs oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16])
def test_packed_weights_give_what_plain_ones_give(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_int8": True}, raising=False)
    x, weight = make_matrix(rows, 64).to(dtype), make_matrix(96, 64, seed=1)
    packed, plain = Int8.of(weight), Int8.of(weight, may_pack=False)
    assert packed.packed is not None
    assert packed.nbytes == plain.nbytes == 96 * 64 + 2 * 96 * 4
    torch.testing.assert_close(packed.apply(x), plain.apply(x))


def test_weights_are_not_packed_for_a_processor_without_amx(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There a packed product takes 1,000 times as long."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True}, raising=False)
    assert Int8.of(torch.randn(8, 8)).packed is None


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(
        linear(torch.zeros(2, 64), Int8.of(make_matrix(96, 64)), 16), torch.zeros(2, 96)
    )


@pytest.mark.parametrize("kind", [Int8, Int4])
def test_a_product_does_not_depend_on_the_rest_of_the_batch(kind: type[Int8 | Int4]) -> None:
    x, weight = make_matrix(16, 64).bfloat16(), kind.of(make_matrix(96, 64, seed=1).bfloat16())
    together = linear(x, weight, 16)
    for line in range(16):
        assert torch.equal(linear(x[line : line + 1], weight, 16)[0], together[line])


@pytest.mark.parametrize(("bits", "kind"), [("int8", Int8), ("int4", Int4)])
def test_all_weights_that_every_step_reads_are_rounded(bits: str, kind: type[Int8 | Int4]) -> None:
    decoder = make_decoder()
    before = decoder.weight_bytes
    decoder.quantise(bits)
    for layer in decoder.layers:
        assert layer.cross is not None
        for weight in (
            layer.self_qkv,
            layer.self_out,
            layer.cross.q,
            layer.cross.out,
            layer.mlp_in,
            layer.mlp_out,
        ):
            assert isinstance(weight, kind)
    assert decoder.weight_bytes < before


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_seeded_row_is_the_same_alone_and_in_a_batch(bits: str) -> None:
    decoder = make_decoder()
    decoder.quantise(bits)
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


def make_trial(**options: Any) -> Row:
    return make_row(PROMPTS[0], 24, seed=1, **options)


def trials() -> list[Row]:
    unconditional = make_trial(guidance_scale=1.0)
    unconditional.text = None
    negative = make_decoder().read_text(text_states(PROMPTS[1]))
    return [
        make_trial(),
        unconditional,
        make_trial(given=make_codes(9)),
        make_trial(negative=negative),
    ]


def assert_drawn_from(exact: Tensor, row: Row, codes: Tensor) -> None:
    """Assert that the row draws its codes ``[K, frame]`` from the scores ``[frame, K, V]``."""
    given = row.frame_count - len(exact)
    for codebook, lag in enumerate(delays(4, 1)):
        uniforms = row.uniforms[given + lag : row.frame_count + lag, codebook]
        top, candidates = exact[:, codebook].topk(250)
        rank = (top.softmax(-1).cumsum(-1) <= uniforms[:, None]).sum(-1)
        assert torch.equal(candidates.gather(-1, rank[:, None])[:, 0], codes[codebook, given:])


@pytest.mark.parametrize(
    "trial", range(4), ids=["guided", "unconditional", "continued", "negative"]
)
def test_the_compared_scores_are_those_that_tokens_are_drawn_from(trial: int) -> None:
    decoder, row = make_decoder(), trials()[trial]
    codes, logits = drift.decode(decoder, row)
    given = 9 if row.given is not None else 0
    exact = drift.scores(decoder, row, logits)
    assert len(exact) == row.frame_count - given
    assert_drawn_from(exact, row, codes)
    assert torch.equal(codes, decode([trials()[trial]], slots=Slots(decoder, 1, MAX_STEPS))[0])


@pytest.mark.parametrize(
    "trial", range(4), ids=["guided", "unconditional", "continued", "negative"]
)
def test_another_decoder_gets_the_same_tokens(trial: int) -> None:
    decoder, row = make_decoder(), trials()[trial]
    codes, logits = drift.decode(decoder, row)
    fed, again = drift.decode(decoder, row, codes)
    assert torch.equal(fed, codes)
    assert torch.equal(again, logits)
    decoder.quantise()
    assert torch.equal(drift.decode(decoder, row, codes).codes, codes)
    assert not torch.equal(drift.decode(decoder, row).codes, codes)


def test_launches_of_several_steps_keep_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the last launch goes past the row's end."""
    decoder, row = make_decoder(), make_trial(given=make_codes(9))
    codes, logits = drift.decode(decoder, row)
    launcher = lambda advance, _device: BucketLauncher(SimpleNamespace(_advance=advance))  # noqa: E731
    monkeypatch.setattr("dgx_music.inference.musicgen.slots.make_launcher", launcher)
    fed, again = drift.decode(decoder, row, codes)
    assert torch.equal(fed, codes)
    exact, other = drift.scores(decoder, row, logits), drift.scores(decoder, row, again)
    torch.testing.assert_close(other, exact, atol=1e-4, rtol=1e-4)


def test_guidance_makes_the_divergence_larger() -> None:
    """So a comparison without guidance would accept too much."""
    guided, plain = (
        drift.measure_change(decoder, [make_trial(guidance_scale=scale)], decoder.quantise)
        for scale, decoder in ((3.0, make_decoder()), (1.0, make_decoder()))
    )
    assert guided > 2 * plain > 0


def test_the_worst_row_counts() -> None:
    def measure(*rows: Row) -> float:
        decoder = make_decoder()
        return drift.measure_change(decoder, list(rows), decoder.shrink_cache)

    alone = [measure(row) for row in trials()]
    assert measure(*trials()) == max(alone) > min(alone) > 0
    assert drift.measure_change(make_decoder(), trials(), lambda: None) == 0


def test_a_change_to_nan_is_nan() -> None:
    decoder = make_decoder()

    def damage() -> None:
        decoder._final_norm.weight[3] = torch.nan

    assert math.isnan(drift.measure_change(decoder, trials(), torch.no_grad()(damage)))


def test_each_trial_gives_its_cache_back_before_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Free memory is measured right after them."""
    decoder, caches = make_decoder(), []
    empty_cache = decoder.empty_cache

    def make_cache(slot_count: int) -> Tensor:
        assert [cache() for cache in caches] == [None] * len(caches)
        cache = empty_cache(slot_count)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(decoder, "empty_cache", make_cache)
    rows = [make_row(frames=2), make_row(frames=3)]
    gc.disable()
    try:
        drift.measure_change(decoder, rows, lambda: None)
    finally:
        gc.enable()
    assert len(caches) == 4


BITS = [
    {"weights": "int8"},
    {"weights": "int4"},
    {"kv_cache": "fp8"},
    {"weights": "int8", "kv_cache": "fp8"},
]


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_the_facts_tell_which_numbers_have_fewer_bits(
    bits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(musicgen, "MAX_NATS", 10.0)
    facts: dict[str, Any] = dict(generate(load(**bits)).facts)
    assert {name: facts.get(name) for name in bits} == bits
    assert 0 < facts["drift_nats"] < 10


@pytest.mark.parametrize("measured", [1e-3, torch.nan])
@pytest.mark.parametrize("bits", BITS, ids=str)
def test_a_change_that_is_too_large_is_refused(
    bits: dict[str, str], measured: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(musicgen, "MAX_NATS", 9e-4)
    monkeypatch.setattr(musicgen, "measure_change", lambda *_arguments: measured)
    with pytest.raises(EngineUnavailableError, match=f"{measured:.3g} nats") as caught:
        load(**bits)
    for name in ("weights", "kv_cache"):
        assert (f"DGX_MUSIC_{name.upper()}=full" in str(caught.value)) == (name in bits)


def gate_rows(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> list[Row]:
    seen: list[Row] = []
    monkeypatch.setattr(
        musicgen, "measure_change", lambda _decoder, rows, _change: seen.extend(rows) or 0.0
    )
    load(weights="int8", **fields)
    return seen


def test_the_gate_tries_prompts_no_prompt_and_a_long_clip(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = gate_rows(monkeypatch)
    assert [(row.text is not None, row.sampling.guidance_scale) for row in rows] == [
        (True, 3.0),
        (True, 3.0),
        (False, 1.0),
    ]
    assert [0 if row.given is None else row.given.shape[1] for row in rows] == [0, 400, 0]
    assert {row.frame_count - (0 if row.given is None else 400) for row in rows} == {
        drift.TRIAL_FRAMES
    }
    assert {replace(row.sampling, guidance_scale=3.0, seed=None) for row in rows} == {Sampling()}


def test_the_gate_tries_a_melody_model_with_prefixes_and_a_tune(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for part in build_tiny_melody(2):
        part.save_pretrained(tmp_path)
    rows = gate_rows(monkeypatch, model=tmp_path)
    prefixes = [row.prefix for row in rows if row.prefix is not None and row.text is None]
    assert len(prefixes) == len(rows) == 4
    prompted, _, plain, tune = prefixes
    assert prompted.shape == tune.shape != plain.shape
    assert not torch.equal(prompted[0], tune[0])
    assert torch.equal(prompted[1], tune[1])
    assert [row.sampling.guidance_scale for row in rows] == [3.0, 3.0, 1.0, 3.0]


def test_a_melody_models_change_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(musicgen, "MAX_NATS", 10.0)
    for part in build_tiny_melody():
        part.save_pretrained(tmp_path)
    engine = load(tmp_path, weights="int8", kv_cache="fp8")
    assert 0 < generate(engine, model=str(tmp_path)).facts["drift_nats"] < 10


def test_without_such_settings_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(musicgen, "measure_change", None)
    assert "drift_nats" not in generate(load()).facts


# keys and values


@pytest.mark.parametrize("given", [None, 9])
def test_a_cache_of_8_bits_takes_half_the_memory_and_serves_any_row(given: int | None) -> None:
    decoder, exact = make_decoder(), make_decoder()
    decoder.shrink_cache()
    assert decoder.slot_bytes == exact.slot_bytes / 4
    rows = [
        make_row(prompt, 20, given=make_codes(given) if given else None) for prompt in PROMPTS[:3]
    ]
    codes = decode(rows, slots=Slots(decoder, 2, MAX_STEPS))
    assert [code.shape for code in codes] == [(4, 20)] * 3
    assert decoder.empty_cache(1).dtype == torch.float8_e4m3fn


def test_a_key_too_large_for_8_bits_is_not_lost() -> None:
    decoder = make_decoder()
    decoder.shrink_cache()
    kept = decoder.attention.to_cache(torch.tensor([1e9, -1e9, 0.5])).float()
    assert kept.tolist() == [448, -448, 0.5]
