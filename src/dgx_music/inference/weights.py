"""Finds a MusicGen model's weights, on this machine or on the Hugging Face hub, and loads them through transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoTokenizer,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenMelodyConfig,
    MusicgenMelodyForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from dgx_music.catalog import UNTRAINED_NOTICE, ModelInfo
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.tiny import build_tiny

logger = logging.getLogger(__name__)

_FILES = ["*.json", "*.safetensors", "*.model"]
_IN_FLOAT32 = {"text_encoder", "audio_encoder"}


class Weights(NamedTuple):
    """A model in memory, its tokenizer, and what a user should know of them."""

    model: Any
    """A ``Musicgen(Melody)ForConditionalGeneration``: language model in the format asked for, the rest in float32."""
    tokenizer: PreTrainedTokenizerBase
    version: str
    notice: str | None


def load_weights(info: ModelInfo, revision: str | None, dtype: torch.dtype) -> Weights:
    """Return the model's weights, downloaded if need be.

    Raises ``EngineUnavailableError``, in one sentence, where they are missing or damaged.
    """
    if info.is_untrained:
        model, tokenizer = build_tiny(info.channels)
        model.decoder.to(dtype)
        model.enc_to_dec_proj.to(dtype)
        return Weights(model, tokenizer, "untrained", UNTRAINED_NOTICE)
    if info.repository is None:
        return Weights(*_read_folder(Path(info.name), dtype), "local", None)
    licence = f"the weights of {info.name} are licensed {info.licence}: no commercial use"
    folder = _find_snapshot(info.repository, revision or info.revision or "main", licence)
    return Weights(*_read_folder(folder, dtype), folder.name, licence)


def stored_bytes(info: ModelInfo, revision: str | None) -> int | None:
    """Return how large the weights on this machine are, or ``None`` where they are not here or need none."""
    try:
        folder = (
            Path(info.name)
            if info.repository is None
            else _find_downloaded(info.repository, revision or info.revision or "main")
        )
    except OSError:
        return None
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None


def _find_snapshot(repository: str, revision: str, licence: str) -> Path:
    """Return the folder, named for its commit, of the files in the Hugging Face cache; download them if need be."""
    try:
        return _find_downloaded(repository, revision)
    except OSError:  # absent, or a download that was cut short
        logger.warning("Before the first download: %s (https://huggingface.co/%s).", licence, repository)
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except Exception as error:
        raise EngineUnavailableError(
            f"The model {repository} (revision {revision}) is not on this machine and cannot be downloaded "
            f"({_first_line(error)}); connect to the internet once, or point DGX_MUSIC_MODEL at a local folder, "
            "or use musicgen-tiny-untrained."
        ) from error


def _find_downloaded(repository: str, revision: str) -> Path:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES, local_files_only=True))


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that ``save_pretrained`` wrote to the folder; pickled weights are not read."""
    try:
        kind = _kind_of(AutoConfig.from_pretrained(folder, local_files_only=True))
        model, report = kind.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if missing := sorted(report["missing_keys"]):  # transformers has made them up at random
            raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.unk_token_id in tokenizer("music").input_ids:  # transformers makes do without a vocabulary
            raise ValueError("its tokenizer has no vocabulary")
    except Exception as error:
        raise EngineUnavailableError(
            f"The model in {folder} cannot be loaded ({_first_line(error)}); it needs the safetensors weights, the "
            "configuration and the tokenizer that `save_pretrained` writes."
        ) from error
    return model, tokenizer


def _kind_of(config: Any) -> type[_Musicgen | _MusicgenMelody]:
    if isinstance(config, MusicgenConfig):
        return _Musicgen
    if isinstance(config, MusicgenMelodyConfig):
        return _MusicgenMelody
    raise ValueError("config.json is not that of a MusicGen model")


class _Musicgen(MusicgenForConditionalGeneration):  # type: ignore[misc]
    """Loads its language model in the number format asked for, and the rest in float32."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = _IN_FLOAT32


class _MusicgenMelody(MusicgenMelodyForConditionalGeneration):  # type: ignore[misc]
    """The same for the models that hear a melody."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = _IN_FLOAT32


def _first_line(error: Exception) -> str:
    """Return what a sentence can quote of the error."""
    return str(error).partition("\n")[0].rstrip(".")
