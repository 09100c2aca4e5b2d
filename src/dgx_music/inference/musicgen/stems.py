"""The tune of a full mix by a second model: demucs, where the worker has it and its weights.

audiocraft reads every melody so: it separates the mix into drums, bass, vocals and other
instruments, and keeps the last two. demucs is a package of its own (``pip install demucs``). It
downloads its weights at the first use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dgx_music.audio.conversion import match_channels, resample
from dgx_music.audio.samples import Audio
from dgx_music.errors import EngineError, GenerationRejectedError
from dgx_music.inference.trouble import first_line

_MODEL = "htdemucs"
_KEPT = ("vocals", "other")
"""The model and the stems are those of audiocraft's ``ChromaStemConditioner``."""

_separating = threading.Lock()  # demucs moves its model from device to device


@torch.no_grad()
def separate(clip: Audio, device: torch.device) -> Audio:
    """Return the clip without drums and bass, in the channels and at the rate of demucs.

    The same clip always gives the same samples. Raises ``GenerationRejectedError`` if demucs is not
    installed, and ``EngineError`` if it has no weights.
    """
    with _separating:
        model, apply = _load()
        channels: int = model.audio_channels
        mixed = match_channels(clip.samples, channels, clip.sample_rate)
        mixed = resample(mixed, clip.sample_rate, model.samplerate)
        batch = torch.from_numpy(mixed.copy())[None]
        # It would move the clip by chance and average the results, which is slightly better.
        stems = apply(model, batch, shifts=0, device=device)[0]  # [stem, channel, sample]
    kept = sum(stems[model.sources.index(name)] for name in _KEPT)
    return Audio(torch.as_tensor(kept).cpu().numpy(), model.samplerate)


@cache
def _load() -> tuple[Any, Callable[..., Tensor]]:
    """Return demucs' model, loaded, and its function that applies it."""
    try:
        from demucs.apply import apply_model
        from demucs.pretrained import get_model
    except ImportError as error:
        raise GenerationRejectedError(
            "melody_kind is stems, but this worker has no demucs; install it there "
            "(pip install demucs), or use mix."
        ) from error
    try:
        return get_model(_MODEL).eval(), apply_model
    except Exception as error:  # it downloads: there are errors of many kinds
        raise EngineError(
            f"demucs cannot load its weights ({first_line(error)}); let the worker download "
            "them once, or use melody_kind mix."
        ) from error
