"""Which devices use the kernels in Triton."""

from __future__ import annotations

import sys
import types
from importlib.util import find_spec
from unittest.mock import Mock

import pytest
import torch

from dgx_music.inference.musicgen import kernel_check
from dgx_music.inference.musicgen.kernel_check import can_launch, is_available


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
        kernel_check,
        "store_newest",
        Mock(side_effect=RuntimeError("Failed to find C compiler.\nMore")),
    )
    assert not can_launch(torch.device("cpu"), torch.float8_e4m3fn)
    assert "Failed to find C compiler" in caplog.text


@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "CUDA error: an illegal memory access was encountered"]
)
def test_a_failing_device_does_not_count_as_one_without_kernels(
    monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setattr(kernel_check, "store_newest", Mock(side_effect=RuntimeError(words)))
    with pytest.raises(RuntimeError, match=words):
        can_launch(torch.device("cpu"), torch.bfloat16)


def test_kernels_that_compute_other_numbers_are_not_used(
    device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert can_launch(torch.device(device), torch.bfloat16)
    monkeypatch.setattr(kernel_check, "attend_cached", lambda q, *_, **__: q.flatten(1))
    assert not can_launch(torch.device(device), torch.bfloat16)
    assert "they do not compute what torch does" in caplog.text


@pytest.mark.skipif(find_spec("triton") is not None, reason="needs a machine without Triton")
def test_without_triton_there_are_none(caplog: pytest.LogCaptureFixture) -> None:
    assert not can_launch(torch.device("cpu"), torch.float32)
    assert "No module named 'triton'" in caplog.text
