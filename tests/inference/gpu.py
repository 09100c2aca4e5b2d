"""What the tests on a GPU share, and those of its kernels in Triton's interpreter."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_interpreter = pytest.mark.skipif(not IS_INTERPRETED, reason="needs TRITON_INTERPRET=1")
needs_compiler = pytest.mark.skipif(
    IS_INTERPRETED, reason="needs Triton's compiler, not its interpreter"
)


@contextmanager
def nobody_may_wait() -> Iterator[None]:
    """Raise an error if anything makes the host wait for the device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that this mode does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(tensor: Tensor, device: str) -> Tensor:
    """Return the tensor on the device; views keep their strides, as their storage moves."""
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)  # type: ignore[call-overload]
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_rounded_alike(actual: Tensor, expected: Tensor, roundings: int = 1) -> None:
    """Compare with float64, but for so many roundings of numbers below 4.

    The interpreter truncates to bfloat16, while torch and GPUs round.
    """
    error = max(4 * roundings * torch.finfo(actual.dtype).eps, 1e-5)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=error, atol=error)
