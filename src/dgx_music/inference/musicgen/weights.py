"""Loads MusicGen weights into transformers' modules; refuses missing, damaged or doubtful ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor
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
from dgx_music.inference.checkpoint import (
    NO_WEIGHTS,
    find_folder,
    find_weights,
    licence_of,
    list_small_files,
    obtain,
)
from dgx_music.inference.integrity import check_integrity
from dgx_music.inference.musicgen.tiny import build_tiny

_IN_FLOAT32 = {"text_encoder", "audio_encoder"}
_HARMLESS = re.compile(
    r"\.embed_positions\.|(^|\.)position_ids$|^text_encoder\.(decoder|lm_head)\."
)
"""What older versions stored and nothing needs: tables that are computed, and T5's decoder."""
_TIED = ("text_encoder.shared.weight", "text_encoder.encoder.embed_tokens.weight")


class Weights(NamedTuple):
    """A model in memory, its tokenizer, its version and a notice for the user."""

    model: Any
    """A ``Musicgen(Melody)ForConditionalGeneration``; all but its language model is in float32."""
    tokenizer: PreTrainedTokenizerBase
    version: str
    notice: str | None


def load_weights(
    info: ModelInfo,
    revision: str | None,
    dtype: torch.dtype,
    check_room: Callable[[Any], None] = lambda _config: None,
) -> Weights:
    """Return the model's weights, downloaded if need be.

    Raises ``EngineUnavailableError``, in one sentence, if they are missing, damaged or doubtful.
    ``check_room`` is called with the configuration before they are read, and may raise
    ``MemoryError``; not for the toy.
    """
    if info.is_untrained:
        model, tokenizer = build_tiny(info.channels)
        model.decoder.to(dtype)
        model.enc_to_dec_proj.to(dtype)
        return Weights(model, tokenizer, "untrained", UNTRAINED_NOTICE)
    folder = obtain(info, revision)
    model, tokenizer = _read_folder(folder, dtype, check_room)
    if info.repository is None:
        return Weights(model, tokenizer, "local", None)
    return Weights(model, tokenizer, folder.name, licence_of(info))


def stored_bytes(info: ModelInfo, revision: str | None) -> int | None:
    """Return the size of the weights on this machine; ``None`` if they are not here."""
    folder = find_folder(info, revision)
    return None if folder is None else sum(file.stat().st_size for file in find_weights(folder))


def _read_folder(
    folder: Path, dtype: torch.dtype, check_room: Callable[[Any], None]
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the folder's model and tokenizer; runs no code of the folder."""
    try:
        files = find_weights(folder)
        if folder.is_dir():
            check_integrity([*list_small_files(folder), *files])
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = _kind_of(config)
        if not files:
            raise ValueError(NO_WEIGHTS)
        check_room(config)
        model = _build(kind, config, _read_tensors(files), dtype)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        # transformers does not check this.
        if tokenizer.unk_token_id in tokenizer("music").input_ids:
            raise ValueError("its tokenizer has no vocabulary")
    except (EngineUnavailableError, MemoryError):
        raise
    except Exception as error:
        raise EngineUnavailableError(
            f"The model in {folder} cannot be loaded ({_first_line(error)}); it needs the weights, the configuration "
            "and the tokenizer that `save_pretrained` writes."
        ) from error
    return model, tokenizer


def _read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """Return all tensors by name; they stay in their files until they are used."""
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file) if file.suffix == ".safetensors" else _read_pickled(file)
    return tensors


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors that ``torch.save`` wrote; refuses other pickles, which might run code."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    except Exception as error:  # of any kind, if the file is junk
        raise ValueError(
            f"{file.name} is cut short, damaged, or holds more than plain tensors, "
            "which might run code and is never loaded"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f"{file.name} is no plain table of tensors")
    return found


def _build(
    kind: type[_Musicgen | _MusicgenMelody],
    config: Any,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
) -> Any:
    """Return the model with these weights.

    Raises ``ValueError`` if one has no place, another shape, or numbers that are not finite.
    """
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=dtype,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # found below, by name
        output_loading_info=True,
    )
    tensors = {_present_name(name): tensor for name, tensor in tensors.items()}
    for doubt in _doubts(model, tensors, report):
        raise ValueError(doubt)
    return model


def _doubts(model: Any, tensors: dict[str, Tensor], report: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the model's weights; transformers fills gaps with random numbers."""
    weights = model.state_dict()
    if missing := sorted(report["missing_keys"]):
        yield f"its weights lack {_first_of(missing)}"
    unused = sorted(name for name in tensors.keys() - weights.keys() if not _HARMLESS.search(name))
    if unused:
        yield f"its weights hold what the model has no use for, {_first_of(unused)}"
    for name, found, wanted in sorted(report["mismatched_keys"]):
        yield f"its weight {name} has the shape {list(found)} instead of {list(wanted)}"
    if not torch.equal(weights[_TIED[0]], weights[_TIED[1]]):
        yield f"its weights {_TIED[0]} and {_TIED[1]}, which are one table, differ"
    for name, weight in weights.items():
        if weight.is_floating_point() and name in tensors and not tensors[name].is_floating_point():
            yield f"its weight {name} holds numbers of {tensors[name].dtype}"
        if not _is_finite(weight):
            yield f"its weight {name} holds NaN or infinite numbers in {weight.dtype}"


def _present_name(name: str) -> str:
    """Return a weight's present name: torch has renamed the two parts of a normalised weight."""
    return re.sub(
        r"\.weight_([gv])$",
        lambda old: f".parametrizations.weight.original{'gv'.index(old[1])}",
        name,
    )


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # both NaN if one number is; many times as fast as isfinite
    return math.isfinite(least) and math.isfinite(most)


def _kind_of(config: Any) -> type[_Musicgen | _MusicgenMelody]:
    if isinstance(config, MusicgenConfig):
        return _Musicgen
    if isinstance(config, MusicgenMelodyConfig):
        return _MusicgenMelody
    raise ValueError("config.json is not that of a MusicGen model")


class _Musicgen(MusicgenForConditionalGeneration):  # type: ignore[misc]
    """Loads its language model in the requested number format, and the rest in float32."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = _IN_FLOAT32


class _MusicgenMelody(MusicgenMelodyForConditionalGeneration):  # type: ignore[misc]
    """The same for models that hear a melody."""

    _keep_in_fp32_modules_strict: ClassVar[set[str]] = _IN_FLOAT32


def _first_line(error: Exception) -> str:
    """Return the part of the error that a sentence can quote."""
    return str(error).partition("\n")[0].rstrip(".")
