"""Which device, number format and threads an engine uses."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.musicgen import devices, engine
from tests.inference.factories import make_settings
from tests.inference.test_musicgen import load


@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(EngineUnavailableError, match=f"device {name} was asked for"):
        load(device=name)


def test_8_bit_weights_are_refused_on_a_gpu_before_any_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("dgx_music.inference.musicgen.engine.load_weights", None)
    with pytest.raises(EngineUnavailableError, match=r"int8 makes a GPU slower.*WEIGHTS=full"):
        load(device="cuda", dtype="float16", weights="int8")


def test_weights_of_4_bits_need_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(EngineUnavailableError, match=r"int4 needs a processor with AVX2.*=full"):
        load(weights="int4")


@pytest.mark.parametrize(("has_gpu", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_if_there_is_one(
    has_gpu: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert devices.choose_device("auto") == torch.device(device)


@pytest.mark.parametrize(
    ("has_bfloat16", "dtype"), [(True, torch.bfloat16), (False, torch.float16)]
)
def test_auto_is_16_bit_on_a_gpu(
    has_bfloat16: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(asked.append(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_options: has_bfloat16)
    assert devices.choose_dtype("auto", torch.device("cuda:1")) is dtype
    assert asked == [torch.device("cuda:1")]  # the given GPU, not the current one


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_auto_is_16_bit_on_a_processor_that_multiplies_bfloat16(
    capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert devices.choose_dtype("auto", torch.device("cpu")) is dtype


@pytest.mark.parametrize(("kind", "wanted"), [("cuda", 1), ("cpu", 0)])
def test_a_gpus_codec_computes_in_float32(
    kind: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[None] = []
    monkeypatch.setattr(engine, "choose_device", lambda _name: torch.device(kind))
    monkeypatch.setattr(engine, "keep_float32", lambda: kept.append(None))
    monkeypatch.setattr(engine, "leave_a_core_free", lambda: None)
    settings = make_settings(engine="musicgen", model="musicgen-tiny-untrained", dtype="float32")
    engine.build(settings, lambda *_: None)  # type: ignore[arg-type, return-value]
    assert len(kept) == wanted


def test_float32_is_not_rounded_to_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    devices.keep_float32()
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_a_core_is_left_to_the_parent(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    load()
    assert threads == [max(1, cores - 1)]
