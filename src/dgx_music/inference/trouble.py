"""What an engine's errors mean, by their words and without torch: too little memory, or a device lost to this process."""

from __future__ import annotations

import errno
import gc
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress

_NO_MEMORY = (
    "out of memory",
    "allocate memory",
    "can't start new thread",  # Python's words where there is none for its stack
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # there is no room for its handle
)
_STICKY = (
    "an illegal memory access was encountered",
    "misaligned address",
    "device-side assert triggered",  # torch's advice below every error speaks of "device-side assertions"
    "unspecified launch failure",
    "the launch timed out",
    "uncorrectable",  # ECC, NVLink
    "hardware stack error",
    "an illegal instruction was encountered",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "context is destroyed",
    "driver shutting down",
    "invalid device context",
    "unknown error",
    "MPS client has been terminated",
    "peer GPU memory",
    "captures_underway",  # torch's own: a recording that broke has left the allocator in the middle of it
)
"""CUDA's words for the errors after which the process has to be ended, as its documentation of ``cudaError`` says."""

RECORDING = threading.RLock()
"""Held while a CUDA graph is recorded and while memory is given back: each breaks the other, in any thread of the process."""

MEMORY_REMEDY = "use a smaller model, fewer DGX_MUSIC_SLOTS or DGX_MUSIC_DTYPE=bfloat16"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice, the device's or the host's, for this error or for one that it came from."""
    return any(_is_out_of_memory(each) for each in _with_causes(error))


def has_lost_the_device(error: BaseException) -> bool:
    """Return whether it is a sticky CUDA error: every later call of this process would only meet it again."""
    return not is_out_of_memory(error) and any(_is_of_the_device(each) for each in _with_causes(error))


def give_back_memory(error: BaseException | None = None) -> None:
    """Give what is no longer used back to the device, with what the functions that ``error`` has left still hold.

    Never raises: it is called while an error is dealt with, and a lost device fails here as well.
    """
    for each in _with_causes(error):
        traceback.clear_frames(each.__traceback__)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(Exception), RECORDING:
            torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """Return the error's kind and the first line of its message: the rest of CUDA's is advice for programmers."""
    line = str(error).partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _NO_MEMORY)
    )


def _is_of_the_device(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return "CUDA" in text and any(words in text for words in _STICKY)
