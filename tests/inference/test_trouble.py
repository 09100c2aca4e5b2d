"""What the words of an error mean."""

from __future__ import annotations

import errno
import weakref

import pytest

from dgx_music.errors import EngineError
from dgx_music.inference.trouble import (
    first_line,
    give_back_memory,
    has_lost_the_device,
    is_out_of_memory,
)

AcceleratorError = type("AcceleratorError", (RuntimeError,), {})


ADVICE = (
    "Search for `cudaErrorX' in https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__TYPES.html for more "
    "information.\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below "
    "might be incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to "
    "enable device-side assertions.\n"
)
"""What torch writes below every error of CUDA."""

STICKY = [
    "an illegal memory access was encountered",
    "misaligned address",
    "device-side assert triggered",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "hardware stack error",
    "an illegal instruction was encountered",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "context is destroyed",
    "driver shutting down",
    "invalid device context",
    "unknown error",
    "MPS client has been terminated",
    "uncorrectable NVLink error: peer GPU memory over NVLink",
]
PASSING = [
    "operation not permitted when stream is capturing",
    "operation failed due to a previous error during capture",
    "operation would make the legacy stream depend on a capturing blocking stream",
    "no kernel image is available for execution on the device",
    "device kernel image is invalid",
    "invalid argument",
    "invalid configuration argument",
    "too many resources requested for launch",
]


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
        ),
        AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        caused(EngineError("The step failed."), RuntimeError("CUDA out of memory")),
        caused(
            RuntimeError("CUDA error: operation failed due to a previous error during capture"),
            MemoryError(),
        ),
    ],
)
def test_too_little_memory_is_known_and_is_no_lost_device(error: BaseException) -> None:
    assert (is_out_of_memory(error), has_lost_the_device(error)) == (True, False)


@pytest.mark.parametrize(
    "error",
    [
        *(AcceleratorError(f"CUDA error: {text}\n{ADVICE}") for text in STICKY),
        RuntimeError("CUDA driver error: unspecified launch failure"),
        RuntimeError(
            'captures_underway.empty() INTERNAL ASSERT FAILED at "/c10/cuda/CUDACachingAllocator.cpp":3'
        ),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        caused(
            EngineError("The step failed."),
            AcceleratorError("CUDA error: device-side assert triggered"),
        ),
    ],
)
def test_a_lost_device_is_known(error: BaseException) -> None:
    assert (is_out_of_memory(error), has_lost_the_device(error)) == (False, True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes differ"),
        RuntimeError("tensors at a misaligned address are not taken"),
        ValueError("CUDA error, out of memory"),
        OSError(2, "no file"),
        EngineError(),
        *(AcceleratorError(f"CUDA error: {text}\n{ADVICE}") for text in PASSING),
        RuntimeError(
            "CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx( handle, opa, opb, m, n, k)`"
        ),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
    ],
)
def test_another_error_means_neither(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert not has_lost_the_device(error)


def test_an_error_that_is_its_own_cause_is_looked_at_once() -> None:
    error = RuntimeError("round and round")
    assert not is_out_of_memory(caused(error, caused(RuntimeError("other"), error)))


def test_the_first_line_is_enough() -> None:
    assert (
        first_line(RuntimeError("CUDA error: bad.\nFor debugging consider"))
        == "RuntimeError: CUDA error: bad"
    )
    assert first_line(MemoryError()) == "MemoryError"


class Tensor:
    """Something that can be watched."""


def test_memory_that_an_errors_functions_hold_is_given_back() -> None:
    held: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        raise MemoryError

    try:
        fail()
    except MemoryError as error:
        assert held[0]() is not None
        give_back_memory(error)
        assert held[0]() is None
