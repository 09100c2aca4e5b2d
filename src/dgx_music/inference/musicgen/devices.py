"""Which device and number format to use, and how many slots fit into its memory."""

from __future__ import annotations

import os

import torch

from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.musicgen.budget import Budget
from dgx_music.inference.residents import free_bytes
from dgx_music.inference.trouble import give_back_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_SLOTS = {"cpu": 8, "cuda": 64}
"""More slots would hardly make more music per second, and each generation would be slower.

On an H100, 64 slots make a third more than 32, with the small model and with the large one.
"""
_SLOTS_SHARE = {"cpu": 0.4, "cuda": 0.8}
"""Of the free memory; the rest is for longer texts, and on a CPU for other programs."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is a GPU if there is one.

    Raises ``EngineUnavailableError`` if torch does not find it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineUnavailableError(
            f"The device {name} was asked for, but torch does not find it; use auto or cpu."
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the number format of that name; ``auto`` is the fastest one on the device."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16 if _multiplies_bfloat16() else torch.float32
    with torch.cuda.device(device):  # it asks the current one
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )


def check_weights(name: str, device: torch.device) -> None:
    """Raise ``EngineUnavailableError`` if such weights make the device slower."""
    if name == "int4" and not _has_products_of_4_bits(device):
        raise EngineUnavailableError(
            "DGX_MUSIC_WEIGHTS=int4 needs a processor with AVX2 or AVX-512, and no GPU; "
            "use DGX_MUSIC_WEIGHTS=full."
        )
    if name == "int8" and device.type == "cuda":
        raise EngineUnavailableError(
            "DGX_MUSIC_WEIGHTS=int8 makes a GPU slower, not faster (a step of musicgen-small takes "
            "3.6 times as long on an H100); use DGX_MUSIC_WEIGHTS=full, and DGX_MUSIC_KV_CACHE=fp8 "
            "for many slots."
        )


def _has_products_of_4_bits(device: torch.device) -> bool:
    """Return whether torch has fast ones; elsewhere its products of 4 bits are a plain loop."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _multiplies_bfloat16() -> bool:
    """Return whether the processor has instructions for it; without them float32 is faster."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # torch before 2.13 has none
    capabilities: dict[str, object] = get_capabilities()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def keep_float32() -> None:
    """Have cuDNN compute in float32 what is in float32: the codec.

    torch lets it round to the 10 bits of TF32. Then a clip's samples depend on the windows and on
    the clips beside it, by 1e-3 of the peak on an H200 instead of 1e-6. In float32 eight windows
    take 6 % more time there than in TF32, and one takes 8 % less.
    """
    torch.backends.cudnn.allow_tf32 = False


def leave_a_core_free() -> None:
    """Leave one core to the parent process: at every step torch waits for its slowest thread."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))


def fitting_slots(budget: Budget, device: torch.device, model_count: int) -> int:
    """Return how many slots, and their work, fit into a model's share of the free memory.

    At least 1, at most ``_MAX_SLOTS``.
    """
    give_back_memory()  # else what loading left behind would not count as free
    free = free_bytes(str(device))
    return 1 if free is None else slots_for(budget, device.type, free, model_count)


def slots_for(budget: Budget, kind: str, free: int, model_count: int) -> int:
    """Return the same for a kind of device with that much memory free."""
    share = int(free * _SLOTS_SHARE[kind] / model_count)
    return max(1, min(_MAX_SLOTS[kind], budget.fitting_slots(share)))


def describe(device: torch.device) -> str:
    """Return the device as users know it: ``cpu``, or a GPU with its product's name."""
    if device.type == "cpu":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
