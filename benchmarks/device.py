"""The device of a benchmark: its name, a clock that waits for it, and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch
import transformers

_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # to /proc/self/clear_refs, proc(5)


def describe(device: torch.device) -> str:
    """Return the line of hardware and versions above the tables."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB), CUDA {torch.version.cuda}"
        return f"{gpu}; host: {_processor()}, {os.cpu_count()} cores; {versions}"
    instructions = torch.backends.cpu.get_cpu_capability() + (
        " and AMX" if "amx_tile" in _cpuinfo("flags") else ""
    )
    threads = torch.get_num_threads()
    cores = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}"
    return f"{_processor()} ({instructions}), {cores}; {versions}"


def memory_method(device: torch.device) -> str:
    if device.type == "cuda":
        return "torch.cuda.max_memory_allocated, minus what was allocated before"
    if _STATUS.exists():
        return "the process's peak resident memory (VmHWM, reset before each run), minus what was resident before"
    return "the process's peak resident memory (getrusage), minus its peak before: too low if it does not grow"


def now(device: torch.device) -> float:
    """Return the seconds of the clock after the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held_bytes(device: torch.device) -> int:
    """Return the memory in use after a garbage collection, and reset the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # neither is everywhere
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    return _kilobytes("VmRSS") * 1024


def peak_bytes(device: torch.device) -> int:
    """Return the peak of the memory in use since ``held_bytes`` was called."""
    return (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else _kilobytes("VmHWM") * 1024
    )


def _kilobytes(field: str) -> int:
    if not _STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0])


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """Return a field of the first core from /proc/cpuinfo, or an empty string."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""
