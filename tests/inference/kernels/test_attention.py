"""Attention in Triton against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen import cached_attention
from dgx_music.inference.musicgen.cached_attention import BLOCK, attend_cached, cut
from tests.inference.gpu import moved, needs_compiler, needs_gpu, needs_triton, nobody_may_wait

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
T = 300
EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK, T - 1]
# For 9 sequences of 2 heads: one split of all blocks, splits of several blocks, splits of one block.
PROGRAMS = [1, 40, 1024]


def make_cache(
    positions: list[int],
    *,
    heads: int = 2,
    length: int = T,
    head_size: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return keys and values ``[N, 2, H, T, D]`` as a view; NaN past each sequence's position."""
    generator = torch.Generator().manual_seed(len(positions))
    cache = torch.randn(len(positions), 2, 2, heads, length, head_size, generator=generator)
    for row, position in zip(cache, positions, strict=True):
        row[..., position + 1 :, :] = torch.nan
    cache[:, 1] = torch.nan  # the pass that is not read
    return cache.to(dtype)[:, :1].flatten(0, 1)


def make_queries(
    count: int, heads: int = 2, head_size: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return queries ``[N, H, D]`` as a view; so large that some positions matter far more."""
    generator = torch.Generator().manual_seed(100 + count)
    return (4 * torch.randn(count, 3, heads, head_size, generator=generator)).to(dtype)[:, 0]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: list[int],
    context_length: int | None = None,
    device: str = "cpu",
) -> Tensor:
    """Run the kernels on the device."""
    there = [moved(tensor, device) for tensor in (q, keys, values)]
    last = torch.tensor(positions, device=device)
    return attend_cached(*there, last, context_length or keys.shape[2]).cpu()  # type: ignore[arg-type]


def reference(q: Tensor, keys: Tensor, values: Tensor, positions: list[int]) -> Tensor:
    """Return what torch reads of each sequence alone, in float64: ``[N, H * D]``."""
    q, keys, values = q.double()[:, :, None], keys.double(), values.double()
    read = [
        functional.scaled_dot_product_attention(
            q[n], keys[n, :, : last + 1], values[n, :, : last + 1]
        )
        for n, last in enumerate(positions)
    ]
    return torch.stack(read).flatten(1)


def assert_agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sequence_reads_what_torch_reads(
    device: str, dtype: torch.dtype, head_size: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_attention, "_TARGET_PROGRAMS", programs)
    q = make_queries(9, head_size=head_size)
    keys, values = make_cache(EDGES, head_size=head_size, dtype=dtype).unbind(1)
    assert_agree(attend(q, keys, values, EDGES, device=device), reference(q, keys, values, EDGES))


@pytest.mark.parametrize(
    ("count", "heads"),
    [*((count, 2) for count in (1, 2, 3, 5, 8, 17)), (128, 1), (2, 16), (2, 24), (2, 32)],
)
def test_any_number_of_sequences_and_heads(device: str, count: int, heads: int) -> None:
    length = 2 * BLOCK + 7
    positions = [(37 * line + 5) % length for line in range(count)]
    q = make_queries(count, heads)
    keys, values = make_cache(positions, heads=heads, length=length).unbind(1)
    read = attend(q, keys, values, positions, device=device)
    assert_agree(read, reference(q, keys, values, positions))


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1])
def test_any_length(device: str, length: int) -> None:
    """A text of one or two blocks is read in one go, and a longer one in several."""
    positions = [length - 1, length // 2, 0]
    q, (keys, values) = make_queries(3), make_cache(positions, length=length).unbind(1)
    read = attend(q, keys, values, positions, device=device)
    assert_agree(read, reference(q, keys, values, positions))


@pytest.mark.parametrize("length", [BLOCK, T], ids=["in one go", "in splits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_read_has_the_querys_format(device: str, dtype: torch.dtype, length: int) -> None:
    positions = [0, length // 2, length - 1]
    cache = make_cache(positions, length=length, dtype=torch.float8_e4m3fn)
    q, (keys, values) = make_queries(3, dtype=dtype), cache.unbind(1)
    read = attend(q, keys, values, positions, device=device)
    assert read.dtype == dtype
    torch.testing.assert_close(read, reference(q, keys, values, positions).to(dtype))


@pytest.mark.parametrize("programs", PROGRAMS)
def test_the_context_length_makes_no_difference(
    device: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_attention, "_TARGET_PROGRAMS", programs)
    positions = [0, 50, 70]
    q, (keys, values) = make_queries(3), make_cache(positions).unbind(1)
    for context_length in (71, 128, 129, T):
        assert_agree(
            attend(q, keys, values, positions, context_length, device),
            reference(q, keys, values, positions),
        )


@pytest.mark.parametrize("programs", PROGRAMS)
def test_a_position_past_the_context_length_reads_the_context(
    device: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A free slot keeps its last row's position, while launches for others have a shorter context."""
    monkeypatch.setattr(cached_attention, "_TARGET_PROGRAMS", programs)
    q, (keys, values) = make_queries(2), make_cache([149, 149]).unbind(1)
    assert_agree(
        attend(q, keys, values, [290, 5], 150, device), reference(q, keys, values, [149, 5])
    )


def test_each_tensor_has_strides_of_its_own(device: str) -> None:
    q, (keys, values) = make_queries(9), make_cache(EDGES).unbind(1)
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    by_position = keys.transpose(1, 2).contiguous().transpose(1, 2)
    padded = functional.pad(values, (0, 7, 0, 3))[:, :, :T, :64]
    assert_agree(
        attend(q, by_position, padded, EDGES, device=device), reference(q, keys, values, EDGES)
    )


@pytest.mark.parametrize("rising", [1, -1])
@pytest.mark.parametrize("programs", PROGRAMS)
def test_scores_far_apart_are_merged(
    device: str, programs: int, rising: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_attention, "_TARGET_PROGRAMS", programs)
    q, (keys, values) = torch.ones(9, 2, 64), make_cache(EDGES).unbind(1)
    keys = keys + rising * torch.arange(T)[:, None]  # scores from -2,400 to 2,400
    assert_agree(attend(q, keys, values, EDGES, device=device), reference(q, keys, values, EDGES))


@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_broken_numbers_stay_in_their_sequence(device: str, part: int) -> None:
    cache = make_cache(EDGES)
    cache[4, part, :, 40, 3] = torch.nan
    q, (keys, values) = make_queries(9), cache.unbind(1)
    is_finite = attend(q, keys, values, EDGES, device=device).isfinite()
    assert not is_finite.view(9, 2, 64)[4, :, 3].any()
    assert is_finite[[line for line in range(9) if line != 4]].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": T + 1}, "context_length is 301; the cache has 300"),
        ({"context_length": 0}, "context_length is 0"),
        ({"q": torch.zeros(9, 2, 32)}, "do not fit"),
        ({"positions": torch.zeros(8, dtype=torch.long)}, "do not fit"),
        ({"values": torch.zeros(9, 2, 64, T).transpose(2, 3)}, "contiguous"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(changes: dict[str, Any], message: str) -> None:
    keys, values = make_cache(EDGES).unbind(1)
    arguments = {
        "q": make_queries(9),
        "keys": keys,
        "values": values,
        "positions": torch.tensor(EDGES),
        "context_length": T,
    }
    with pytest.raises(ValueError, match=message):
        attend_cached(**arguments | changes)


@pytest.mark.parametrize(
    ("pairs", "context_length", "splits"),
    [
        (32, 1504, (24, 64)),
        (64, 1504, (12, 128)),
        (512, 1504, (2, 768)),
        (2048, 1504, (1, 1536)),
        (32, 128, (1, 128)),  # a text is not cut
        (32, 192, (3, 64)),
        (1, 1, (1, 64)),
    ],
)
def test_the_cache_is_cut_for_as_much_work_as_a_gpu_holds(
    pairs: int, context_length: int, splits: tuple[int, int]
) -> None:
    assert cut(pairs, context_length) == splits


@pytest.mark.parametrize("pairs", [1, 3, 18, 100, 1000, 5000])
def test_no_position_is_left_out_and_no_split_is_empty(pairs: int) -> None:
    for context_length in range(1, 1505):
        count, size = cut(pairs, context_length)
        assert (count - 1) * size < context_length <= count * size


@pytest.mark.gpu
@needs_triton
@needs_gpu
@needs_compiler
def test_one_recording_serves_all_positions() -> None:
    q, (keys, values) = make_queries(9).cuda(), make_cache([T - 1] * 9).cuda().unbind(1)
    positions = torch.zeros(9, dtype=torch.long, device="cuda")
    attend_cached(q, keys, values, positions, T)  # compiled before it is recorded
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read = attend_cached(q, keys, values, positions, T)
    for now in (EDGES, EDGES[::-1]):
        positions.copy_(torch.tensor(now))
        graph.replay()
        assert_agree(read.cpu(), reference(q.cpu(), keys.cpu(), values.cpu(), now))


@pytest.mark.gpu
@needs_triton
@needs_gpu
@needs_compiler
def test_the_host_never_waits() -> None:
    q, (keys, values) = make_queries(9).cuda(), make_cache(EDGES).cuda().unbind(1)
    positions = torch.tensor(EDGES, device="cuda")
    attend_cached(q, keys, values, positions, T)
    with nobody_may_wait():
        read = attend_cached(q, keys, values, positions, T)
    assert_agree(read.cpu(), reference(q.cpu(), keys.cpu(), values.cpu(), EDGES))
