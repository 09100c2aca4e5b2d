"""Kernels in C for what a step does on a CPU beside its matrix products, built by the machine's own compiler.

torch makes a pass over the memory for each operation, and starts two products for each head's attention; ``native.c`` makes
one pass. It is compiled when an engine starts, which takes a fraction of a second; without a compiler torch goes on alone.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional

from dgx_music.inference.trouble import first_line

_SOURCE = Path(__file__).with_name("native.c")
_NUMBERS = {torch.bfloat16: ["-DBFLOAT16"], torch.float32: []}
_OPTIONS = [
    *("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    "-fno-fast-math",  # whatever CC says: gcc would have all threads of the process take small numbers for 0
    # Sums in any order, so that they can be sums of vectors; but infinity and NaN are what they are.
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
]
if platform.machine() in ("x86_64", "AMD64"):
    _OPTIONS.append("-mprefer-vector-width=512")  # measured 1.07 times as fast with it: 8 rows, 8-bit weights
_BUILD_SECONDS = 60.0
_LEAST_SIZE = 4
"""Of a head: two bfloat16 are a lane, and a vector has two lanes at least."""
_NEAR = 0.02  # of numbers around 1, in bfloat16 as well
_OPENMP = re.compile(r"/lib[gi]?omp[^/]*$")

logger = logging.getLogger(__name__)


class Native:
    """The kernels for one number format and one size of head."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.attend
        self._attend.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 7 + [ctypes.c_int]
        self._attend.restype = None
        self._round_lines = library.round_lines
        self._round_lines.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
        self._round_lines.restype = None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return what one query ``[N, H, 1, D]`` of each line reads from keys and values ``[N, H, T, D]``: ``[N, H * D]``.

        The mask ``[N, 1, 1, T]`` is added to the scores. Raises ``ValueError`` where keys and values do not lie alike, a head's
        positions side by side.
        """
        count, heads, positions, size = keys.shape
        if keys.stride() != values.stride() or keys.stride()[2:] != (size, 1):
            raise ValueError(f"keys of strides {keys.stride()} and values of strides {values.stride()} cannot be read")
        out = q.new_empty(count, heads * size)
        pointers = (q.data_ptr(), keys.data_ptr(), values.data_ptr(), None if mask is None else mask.data_ptr())
        strides = (q.stride(0), keys.stride(0), keys.stride(1), 0 if mask is None else mask.stride(0))
        self._attend(*pointers, out.data_ptr(), count, heads, positions, *strides, torch.get_num_threads())
        return out

    def round_lines(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[N, in]`` in whole levels, its largest number 126 of them, and how large each line's are ``[N, 1]``."""
        x = x.contiguous()
        rounded, levels = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), 1)
        self._round_lines(x.data_ptr(), rounded.data_ptr(), levels.data_ptr(), *x.shape, torch.get_num_threads())
        return rounded, levels


def build(head_size: int, dtype: torch.dtype) -> Native | None:
    """Return the kernels, or ``None`` where there is no compiler.

    So it is where they cannot be built, or do not compute what torch does; then the log says why.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return None
    try:
        return _build(compiler, head_size, dtype)
    except (AttributeError, OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning(
            "no kernels in C by %s, torch's slower operations instead: %s (CC names a compiler, DGX_MUSIC_COMPILE=off none)",
            compiler,
            _reason(error),
        )
        return None


def _reason(error: Exception) -> str:
    """Return the line of what a compiler printed that says what is wrong, or else the error's own."""
    if not isinstance(error, subprocess.CalledProcessError):
        return first_line(error)
    printed: list[str] = error.stderr.strip().splitlines() or [f"it ended with {error.returncode}"]
    return next((line for line in printed if "error" in line), printed[0])


@cache
def _build(compiler: str, head_size: int, dtype: torch.dtype) -> Native:
    if dtype not in _NUMBERS or head_size & (head_size - 1) or head_size < _LEAST_SIZE:
        raise ValueError(f"they are not made for heads of {head_size} numbers of {dtype}")
    with TemporaryDirectory() as folder:
        library = Path(folder) / "native.so"
        source = ("-x", "c", str(_SOURCE), "-x", "none", "-lm")
        options = (*_OPTIONS, *_NUMBERS[dtype], f"-DSIZE={head_size}", "-o", str(library))
        command = (*shlex.split(compiler), *options, *source)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)  # noqa: S603
        ours = _first_openmp_runtimes()
        native = Native(ctypes.CDLL(str(library)))  # which stays when its file is gone
    if others := _openmp_runtimes() - ours:
        raise ValueError(
            f"their threads are not torch's, but those of {' and '.join(others)}, which would wait for cores"
        )
    _check(native, head_size, dtype)
    return native


def _openmp_runtimes() -> set[str]:
    """Return the libraries in this process that have threads of OpenMP; those of two would keep each other from the cores."""
    files = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return {file for file in files if _OPENMP.search(file)}


@cache
def _first_openmp_runtimes() -> set[str]:
    """Return those that were there before any kernels: a library that was refused stays loaded, and so does its runtime."""
    return _openmp_runtimes()


def _check(native: Native, head_size: int, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` where the kernels do not agree with torch, or with themselves: a compiler may be too bold."""
    random = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(3, 2, 43, head_size, generator=random).to(dtype) for _ in range(3))
    mask = torch.zeros(3, 1, 1, 43, dtype=dtype)
    mask[1, ..., 21:] = -math.inf
    q = q[:, :, :1].contiguous()
    keys[2, 0, 5] = math.nan
    exact = functional.scaled_dot_product_attention(q.float(), keys.float(), values.float(), mask.float()).flatten(1)
    read = native.attend(q, keys, values, mask)
    is_near = torch.allclose(read.float(), exact, atol=_NEAR, rtol=_NEAR, equal_nan=True)
    alone = native.attend(q[1:2], keys[1:2], values[1:2], mask[1:2])
    lines = values.flatten(1)
    rounded, levels = native.round_lines(lines)
    is_rounded = ((rounded * levels - lines).abs() <= levels).all()
    if not (is_near and is_rounded and torch.equal(alone[0], read[1])):
        raise ValueError("they do not compute what torch does")
