"""What this machine has to run a model with, without running one."""

from __future__ import annotations

from pathlib import Path

from dgx_music.inference.checkpoint import find_snapshot, find_weights
from dgx_music.inference.hub import HubUnavailableError, list_files


def find_cuda_devices() -> list[str]:
    """Return the names of the CUDA devices that torch finds, in their order. Needs torch."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def has_weights(repository: str, revision: str) -> bool:
    """Return whether the Hugging Face cache holds a model that can be loaded; asks no network. Needs huggingface_hub."""
    return find_snapshot(repository, revision) is not None


def holds_weights(folder: Path) -> bool:
    """Return whether a local folder holds weights that can be loaded, all files of them."""
    return bool(find_weights(folder))


def can_reach_hub(repository: str, revision: str) -> str | None:
    """Return ``None`` where the hub offers the model's files within 3 s, else the reason in words. Needs huggingface_hub.

    The reason is half a sentence, such as "the hub does not know this revision" or "HF_HUB_OFFLINE is set".
    """
    try:
        list_files(repository, revision)
    except HubUnavailableError as error:
        return str(error)
    return None
