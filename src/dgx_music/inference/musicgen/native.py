"""Kernels in C for a step's work on a CPU beside its matrix products, built on the machine itself.

torch makes a pass over the memory for each operation, and starts two products for each head's
attention; ``native.c`` makes one pass. It is compiled when an engine starts, which takes a fraction
of a second; without a compiler torch does the work.
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
    # Even if CC says otherwise: gcc would make all threads of the process treat small numbers as 0.
    "-fno-fast-math",
    # Sums in any order, so that they can be sums of vectors; infinity and NaN stay what they are.
    *("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno"),
]
if platform.machine() in ("x86_64", "AMD64"):
    # Measured: 1.07 times as fast with 8 rows and 8-bit weights.
    _OPTIONS.append("-mprefer-vector-width=512")
_BUILD_SECONDS = 60.0
_MIN_HEAD_SIZE = 4
"""Two bfloat16 are a lane, and a vector has at least two lanes."""
_TOLERANCE = 0.02  # of numbers around 1, in bfloat16 as well
_OPENMP = re.compile(r"/lib[gi]?omp[^/]*$")

logger = logging.getLogger(__name__)


class Native:
    """The kernels for one number format and one size of head."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._attend = library.attend
        self._attend.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 7 + [ctypes.c_int]
        self._attend.restype = None
        self._quantise_rows = library.quantise_rows
        self._quantise_rows.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_int]
        self._quantise_rows.restype = None

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Return what one query ``[N, H, 1, D]`` reads from ``[N, H, T, D]``: ``[N, H * D]``.

        The mask ``[N, 1, 1, T]`` is added to the scores. Raises ``ValueError`` if keys and values
        have different strides, or a head's positions are not contiguous.
        """
        count, heads, positions, size = keys.shape
        if keys.stride() != values.stride() or keys.stride()[2:] != (size, 1):
            raise ValueError(
                f"keys of strides {keys.stride()} and values of strides {values.stride()} cannot be read"
            )
        out = q.new_empty(count, heads * size)
        pointers = (
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            None if mask is None else mask.data_ptr(),
        )
        strides = (
            q.stride(0),
            keys.stride(0),
            keys.stride(1),
            0 if mask is None else mask.stride(0),
        )
        self._attend(
            *pointers, out.data_ptr(), count, heads, positions, *strides, torch.get_num_threads()
        )
        return out

    def quantise_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``[N, in]`` rounded to int8, and each row's scale ``[N, 1]``.

        The largest number of a row becomes 126.
        """
        x = x.contiguous()
        rounded, scales = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), 1)
        self._quantise_rows(
            x.data_ptr(), rounded.data_ptr(), scales.data_ptr(), *x.shape, torch.get_num_threads()
        )
        return rounded, scales


def build(head_size: int, dtype: torch.dtype) -> Native | None:
    """Return the kernels, or ``None`` if there is no compiler.

    Also returns ``None``, and logs why, if they cannot be built or do not compute what torch does.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        return None
    try:
        return _build(compiler, head_size, dtype)
    except (AttributeError, OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning(
            "no kernels in C by %s, torch's slower operations instead: %s "
            "(CC names a compiler, DGX_MUSIC_KERNELS=off none)",
            compiler,
            _reason(error),
        )
        return None


def _reason(error: Exception) -> str:
    """Return the line of a compiler's output that says what is wrong, or else the error's own."""
    if not isinstance(error, subprocess.CalledProcessError):
        return first_line(error)
    printed: list[str] = error.stderr.strip().splitlines() or [f"it ended with {error.returncode}"]
    return next((line for line in printed if "error" in line), printed[0])


@cache
def _build(compiler: str, head_size: int, dtype: torch.dtype) -> Native:
    if dtype not in _NUMBERS or head_size & (head_size - 1) or head_size < _MIN_HEAD_SIZE:
        raise ValueError(f"they are not made for heads of {head_size} numbers of {dtype}")
    with TemporaryDirectory() as folder:
        library = Path(folder) / "native.so"
        source = ("-x", "c", str(_SOURCE), "-x", "none", "-lm")
        options = (*_OPTIONS, *_NUMBERS[dtype], f"-DSIZE={head_size}", "-o", str(library))
        command = (*shlex.split(compiler), *options, *source)
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_BUILD_SECONDS)  # noqa: S603
        ours = _first_openmp_runtimes()
        native = Native(ctypes.CDLL(str(library)))  # stays loaded when its file is gone
    if others := _openmp_runtimes() - ours:
        raise ValueError(
            f"their threads are not torch's, but those of {' and '.join(others)}, which would wait for cores"
        )
    _check(native, head_size, dtype)
    return native


def _openmp_runtimes() -> set[str]:
    """Return the libraries in this process that have threads of OpenMP.

    The threads of two such libraries would compete for the cores.
    """
    files = (line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines())
    return {file for file in files if _OPENMP.search(file)}


@cache
def _first_openmp_runtimes() -> set[str]:
    """Return the libraries that were loaded before any kernels.

    A refused library stays loaded, and so does its OpenMP runtime.
    """
    return _openmp_runtimes()


def _check(native: Native, head_size: int, dtype: torch.dtype) -> None:
    """Raise ``ValueError`` if the kernels do not agree with torch or with themselves.

    A compiler's optimisations may change the numbers.
    """
    random = torch.Generator().manual_seed(0)
    q, keys, values = (
        torch.randn(3, 2, 43, head_size, generator=random).to(dtype) for _ in range(3)
    )
    mask = torch.zeros(3, 1, 1, 43, dtype=dtype)
    mask[1, ..., 21:] = -math.inf
    q = q[:, :, :1].contiguous()
    keys[2, 0, 5] = math.nan
    exact = functional.scaled_dot_product_attention(
        q.float(), keys.float(), values.float(), mask.float()
    )
    read = native.attend(q, keys, values, mask)
    is_near = torch.allclose(
        read.float(), exact.flatten(1), atol=_TOLERANCE, rtol=_TOLERANCE, equal_nan=True
    )
    alone = native.attend(q[1:2], keys[1:2], values[1:2], mask[1:2])
    rows = values.flatten(1)
    rounded, scales = native.quantise_rows(rows)
    is_rounded = ((rounded * scales - rows).abs() <= scales).all()
    if not (is_near and is_rounded and torch.equal(alone[0], read[1])):
        raise ValueError("they do not compute what torch does")
