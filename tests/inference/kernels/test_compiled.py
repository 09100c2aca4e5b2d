"""The kernels compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from dgx_music.inference.musicgen import products
from dgx_music.inference.musicgen.cached_attention import BLOCK
from tests.inference.gpu import needs_compiler, needs_triton


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
def test_attention_cache_and_norms_compile_for_a_gpu(
    cache_type: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    workspace = {"positions": "*i64", "sums": "*fp32", "peaks": "*fp32", "totals": "*fp32"}
    pointers = {
        "q": "*bf16",
        "keys": f"*{cache_type}",
        "values": f"*{cache_type}",
        "out": "*bf16",
        "scale": "fp32",
    } | workspace
    for is_whole in (0, 1):
        steps = {
            "head_size": 64,
            "block": BLOCK,
            "is_whole": is_whole,
            "overlaps": capability >= 90,
        }
        assert compile_kernel("attend_split", pointers, steps, capability)["cubin"]
    merged = {"out": "*bf16"} | workspace
    steps = {"head_size": 64, "padded_count": 32, "overlaps": capability >= 90}
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


@needs_triton
@needs_compiler
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_input_and_sampling_compile_for_a_gpu(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = ("table", "places", "weight", "bias", "x", "out")
    indices = {"tokens": "*i64", "offsets": "*i64", "positions": "*i64", "epsilon": "fp32"}
    sizes = {"codebooks": 4, "passes": 2, "block": 2048}
    pointers = dict.fromkeys(numbers, "*bf16") | indices
    assert compile_kernel("embed", pointers, sizes, capability, "fused")["cubin"]
    numbers = ("logits", "guidance_scale", "temperature", "top_k", "top_p", "uniforms")
    indices = dict.fromkeys(("tokens", "position", "frame_count", "given_count", "delay"), "*i64")
    pointers = dict.fromkeys(numbers, "*fp32") | indices
    pointers |= {"is_finite": "*i1", "tie_break": "fp32"}
    sizes = {"passes": 2, "vocabulary": 2048, "block": 2048}
    assert compile_kernel("draw_next", pointers, sizes, capability, "draw")["cubin"]


@needs_triton
@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "cache_type", "capability"),
    [
        ("bf16", "bf16", 80),
        ("fp16", "fp8e4nv", 89),
        ("bf16", "fp8e4nv", 90),
        ("fp32", "fp32", 90),
        ("bf16", "bf16", 100),
        ("bf16", "fp8e4nv", 120),
    ],
)
@pytest.mark.parametrize("outer", [1_024, 3_072, 8_192])
@pytest.mark.parametrize("count", [2, 16])
def test_products_of_few_sequences_compile_for_a_gpu(
    count: int,
    outer: int,
    dtype: str,
    cache_type: str,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if count <= 4:
        name, found = "multiply_few", products._few_sizes(outer, 1_024, count)
    else:
        name, found = "multiply_more", products._more_sizes(outer, 1_024)
    sizes = {name: size for name, size in found.items() if not name.startswith("num_")}
    sizes |= {"count": count, "padded": max(2, count), "inner": 1_024, "outer": outer}
    sizes |= {"has_norm": outer > 1_024, "passes": 2, "head_size": 64}
    sizes |= {"overlaps": capability >= 90}
    sizes["ending"] = {1_024: products.ADD, 3_072: products.CACHE, 8_192: products.GELU}[outer]
    pointers = dict.fromkeys(("x", "weight", "scale", "shift", "out"), f"*{dtype}")
    pointers |= {"cache": f"*{cache_type}", "positions": "*i64", "epsilon": "fp32", "limit": "fp32"}
    assert compile_kernel(name, pointers, sizes, capability, "skinny")["cubin"]
