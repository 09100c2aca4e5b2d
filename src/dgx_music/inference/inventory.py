"""What this machine has to run a model with, without running one."""

from __future__ import annotations

from pathlib import Path

from dgx_music.inference.hub import HubUnavailableError, list_files


def find_cuda_devices() -> list[str]:
    """Return the names of the CUDA devices that torch finds, in their order. Needs torch."""
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def has_weights(repository: str, revision: str) -> bool:
    """Return whether the Hugging Face cache holds weights of this revision; asks no network. Needs huggingface_hub."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True)
    except OSError:
        return False
    return any(Path(folder).glob("*.safetensors"))


def can_reach_hub(repository: str, revision: str) -> str | None:
    """Return ``None`` where the hub offers the model's files within 3 s, else the reason in words. Needs huggingface_hub.

    The reason is half a sentence, such as "the hub does not know this revision" or "HF_HUB_OFFLINE is set".
    """
    try:
        list_files(repository, revision)
    except HubUnavailableError as error:
        return str(error)
    return None
