"""What an engine takes of its device's memory: known before its weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyForConditionalGeneration,
)

from dgx_music.catalog import MAX_DURATION_SECONDS, WINDOW_SECONDS
from dgx_music.inference.engine import EngineSettings
from dgx_music.inference.musicgen import codec
from dgx_music.inference.musicgen.batch import delays
from dgx_music.inference.musicgen.conditioning import LONGEST_PREFIX_TEXT
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.launches import USUAL_TEXT
from dgx_music.inference.residents import free_bytes

_STEPS_BYTES = {"cpu": 250_000_000, "cuda": 1_000_000_000}
"""Kept free for the work of steps and texts; on a GPU for recorded graphs as well. A CPU took 0.1 GB
for eight rows of the small model."""
_CODEC_TENSORS = 30
"""The peak of a window, in tensors of the codec's widest layer; 19 to 28 were measured at the true size."""


@dataclass(frozen=True)
class Budget:
    """How much memory each part takes, in bytes."""

    weights: int
    """Language model, text encoder and codec."""
    slot: int
    """One slot: keys and values of its music and of a usual text, and the samples of its clip."""
    codec: int
    """The codec at work, whatever the length of the clip."""
    steps: int
    """The steps at work, texts and recorded graphs."""

    @property
    def work(self) -> int:
        """What all slots share, besides the weights."""
        return self.codec + self.steps

    def total(self, slot_count: int) -> int:
        """Return what everything takes together."""
        return self.weights + self.work + slot_count * self.slot

    def fitting_slots(self, available: int) -> int:
        """Return how many slots fit beside the work, 0 or more, once the weights are there."""
        return max(0, (available - self.work) // self.slot)


def budget_of(model: Any, decoder: Decoder, kind: str) -> Budget:
    """Return the budget, on a kind of device, of a model whose decoder has its final formats."""
    other_bytes = sum(
        weight.nbytes
        for part in (model.text_encoder, model.audio_encoder)
        for weight in part.parameters()
    )
    own = model.config.audio_encoder
    clip_bytes = round(MAX_DURATION_SECONDS * own.sampling_rate) * decoder.channels * 4
    own_clip = clip_bytes if kind == "cpu" else 0  # finished audio is in the host's memory
    widest = round(codec.WINDOW_SECONDS * own.sampling_rate) * own.num_filters * 4
    at_once = 1 if kind == "cpu" else codec.MOST_TOGETHER * decoder.channels
    return Budget(
        weights=decoder.weight_bytes + other_bytes,
        slot=decoder.slot_bytes + decoder.text_bytes(USUAL_TEXT) + own_clip,
        codec=_CODEC_TENSORS * widest * at_once,
        steps=_STEPS_BYTES[kind],
    )


def plan(config: Any, dtype: torch.dtype, settings: EngineSettings, kind: str) -> Budget:
    """Return the budget of a model of which only the configuration is known; takes no memory."""
    is_plain = isinstance(config, MusicgenConfig)
    family = (
        MusicgenForConditionalGeneration if is_plain else MusicgenMelodyForConditionalGeneration
    )
    with torch.device("meta"):
        model: Any = family(config)
    model.decoder.to(dtype)
    decoder = Decoder(model.decoder, None, max_positions_of(config))
    if settings.weights != "full":
        decoder.quantise(settings.weights)
    if settings.kv_cache != "full":
        decoder.shrink_cache()
    return budget_of(model, decoder, kind)


def max_steps_of(config: Any) -> int:
    """Return how many steps the longest window of the model takes."""
    own = config.decoder
    frame_rate = config.audio_encoder.sampling_rate / config.audio_encoder.hop_length
    frames = round(WINDOW_SECONDS * float(frame_rate))
    return frames + delays(own.num_codebooks, own.audio_channels)[-1]


def max_positions_of(config: Any) -> int:
    """Return how many positions a slot has: what stands before the music, its steps and a spare."""
    melody = int(getattr(config, "chroma_length", 0))
    return (melody and melody + LONGEST_PREFIX_TEXT) + max_steps_of(config) + 1


def available_bytes(device: torch.device) -> int | None:
    """Return how much memory there is for tensors, or ``None`` if that is not known.

    That is what the device has free, and on a GPU also what torch holds and does not use.
    """
    free = free_bytes(str(device))
    if free is None or device.type != "cuda":
        return free
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_room(needed: int, device: torch.device, what: str) -> None:
    """Raise ``MemoryError`` if the device lacks memory for what is to be made.

    A host gives memory that it does not have, and kills the process later.
    """
    available = available_bytes(device)
    if available is not None and needed > available:
        raise MemoryError(
            f"{what} needs {in_gigabytes(needed)} of memory, and {in_gigabytes(available)} is free"
        )


def in_gigabytes(count: int) -> str:
    """Return the bytes as text, such as ``1.23 GB``."""
    return f"{count / 1e9:.2f} GB"
