"""The Triton kernels against torch's attention: in Triton's interpreter on a CPU, or on a GPU.

The interpreter needs TRITON_INTERPRET=1. Without it, the kernels are compiled for GPUs that are not here.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.musicgen import kernels
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.kernels import (
    BLOCK,
    add_norm,
    attend_cached,
    cut,
    is_available,
    store_newest,
)
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny
from tests.inference.gpu import nobody_may_wait
from tests.inference.test_slots import GREEDY, MAX_STEPS, decode, make_row

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_compiler = pytest.mark.skipif(
    IS_INTERPRETED, reason="needs Triton's compiler, not its interpreter"
)
DEVICES = [
    pytest.param(
        "cpu",
        marks=[
            needs_triton,
            pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1"),
        ],
    ),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton, needs_gpu, needs_compiler]),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
T = 300
EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 3 * BLOCK, T - 1]
# For 9 sequences of 2 heads: one split of all blocks, splits of several blocks, splits of one block.
PROGRAMS = [1, 40, 1024]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make_cache(
    positions: list[int], *, head_size: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return keys and values ``[N, 2, H, T, D]`` as a view; NaN past each sequence's position."""
    generator = torch.Generator().manual_seed(len(positions))
    cache = torch.randn(len(positions), 2, 2, 2, T, head_size, generator=generator)
    for row, position in zip(cache, positions, strict=True):
        row[..., position + 1 :, :] = torch.nan
    cache[:, 1] = torch.nan  # the pass that is not read
    return cache.to(dtype)[:, :1].flatten(0, 1)


def make_queries(count: int, head_size: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return queries ``[N, 2, D]`` as a view; so large that some positions matter far more."""
    generator = torch.Generator().manual_seed(100 + count)
    return (4 * torch.randn(count, 3, 2, head_size, generator=generator)).to(dtype)[:, 0]


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: list[int],
    context_length: int = T,
    device: str = "cpu",
) -> Tensor:
    """Run the kernels on the device; views keep their strides, as their storage moves."""
    moved = [_moved(tensor, device) for tensor in (q, keys, values)]
    return attend_cached(
        moved[0], moved[1], moved[2], torch.tensor(positions, device=device), context_length
    ).cpu()


def _moved(tensor: Tensor, device: str) -> Tensor:
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)  # type: ignore[call-overload]
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def reference(q: Tensor, keys: Tensor, values: Tensor, positions: list[int]) -> Tensor:
    """Return what torch reads of each sequence alone, in float32: ``[N, H * D]``."""
    q, keys, values = q.float()[:, :, None], keys.float(), values.float()
    read = [
        functional.scaled_dot_product_attention(
            q[n], keys[n, :, : last + 1], values[n, :, : last + 1]
        )
        for n, last in enumerate(positions)
    ]
    return torch.stack(read).flatten(1)


def assert_agree(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("programs", PROGRAMS)
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sequence_reads_what_torch_reads(
    device: str, dtype: torch.dtype, head_size: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TARGET_PROGRAMS", programs)
    q, (keys, values) = (
        make_queries(9, head_size),
        make_cache(EDGES, head_size=head_size, dtype=dtype).unbind(1),
    )
    assert_agree(attend(q, keys, values, EDGES, device=device), reference(q, keys, values, EDGES))


@pytest.mark.parametrize("count", range(1, 9))
def test_any_number_of_sequences(device: str, count: int) -> None:
    positions = [37 * line + 5 for line in range(count)]
    q, (keys, values) = make_queries(count), make_cache(positions).unbind(1)
    assert_agree(
        attend(q, keys, values, positions, device=device), reference(q, keys, values, positions)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_read_has_the_querys_format(device: str, dtype: torch.dtype) -> None:
    q, (keys, values) = (
        make_queries(9, dtype=dtype),
        make_cache(EDGES, dtype=torch.float8_e4m3fn).unbind(1),
    )
    read = attend(q, keys, values, EDGES, device=device)
    assert read.dtype == dtype
    torch.testing.assert_close(read, reference(q, keys, values, EDGES).to(dtype))


@pytest.mark.parametrize("programs", PROGRAMS)
def test_the_context_length_makes_no_difference(
    device: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_TARGET_PROGRAMS", programs)
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
    monkeypatch.setattr(kernels, "_TARGET_PROGRAMS", programs)
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
    monkeypatch.setattr(kernels, "_TARGET_PROGRAMS", programs)
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
        (32, 128, (2, 64)),
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


# add and norm, and writing to the cache


WIDTHS = [64, 96, 1536]


def assert_rounded_alike(actual: Tensor, expected: Tensor) -> None:
    """Compare as usual; the interpreter truncates to bfloat16, while torch and GPUs round."""
    is_cut = IS_INTERPRETED and expected.dtype == torch.bfloat16
    torch.testing.assert_close(
        actual, expected, **({"rtol": 1 / 64, "atol": 1 / 64} if is_cut else {})
    )


@pytest.mark.parametrize("hidden", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("added_every", "read_every"), [(1, 1), (2, 1), (1, 2)])
def test_adding_and_norming_are_torchs(
    device: str, dtype: torch.dtype, hidden: int, added_every: int, read_every: int
) -> None:
    generator = torch.Generator().manual_seed(hidden)
    x, more, weight, bias = (
        torch.randn(6, hidden, generator=generator).to(dtype) for _ in range(4)
    )
    more, weight, bias = more[::added_every].contiguous(), weight[0], bias[0]
    expected = x.clone()
    expected[::added_every] += more
    there = x.to(device)
    normed = add_norm(
        there, more.to(device), weight.to(device), bias.to(device), added_every, read_every
    ).cpu()
    assert_rounded_alike(there.cpu(), expected)
    assert_rounded_alike(
        normed, functional.layer_norm(there.cpu()[::read_every], [hidden], weight, bias)
    )


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_writes_at_its_own_position(device: str, dtype: torch.dtype, passes: int) -> None:
    positions = torch.tensor([0, 7, 3])
    cache = torch.zeros(4, 2, 2, 3, 8, 32, dtype=dtype)
    fresh = torch.randn(3 * passes, 3, 3, 32)[:, 1:]  # a view beside the queries, of 3 heads
    expected = cache.clone()
    expected[torch.arange(3), :passes, :, :, positions] = fresh.reshape(3, passes, 2, 3, 32).to(
        dtype
    )
    there = cache.to(device)
    store_newest(_moved(fresh, device), there, positions.to(device), passes)
    assert_rounded_alike(there.cpu(), expected)


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
    "words", ["CUDA out of memory", "CUDA error: an illegal memory access was encountered"]
)
def test_a_failing_device_does_not_count_as_one_without_kernels(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(kernels, "store_newest", Mock(side_effect=RuntimeError(words)))
    with pytest.raises(RuntimeError, match=words):
        kernels.can_launch(torch.device("cpu"), torch.bfloat16)


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
@needs_triton
def test_what_would_be_written_wrongly_is_refused(
    fresh: Tensor, cache: Tensor, positions: Tensor
) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        store_newest(fresh, cache, positions, 2)


# which devices can use them


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An H100 with Triton."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    return monkeypatch


@pytest.mark.parametrize(
    ("capability", "in_16_bit", "in_fp8"),
    [((7, 5), False, False), ((8, 6), True, False), ((8, 9), True, True)],
)
def test_an_older_gpu_has_no_fp8(
    pretended_gpu: pytest.MonkeyPatch, capability: tuple[int, int], in_16_bit: bool, in_fp8: bool
) -> None:
    pretended_gpu.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    assert is_available() == in_16_bit
    assert is_available(torch.device("cuda"), torch.float8_e4m3fn) == in_fp8


def test_it_takes_triton_and_a_cuda_device(pretended_gpu: pytest.MonkeyPatch) -> None:
    assert is_available()
    assert not is_available(torch.device("cpu"))
    pretended_gpu.setitem(sys.modules, "triton", None)
    assert not is_available()


def test_a_launch_that_fails_is_noticed_in_advance(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        kernels, "store_newest", Mock(side_effect=RuntimeError("Failed to find C compiler.\nMore"))
    )
    assert not kernels.can_launch(torch.device("cpu"), torch.float8_e4m3fn)
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.parametrize("is_in_fp8", [False, True], ids=["full", "fp8"])
def test_a_decoders_tokens_are_the_same_through_the_kernels(
    device: str, is_in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_in_fp8 and IS_INTERPRETED:
        pytest.skip("the interpreter rounds to fp8 in another way than torch and GPUs do")
    codes = []
    for has_kernel in (False, True):
        model, _ = build_tiny()
        model.to(device)
        decoder = Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)
        if is_in_fp8:
            decoder.shrink_cache()
        monkeypatch.setattr(decoder.attention, "has_kernel", has_kernel)
        rows = [make_row(frames=frames, **GREEDY) for frames in (3, 6)]
        codes.append(decode(rows, slots=Slots(decoder, 2, MAX_STEPS)))
    for plain, by_kernel in zip(*codes, strict=True):
        assert torch.equal(plain, by_kernel)


def test_only_a_call_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dgx_music.inference.musicgen.split_kv", raising=False)
    # importing again replaces it
    monkeypatch.setattr("dgx_music.inference.musicgen.kernels", kernels)
    monkeypatch.delitem(sys.modules, "dgx_music.inference.musicgen.kernels")
    fresh = importlib.import_module("dgx_music.inference.musicgen.kernels")
    with pytest.raises(ImportError, match="triton"):
        fresh.attend_cached(make_queries(1), *make_cache([1]).unbind(1), torch.tensor([1]), T)


# compiled for a GPU, without one


def compile_kernel(
    name: str,
    types: dict[str, str],
    sizes: dict[str, int],
    capability: int,
    module: str = "split_kv",
) -> dict[str, Any]:
    """Return what Triton makes of a kernel, such as PTX and machine code."""
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    kernel = getattr(importlib.import_module(f"dgx_music.inference.musicgen.{module}"), name)
    signature = {
        name: types.get(name, "constexpr" if name in sizes else "i32") for name in kernel.arg_names
    }
    source = compiler.ASTSource(kernel, signature, constexprs=sizes)
    return dict(compiler.compile(source, target=target, options={"enable_fp_fusion": True}).asm)


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("cache_type", "capability"),
    [("bf16", 80), ("fp16", 80), ("fp32", 80), ("fp8e4nv", 89), ("fp8e4nv", 90)],
)
def test_the_kernels_compile_for_a_gpu(
    cache_type: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    workspace = {"positions": "*i64", "sums": "*fp32", "peaks": "*fp32", "totals": "*fp32"}
    pointers = {
        "q": "*bf16",
        "keys": f"*{cache_type}",
        "values": f"*{cache_type}",
        "scale": "fp32",
    } | workspace
    steps = {"head_size": 64, "block": BLOCK}
    assert compile_kernel("attend_split", pointers, steps, capability)["cubin"]
    merged = {"out": "*bf16"} | workspace
    steps = {"head_size": 64, "padded_count": 32}
    assert compile_kernel("merge_splits", merged, steps, capability)["cubin"]
    pointers = {
        "x": "*bf16",
        "more": "*bf16",
        "weight": "*bf16",
        "bias": "*bf16",
        "out": "*bf16",
        "epsilon": "fp32",
    }
    steps = {"added_every": 2, "read_every": 1, "block": 2048}
    assert compile_kernel("add_norm", pointers, steps, capability, "fused")["cubin"]
    written = {"fresh": "*bf16", "cache": f"*{cache_type}", "positions": "*i64", "limit": "fp32"}
    steps = {"passes": 2, "head_size": 64, "block": 2048}
    assert compile_kernel("store_newest", written, steps, capability, "fused")["cubin"]


# on a GPU


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
