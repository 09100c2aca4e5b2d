"""The sampler in Triton against ``sample`` and ``BatchState.place``, which are in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.inference.musicgen.batch import BatchState
from dgx_music.inference.musicgen.kernels import draw_next
from dgx_music.inference.musicgen.sampling import SamplerState, sample
from dgx_music.sampling import Sampling

PAD, MAX_STEPS, FRAMES = 2048, 20, 12
CPU = torch.device("cpu")
KINDS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0, "top_k": 0},
    {"temperature": 0.0},
    {"guidance_scale": 7.5, "temperature": 2.5, "top_k": 0, "top_p": 0.9},
    {"top_p": 0.01},
    {"top_k": 1},
    {"guidance_scale": 1.5, "temperature": 0.01, "top_k": 3, "top_p": 0.5},
]


def make_logits(rows: int, passes: int, codebooks: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Return logits ``[R, pass, K, V]`` in steps of a 16th, so that many are alike."""
    random = torch.Generator().manual_seed(seed)
    exact = 3 * torch.randn(rows, passes, codebooks, vocabulary, generator=random)
    return (exact * 16).round() / 16


def make_state(rows: int, codebooks: int, seed: int = 0) -> BatchState:
    """Return rows at all positions of a clip, from its first step to past its end."""
    random = torch.Generator().manual_seed(seed)
    whole = BatchState.empty(rows + 1, MAX_STEPS, codebooks, PAD, CPU)
    whole.tokens.random_(PAD, generator=random)
    whole.uniforms.uniform_(generator=random)
    whole.position[:rows] = torch.arange(rows) % (MAX_STEPS + 1)
    whole.frame_count[:] = FRAMES
    whole.given_count[::2] = 4
    return whole.first(rows)


def make_sampling(rows: int, vocabulary: int) -> SamplerState:
    sampling = SamplerState.empty(rows, CPU)
    for row in range(rows):
        sampling.write(row, Sampling(**KINDS[row % len(KINDS)]), vocabulary)
    return sampling


def to(device: str, columns: Any) -> Any:
    return type(columns)(*(column.to(device) for column in columns))


def draw_both_ways(
    logits: Tensor, state: BatchState, sampling: SamplerState, device: str
) -> tuple[BatchState, BatchState]:
    """Return the state that torch leaves, and that which the kernel leaves."""
    rows, _, codebooks, vocabulary = logits.shape
    delay = torch.arange(codebooks)
    there = to(
        device, state._replace(tokens=state.tokens.clone(), is_finite=state.is_finite.clone())
    )
    uniforms = state.uniforms[torch.arange(rows), state.position]
    state.place(*sample(logits, uniforms, sampling, vocabulary), delay, PAD)
    draw_next(logits.to(device), to(device, sampling), there, delay.to(device), PAD)
    return state, to("cpu", there)


@pytest.mark.parametrize(
    ("rows", "passes", "codebooks", "vocabulary"),
    [
        (1, 2, 4, 2048),
        (23, 1, 4, 64),
        (21, 2, 8, 100),
        (64, 2, 1, 17),
        (2, 2, 1, 1),
        (7, 2, 2, 2048),
    ],
)
def test_the_tokens_are_those_of_sample(
    device: str, rows: int, passes: int, codebooks: int, vocabulary: int
) -> None:
    logits = make_logits(rows, passes, codebooks, vocabulary)
    sampling = make_sampling(rows, vocabulary)
    expected, drawn = draw_both_ways(logits, make_state(rows, codebooks), sampling, device)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert drawn.is_finite.all()
    assert torch.equal(drawn.position, expected.position)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_each_kind_of_sampling(device: str, kind: int, seed: int) -> None:
    """One row alone at each of many uniform numbers, as if each had its own codebook."""
    sampling = SamplerState.empty(1, CPU)
    sampling.write(0, Sampling(**KINDS[kind]), 64)
    logits = make_logits(1, 2, 1, 64, seed).expand(1, 2, 32, 64).contiguous()
    state = make_state(1, 32, seed)
    state.frame_count.fill_(MAX_STEPS)
    state.given_count.zero_()
    state.uniforms[0, 0] = torch.linspace(0, 1 - 2**-24, 32)
    state.position.zero_()
    zero = torch.zeros(32, dtype=torch.long)
    there = to(device, state._replace(tokens=state.tokens.clone()))
    state.place(*sample(logits, state.uniforms[:, 0], sampling, 64), zero, PAD)
    draw_next(logits.to(device), to(device, sampling), there, zero.to(device), PAD)
    assert torch.equal(there.tokens.cpu(), state.tokens)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_mark_their_row(device: str, number: float) -> None:
    logits = make_logits(3, 2, 4, 64)
    logits[1, 0, 2, 63] = number
    expected, drawn = draw_both_ways(logits, make_state(3, 4), make_sampling(3, 64), device)
    assert drawn.is_finite.tolist() == expected.is_finite.tolist() == [True, False, True]
    assert torch.equal(drawn.tokens[[0, 2]], expected.tokens[[0, 2]])
    assert (drawn.tokens >= 0).all()
    assert (drawn.tokens <= PAD).all()


def test_a_row_without_guidance_does_not_read_the_unconditional_pass(device: str) -> None:
    sampling = SamplerState.empty(1, CPU)
    sampling.write(0, Sampling(guidance_scale=1.0), 64)
    logits = make_logits(1, 2, 4, 64)
    logits[:, 1] = torch.nan
    expected, drawn = draw_both_ways(logits, make_state(1, 4), sampling, device)
    assert drawn.is_finite.all()
    assert torch.equal(drawn.tokens, expected.tokens)


def test_a_row_that_was_not_finite_stays_so(device: str) -> None:
    state = make_state(2, 4)
    state.is_finite[1] = False
    _, drawn = draw_both_ways(make_logits(2, 2, 4, 64), state, make_sampling(2, 64), device)
    assert drawn.is_finite.tolist() == [True, False]


def test_of_equal_logits_the_lowest_token_wins(device: str) -> None:
    greedy = SamplerState.empty(1, CPU)
    greedy.write(0, Sampling(temperature=0.0), 64)
    state = make_state(1, 1)
    state.given_count.zero_()
    logits = torch.zeros(1, 2, 1, 64)
    logits[..., 40:] = 1
    _, drawn = draw_both_ways(logits, state, greedy, device)
    assert drawn.tokens[0, 1, 0] == 40


@pytest.mark.parametrize("shape", [(2, 2, 4, 64), (3, 2, 5, 64)])
def test_what_does_not_fit_together_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        draw_next(torch.zeros(shape), make_sampling(3, 64), make_state(3, 4), torch.arange(4), PAD)
