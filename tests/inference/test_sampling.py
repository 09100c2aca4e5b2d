"""The sampler against the exact distribution: guidance, temperature, top_k and top_p."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.inference.musicgen.sampling import SamplerState, sample
from dgx_music.sampling import Sampling

GREEDY = {"temperature": 0.0}
SCORES = torch.randn(2048, generator=torch.Generator().manual_seed(3)) * 2


def exact(top_k: int, top_p: float, temperature: float) -> Tensor:
    """Return the exact distribution ``[V]``: scale, keep top_k, then the fewest that reach top_p."""
    scores = SCORES.double() / temperature
    order = scores.argsort(descending=True)
    scores[order[top_k:]] = -torch.inf
    probabilities = scores.softmax(0)
    before = probabilities[order].cumsum(0) - probabilities[order]
    probabilities[order[before >= top_p]] = 0
    return probabilities / probabilities.sum()


def make_sampling(*rows: dict[str, Any]) -> SamplerState:
    """Return the rows' sampling; the defaults are those of a request, but without guidance."""
    sampling = SamplerState.empty(len(rows), torch.device("cpu"))
    for index, row in enumerate(rows):
        sampling.write(index, Sampling(**{"guidance_scale": 1.0, **row}), 2048)
    return sampling


def draw(count: int, **sampling: Any) -> Tensor:
    """Return that many tokens of one row, as if each had its own codebook."""
    uniforms = torch.rand(1, count, generator=torch.Generator().manual_seed(5))
    return sample(SCORES.expand(1, 1, count, -1), uniforms, make_sampling(sampling), 2048)[0][0]


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [
        (250, None, 1.0),
        (50, None, 0.7),
        (250, 0.9, 1.0),
        (0, 0.5, 1.3),
        (20, 0.8, 2.0),
        (5, None, 1.0),
    ],
)
def test_tokens_follow_the_exact_distribution(
    top_k: int, top_p: float | None, temperature: float
) -> None:
    count = 8_000
    expected = exact(top_k or 2048, 2.0 if top_p is None else top_p, temperature)
    drawn = torch.bincount(
        draw(count, top_k=top_k, top_p=top_p, temperature=temperature), minlength=2048
    )
    assert drawn[expected == 0].sum() == 0
    common = expected * count >= 5
    rare = torch.tensor([drawn[~common].sum(), count * expected[~common].sum()])
    deviations = (drawn[common] - count * expected[common]) ** 2 / (count * expected[common])
    chi_square = deviations.sum() + (rare[0] - rare[1]) ** 2 / rare[1].clamp(min=1)
    degrees = int(common.sum())
    # five standard deviations of a chi-square
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("edge", [0.0, 1 - 2**-24])
def test_the_extreme_uniforms_take_the_first_and_the_last_token_of_each_rows_own(
    edge: float,
) -> None:
    order = SCORES.argsort(descending=True)
    # The very last tokens are rarer than a float can express.
    reached = SCORES.double().softmax(0)[order].cumsum(0) <= edge
    sampling = make_sampling({"top_k": 10}, {"top_k": 0}, GREEDY)
    tokens, _ = sample(SCORES.expand(3, 1, 1, -1), torch.full((3, 1), edge), sampling, 2048)
    ranks = [9 if edge else 0, int(reached.sum()), 0]
    assert tokens[:, 0].tolist() == order[ranks].tolist()


def test_guidance_goes_from_the_unconditional_logits_past_the_conditional_ones() -> None:
    # [row, pass, K, V]
    logits = torch.randn(2, 2, 50, 2048, generator=torch.Generator().manual_seed(4))
    uniforms = torch.rand(2, 50, generator=torch.Generator().manual_seed(5))
    guided = make_sampling(*({"guidance_scale": scale, "top_k": 0} for scale in (4.0, 1.0)))
    tokens, _ = sample(logits, uniforms, guided, 2048)
    combined = torch.stack([4 * logits[0, 0] - 3 * logits[0, 1], logits[1, 0]])[:, None]
    unguided = make_sampling({"top_k": 0}, {"top_k": 0})
    assert torch.equal(tokens, sample(combined, uniforms, unguided, 2048)[0])


def test_a_row_without_guidance_reads_nothing_of_the_unconditional_pass() -> None:
    # [row, pass, K, V]
    logits = torch.randn(2, 2, 50, 2048, generator=torch.Generator().manual_seed(4))
    logits[1, 1] = torch.nan
    uniforms = torch.rand(2, 50, generator=torch.Generator().manual_seed(5))
    sampling = make_sampling({"guidance_scale": 3.0, "top_k": 0}, {"top_k": 0})
    tokens, is_finite = sample(logits, uniforms, sampling, 2048)
    alone, _ = sample(logits[1:, :1], uniforms[1:], make_sampling({"top_k": 0}), 2048)
    assert torch.equal(tokens[1], alone[0])
    assert is_finite.tolist() == [True, True]


def test_from_the_coldest_temperature_on_the_likeliest_token_is_certain() -> None:
    assert set(draw(100, temperature=1e-4).tolist()) == {int(SCORES.argmax())}


@pytest.mark.parametrize("widest", [5, 2048])
def test_among_equal_tokens_the_lower_one_goes_first(widest: int) -> None:
    uniforms = torch.tensor([[0.1, 0.3, 0.5, 0.7, 0.9]])
    tokens, _ = sample(torch.zeros(1, 1, 5, 2048), uniforms, make_sampling({"top_k": 5}), widest)
    assert tokens.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_one_codebook_whose_scores_are_not_finite_is_enough(number: float) -> None:
    logits = torch.zeros(2, 1, 4, 2048)
    logits[1, 0, 2, 7] = number
    sampling = make_sampling({}, {})
    assert sample(logits, torch.zeros(2, 4), sampling, 2048)[1].tolist() == [True, False]


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.01, "temperature": 0.3}], ids=str
)
def test_the_coldest_options_take_the_likeliest_token(options: dict[str, Any]) -> None:
    assert set(draw(100, **options).tolist()) == {int(SCORES.argmax())}


def test_the_sampler_has_a_column_for_each_field_but_the_seed_the_text_and_the_melody() -> None:
    used_before = {"seed", "negative_prompt", "melody_kind"}  # they make what the passes read
    assert {*SamplerState._fields} == {each.name for each in fields(Sampling)} - used_before


@pytest.mark.parametrize("name", SamplerState._fields)
def test_each_of_the_samplers_columns_follows_its_field(name: str) -> None:
    other = replace(
        Sampling(), **{name: 1 if name == "top_k" else 0.5 if name != "guidance_scale" else 2}
    )
    states = make_sampling(vars(Sampling()), vars(other))
    changed = {
        column
        for column in states._fields
        if getattr(states, column)[0] != getattr(states, column)[1]
    }
    assert changed == {name}
