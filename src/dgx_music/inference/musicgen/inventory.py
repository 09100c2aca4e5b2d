"""What this machine has to run a model with: devices and weights. Loads no model."""

from __future__ import annotations

from pathlib import Path

from dgx_music.catalog import ModelInfo
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.checkpoint import check_obtainable, find_damage, find_folder, find_weights


def find_cuda_devices() -> list[str]:
    """Return the names of the CUDA devices that torch finds, in their order. Needs torch."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def has_weights(model: ModelInfo, revision: str | None) -> bool:
    """Return whether this machine holds the model's files; asks no network.

    ``revision`` is the one that is set. Needs huggingface_hub.
    """
    return find_folder(model, revision) is not None


def holds_weights(folder: Path) -> bool:
    """Return whether a local folder holds weights that can be loaded, all files of them."""
    return bool(find_weights(folder))


def find_damage_of(model: ModelInfo, revision: str | None) -> str | None:
    """Return in half a sentence why the model's files here cannot be loaded, or ``None``.

    Reads no weights.
    """
    folder = find_folder(model, revision)
    return None if folder is None else find_damage(folder)


def find_obstacle(model: ModelInfo, revision: str | None) -> str | None:
    """Return in a sentence why a worker could not get the model's files, or ``None``.

    ``None`` means that they are here or can be downloaded. Asks the hub for at most 3 s, and
    downloads nothing. Needs huggingface_hub.
    """
    try:
        check_obtainable(model, revision)
    except EngineUnavailableError as error:
        return str(error)
    return None
