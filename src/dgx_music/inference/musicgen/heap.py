"""The C library's heap, which keeps what was freed: more and more of it, in pieces too small."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def return_free_memory() -> None:
    """Give the free pages of all threads' heaps back to the system, if the C library is glibc.

    It takes about 20 ms, and as long again until the pages that are needed are back.
    """
    if _trim is not None:
        _trim(0)
