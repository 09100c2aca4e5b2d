"""Products of few sequences in Triton, with the work before and after, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen.layers import Norm
from dgx_music.inference.musicgen.products import (
    MOST,
    add_product,
    fits,
    read_normed,
    read_queries,
)
from tests.inference.gpu import IS_INTERPRETED, assert_rounded_alike

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [1, 2, 3, 4, 5, 8, 13, MOST]

# Several sizes of blocks, and with 3,088 one that larger blocks do not divide.
MANY = [1_536, 3_072, 3_088, 8_192]


def skip_what_the_interpreter_miscomputes(dtype: torch.dtype, count: int) -> None:
    """Skip the test if only a GPU computes it rightly."""
    if IS_INTERPRETED and dtype == torch.bfloat16 and count > 4:
        pytest.skip("the interpreter multiplies matrices in bfloat16 as if they were integers")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(outer: int, inner: int, dtype: torch.dtype) -> Tensor:
    return (noise(outer, inner, dtype=torch.float32, seed=1) / inner**0.5).to(dtype)


def norm_of(inner: int, dtype: torch.dtype) -> Norm:
    return Norm(*noise(2, inner, dtype=dtype, seed=2).unbind(0))


def normed(x: Tensor, norm: Norm) -> Tensor:
    exact = functional.layer_norm(
        x.double(), [x.shape[1]], norm.weight.double(), norm.bias.double()
    )
    return exact.to(x.dtype).double()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outer", "inner"), [(64, 64), (32, 96), (16, 1536)])
def test_a_product_of_what_is_normed_is_torchs(
    device: str, dtype: torch.dtype, count: int, outer: int, inner: int
) -> None:
    skip_what_the_interpreter_miscomputes(dtype, count)
    x, weight, norm = (
        noise(count, inner, dtype=dtype),
        weights(outer, inner, dtype),
        norm_of(inner, dtype),
    )
    expected = normed(x, norm) @ weight.double().T
    there = Norm(*(each.to(device) for each in norm))
    for gelu, wanted in ((False, expected), (True, functional.gelu(expected))):
        made = read_normed(x.to(device), there, weight.to(device), gelu=gelu)
        assert made.dtype == dtype
        assert_rounded_alike(made.cpu(), wanted, 2)
    made = read_normed(x.to(device), there, weight.to(device), torch.float32)
    assert made.dtype == torch.float32
    exact = made.cpu().double()
    torch.testing.assert_close(exact, expected, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("outer", MANY)
def test_all_of_many_results_are_computed(device: str, count: int, outer: int) -> None:
    if IS_INTERPRETED and count == 2 and outer < MANY[-1]:
        pytest.skip("the interpreter takes long for so many small blocks, which smaller tests have")
    x, weight = noise(count, 64, dtype=torch.float32), weights(outer, 64, torch.float32)
    to = torch.zeros(count, outer, device=device)
    add_product(to, x.to(device), weight.to(device))
    assert_rounded_alike(to.cpu(), x.double() @ weight.double().T)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("every", [1, 2])
def test_a_product_is_added_to_every_so_many_rows(
    device: str, dtype: torch.dtype, count: int, every: int
) -> None:
    skip_what_the_interpreter_miscomputes(dtype, count)
    to, x = noise(every * count, 48, dtype=dtype), noise(count, 256, dtype=dtype, seed=3)
    weight = weights(48, 256, dtype)
    expected = to.double()
    expected[::every] += x.double() @ weight.double().T
    there = to.to(device)
    add_product(there[::every], x.to(device), weight.to(device))
    assert_rounded_alike(there.cpu(), expected, 2)


@pytest.mark.parametrize("count", [3, 6])
def test_every_other_row_is_read(device: str, count: int) -> None:
    x, norm = noise(2 * count, 64, dtype=torch.float32), norm_of(64, torch.float32)
    weight = weights(32, 64, torch.float32)
    there = Norm(*(each.to(device) for each in norm))
    made = read_normed(x.to(device)[::2], there, weight.to(device)).cpu()
    assert_rounded_alike(made, normed(x[::2], norm) @ weight.double().T)


def test_a_sequence_has_the_same_numbers_beside_others(device: str) -> None:
    """To the last bit, up to the number from which another kernel multiplies."""
    x, weight = noise(MOST, 128, dtype=torch.float16), weights(32, 128, torch.float16)
    there = Norm(*(each.to(device) for each in norm_of(128, torch.float16)))
    made = {n: read_normed(x[:n].to(device), there, weight.to(device)) for n in (1, 2, 4, 5, 16)}
    assert torch.equal(made[1], made[4][:1])
    assert torch.equal(made[2], made[4][:2])
    assert torch.equal(made[5], made[16][:5])


@pytest.mark.parametrize(("rows", "passes"), [(1, 2), (3, 1), (8, 2), (16, 1)])
@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float8_e4m3fn], ids=str)
def test_keys_and_values_go_to_each_rows_position(
    device: str, rows: int, passes: int, cache_dtype: torch.dtype
) -> None:
    if IS_INTERPRETED and cache_dtype == torch.float8_e4m3fn:
        pytest.skip("the interpreter rounds to fp8 in another way than torch and GPUs do")
    heads, size = 2, 32
    hidden, positions = heads * size, torch.arange(rows) * 3 % 8
    x, weight = (
        noise(rows * passes, hidden, dtype=torch.float32),
        weights(3 * hidden, hidden, torch.float32),
    )
    norm = norm_of(hidden, torch.float32)
    cache = torch.zeros(rows + 1, 2, 2, heads, 8, size).to(cache_dtype).to(device)
    there = Norm(*(each.to(device) for each in norm))
    q = read_queries(x.to(device), there, weight.to(device), cache, positions.to(device), passes)
    expected = normed(x, norm) @ weight.double().T
    assert_rounded_alike(q.cpu(), expected[:, :hidden])
    written = cache.cpu().double()
    own = written[torch.arange(rows), :passes, :, :, positions].reshape(rows * passes, -1)
    eps = torch.finfo(cache_dtype).eps
    torch.testing.assert_close(own, expected[:, hidden:], rtol=2 * eps, atol=max(eps / 8, 1e-5))
    written[torch.arange(rows), :passes, :, :, positions] = 0
    assert not written.any()


@pytest.mark.parametrize(
    ("cache_dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float16, 65_504.0)], ids=str
)
def test_what_a_cache_cannot_hold_is_its_largest(
    device: str, cache_dtype: torch.dtype, largest: float
) -> None:
    written = write_constants(device, cache_dtype, [1e9, -1e9])
    assert (written[:, 0] == largest).all()
    assert (written[:, 1] == -largest).all()


def test_what_is_not_a_number_fails_its_row(device: str) -> None:
    """Infinity stays in its own format, and NaN everywhere; a large number instead would pass."""
    written = write_constants(device, torch.float32, [torch.inf, torch.nan])
    assert written[:, 0].isinf().all()
    assert written[:, 1].isnan().all()
    assert write_constants(device, torch.float16, [1.0, torch.nan])[:, 1].isnan().all()


def write_constants(device: str, cache_dtype: torch.dtype, constants: list[float]) -> Tensor:
    """Return what a cache holds ``[pass, 2, H, D]`` if all keys and all values are constants."""
    x = torch.zeros(2, 64, device=device)
    norm = Norm(torch.ones(64, device=device), torch.eye(64, device=device)[0])
    weight = torch.zeros(3 * 64, 64)
    weight[64:128, 0], weight[128:, 0] = torch.tensor(constants)
    cache = torch.zeros(1, 2, 2, 2, 4, 32, device=device).to(cache_dtype)
    read_queries(x, norm, weight.to(device), cache, torch.tensor([1], device=device), 2)
    return cache.cpu().float()[0, :, :, :, 1]


@pytest.mark.parametrize(
    ("weight", "does_fit"),
    [
        (torch.zeros(16, 64), True),
        (torch.zeros(24, 64), False),
        (torch.zeros(16, 72), False),
        (torch.zeros(16, 48), False),
        (torch.zeros(16, 128)[:, ::2], False),
    ],
)
def test_a_weight_that_is_not_in_blocks_is_left_to_torch(weight: Tensor, does_fit: bool) -> None:
    assert fits(weight) is does_fit


@pytest.mark.parametrize(
    ("to", "x"),
    [(torch.zeros(2, 16), torch.zeros(2, 80)), (torch.zeros(3, 16), torch.zeros(2, 64))],
)
def test_what_does_not_fit_together_is_refused(to: Tensor, x: Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        add_product(to, x, torch.zeros(16, 64))
