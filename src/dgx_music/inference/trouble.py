"""What an engine's errors mean: too little memory, or a device that this process has lost.

Reads the words of the errors, so that it needs no torch.
"""

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
    "can't start new thread",  # Python says so if there is no memory for its stack
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # there is no memory for its handle
)
_STICKY = (
    "an illegal memory access was encountered",
    "misaligned address",
    "device-side assert triggered",  # torch's advice below all errors has "assertions"
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
    "captures_underway",  # torch's own: a broken recording left the allocator unusable
)
"""CUDA's words for errors after which a process must end; see its reference of ``cudaError``."""

RECORDING = threading.RLock()
"""Held while a CUDA graph is recorded, and while memory is given back.

Each breaks the other, in any thread of the process.
"""

MEMORY_REMEDY = "use a smaller model, fewer DGX_MUSIC_SLOTS or DGX_MUSIC_DTYPE=bfloat16"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the device or the host had too little memory.

    That may be this error, or one that caused it.
    """
    return any(map(_is_out_of_memory, _with_causes(error)))


def has_lost_the_device(error: BaseException) -> bool:
    """Return whether it is a sticky CUDA error: every later call of this process would raise it."""
    return not is_out_of_memory(error) and any(map(_is_sticky, _with_causes(error)))


def give_back_memory(error: BaseException | None = None) -> None:
    """Give memory that is no longer used back to the device.

    The functions that ``error`` has ended give up what they hold. Never raises: it is called while
    an error is handled, and a lost device fails here too.
    """
    for each in _with_causes(error):
        traceback.clear_frames(each.__traceback__)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with suppress(Exception), RECORDING:
            torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    """Return the error's class and the first line of its message.

    The other lines of a CUDA error are advice for programmers.
    """
    line = str(error).partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and those that caused it, each once: they may form a circle."""
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


def _is_sticky(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return "CUDA" in text and any(words in text for words in _STICKY)
