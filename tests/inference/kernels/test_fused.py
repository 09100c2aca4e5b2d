"""Adding up, norming and writing to the cache in Triton, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen.embedding import Embedding, sinusoids
from dgx_music.inference.musicgen.kernels import add_norm, embed, store_newest
from tests.inference.gpu import assert_rounded_alike, moved

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

WIDTHS = [64, 96, 1536]


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "added_every", "read_every"), [(6, 1, 1), (6, 2, 1), (6, 1, 2), (1, 1, 1), (128, 2, 1)]
)
def test_adding_and_norming_are_torchs(
    device: str, dtype: torch.dtype, hidden: int, rows: int, added_every: int, read_every: int
) -> None:
    random = torch.Generator().manual_seed(hidden)
    x, more = torch.randn(2, rows, hidden, generator=random).to(dtype)
    weight, bias = torch.randn(2, hidden, generator=random).to(dtype)
    more = more[::added_every].contiguous()
    expected = x.double()
    expected[::added_every] += more.double()
    there = x.to(device)
    rest = (each.to(device) for each in (more, weight, bias))
    normed = add_norm(there, *rest, added_every, read_every).cpu()
    assert_rounded_alike(there.cpu(), expected)
    exact = there.cpu()[::read_every].double()
    assert_rounded_alike(
        normed, functional.layer_norm(exact, [hidden], weight.double(), bias.double()), 4
    )


def test_numbers_that_are_nearly_alike_are_normed_as_torch_does(device: str) -> None:
    x = 1e-3 * torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    ones, zeros = torch.ones(96), torch.zeros(96)
    there = (each.to(device) for each in (x.clone(), torch.zeros_like(x), ones, zeros))
    exact = functional.layer_norm(x.double(), [96], ones.double(), zeros.double())
    assert_rounded_alike(add_norm(*there).cpu(), exact)


@pytest.mark.parametrize(("rows", "passes"), [(1, 2), (5, 1), (64, 2)])
@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rows_embeddings_are_added_up_for_each_pass(
    device: str, dtype: torch.dtype, hidden: int, rows: int, passes: int
) -> None:
    random = torch.Generator().manual_seed(hidden)
    tables = [torch.nn.Embedding(10, hidden, dtype=dtype).requires_grad_(False) for _ in range(4)]
    weight, bias = torch.randn(2, hidden, generator=random).to(dtype)
    tokens = torch.randint(10, (rows, 4), generator=random)
    positions = torch.randint(20, (rows,), generator=random)
    summed = sum(table(own).double() for table, own in zip(tables, tokens.T, strict=True))
    summed = (summed + sinusoids(20, hidden)[positions]).repeat_interleave(passes, dim=0)
    embedding = Embedding([table.to(device) for table in tables], 20)
    there = (each.to(device) for each in (weight, bias))
    x, normed = embed(tokens.to(device), positions.to(device), embedding, *there, passes)
    assert_rounded_alike(x.cpu(), summed, 5)
    norm = functional.layer_norm(x.cpu().double(), [hidden], weight.double(), bias.double())
    assert_rounded_alike(normed.cpu(), norm, 4)


@pytest.mark.parametrize(
    ("rows", "heads", "passes"), [(1, 3, 1), (3, 16, 2), (4, 24, 1), (64, 2, 2)]
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_each_row_writes_at_its_own_position(
    device: str, dtype: torch.dtype, rows: int, heads: int, passes: int
) -> None:
    positions = torch.arange(rows) * 3 % 8
    cache = torch.zeros(rows + 1, 2, 2, heads, 8, 32).to(dtype)
    numbers = torch.randn(rows * passes, 3, heads, 32, generator=torch.Generator().manual_seed(1))
    fresh = numbers.to(dtype).float()[:, 1:]  # a view beside the queries
    expected = cache.double()
    expected[torch.arange(rows), :passes, :, :, positions] = fresh.double().view(
        rows, passes, 2, heads, 32
    )
    there = cache.to(device)
    store_newest(moved(fresh, device), there, positions.to(device), passes)
    assert torch.equal(there.cpu().double(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_written_is_rounded_to_the_caches_format(device: str, dtype: torch.dtype) -> None:
    fresh = torch.linspace(-3, 3, 64).view(1, 2, 1, 32)
    cache = torch.zeros(1, 1, 2, 1, 1, 32, device=device).to(dtype)
    store_newest(fresh.to(device), cache, torch.zeros(1, dtype=torch.long, device=device), 1)
    written = cache.cpu().double()[0, :, :, :, 0]
    error = torch.finfo(dtype).eps * (fresh.abs() + 0.01)
    assert ((written - fresh).abs() <= error).all()


def test_what_fp8_cannot_hold_is_its_largest(device: str) -> None:
    cache = torch.zeros(1, 1, 2, 1, 2, 32, dtype=torch.float8_e4m3fn, device=device)
    fresh = torch.full((1, 2, 1, 32), 1e9)
    fresh[:, 1] = -1e9
    store_newest(fresh.to(device), cache, torch.tensor([1], device=device), 1)
    written = cache.cpu().float()[0, 0, :, 0]
    assert written[0, 1].unique().tolist() == [448.0]
    assert written[1, 1].unique().tolist() == [-448.0]
    assert not written[:, 0].any()


def test_infinity_stays_what_it_is_in_its_own_format(device: str) -> None:
    """Infinity fails its row; a large number instead would pass as a key."""
    cache = torch.zeros(1, 1, 2, 1, 2, 32, dtype=torch.float16, device=device)
    fresh = torch.full((1, 2, 1, 32), torch.inf, dtype=torch.float16, device=device)
    store_newest(fresh, cache, torch.tensor([1], device=device), 1)
    assert cache[..., 1, :].isinf().all()


@pytest.mark.parametrize(
    ("fresh", "cache", "positions"),
    [
        (
            torch.zeros(2, 2, 2, 32),
            torch.zeros(2, 2, 2, 2, 8, 32),
            torch.zeros(2, dtype=torch.long),
        ),
        (
            torch.zeros(4, 2, 3, 32),
            torch.zeros(2, 2, 2, 2, 8, 32),
            torch.zeros(2, dtype=torch.long),
        ),
        (
            torch.zeros(4, 2, 2, 32),
            torch.zeros(2, 2, 2, 2, 32, 8).mT,
            torch.zeros(2, dtype=torch.long),
        ),
    ],
)
def test_what_would_be_written_wrongly_is_refused(
    fresh: Tensor, cache: Tensor, positions: Tensor
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        store_newest(fresh, cache, positions, 2)
