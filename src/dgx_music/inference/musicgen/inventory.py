"""What this machine has to run a model with: devices and weights. Loads no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgx_music.catalog import ModelInfo, find_model
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.checkpoint import check_obtainable, find_damage, find_folder, find_weights
from dgx_music.inference.engine import EngineSettings


@dataclass(frozen=True)
class MemoryPlan:
    """How a model shares its device's memory, in bytes."""

    device: str
    weights_bytes: int
    steps_bytes: int
    """The steps at work, texts and, on a GPU, recorded graphs."""
    codec_bytes: int
    """The codec at work, however long a clip is."""
    slot_bytes: int
    slot_count: int
    free_bytes: int | None
    """Before the model is loaded; ``None`` if that is not known."""

    @property
    def total_bytes(self) -> int:
        """What the model takes with all its slots."""
        return self._bytes_with(self.slot_count)

    @property
    def has_room(self) -> bool:
        """False if what is free is known and too little for one slot."""
        return self.free_bytes is None or self._bytes_with(1) <= self.free_bytes

    def _bytes_with(self, slot_count: int) -> int:
        shared = self.weights_bytes + self.steps_bytes + self.codec_bytes
        return shared + slot_count * self.slot_bytes


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


def plan_memory(settings: EngineSettings) -> MemoryPlan:
    """Return how the engine of these settings would share the device's memory. Loads no weights.

    The shape is read from the model's configuration, or is known from the catalogue. Needs the
    engine's packages; raises ``EngineUnavailableError`` if the device is not there, and
    ``ValueError`` or ``OSError`` if the configuration cannot be read.
    """
    import torch
    import transformers

    from dgx_music.inference.musicgen import budget, devices

    transformers.logging.set_verbosity_error()  # its warnings are about MusicGen's own config
    device = devices.choose_device(settings.device)
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]
    dtype = devices.choose_dtype(settings.dtype, device)
    needs = budget.plan(_config_of(settings), dtype, settings, device.type)
    free = budget.available_bytes(device)
    slots = settings.slots or devices.slots_for(
        needs, device.type, max(0, (free or 0) - needs.weights), settings.model_count
    )
    return MemoryPlan(str(device), needs.weights, needs.steps, needs.codec, needs.slot, slots, free)


def _config_of(settings: EngineSettings) -> Any:
    """Return the configuration of the model."""
    from transformers import AutoConfig

    from dgx_music.inference.musicgen.shapes import published_config
    from dgx_music.inference.musicgen.tiny import build_tiny

    info = find_model(settings.model)
    if info is None:
        raise ValueError(f"the model {settings.model!r} is not known")
    if info.is_untrained:
        return build_tiny(info.channels)[0].config
    folder = find_folder(info, settings.revision)
    if folder is None:
        return published_config(info)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


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
