"""The ten repositories of the hub at tiny size: the files that each has, by name and kind, with a toy's weights in them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5Tokenizer

from dgx_music.catalog import MODELS, ModelInfo
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody

_LARGE = (".safetensors", ".bin", ".model")
"""What the hub keeps in its large file storage, and names by SHA-256."""
_AUDIOCRAFT = ("state_dict.bin", "compression_state_dict.bin")
_FIRST_FORMAT = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "do_sample": False,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": "float32",
    "torchscript": False,
    "transformers_version": "4.31.0.dev0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}
"""What transformers 4.31 wrote into each part of ``config.json``, whatever the model."""


@dataclass(frozen=True)
class Layout:
    """How a repository keeps its weights: the files and their number of shards, the first one being what is loaded."""

    weights: tuple[tuple[str, int], ...] = (("model.safetensors", 1),)
    text_embedding: tuple[str, ...] = ("shared",)
    """Under which names T5's one table is stored."""
    is_first_format: bool = False
    """The first configuration, the former names of normalised weights, and the table of positions stored."""
    dtype: torch.dtype = torch.float32
    others: tuple[str, ...] = _AUDIOCRAFT


_BOTH = ("shared", "encoder.embed_tokens")
LAYOUTS = {
    "musicgen-small": Layout(
        (("model.safetensors", 1), ("pytorch_model.bin", 1)), is_first_format=True
    ),
    "musicgen-medium": Layout((("pytorch_model.bin", 1),), _BOTH, is_first_format=True),
    "musicgen-large": Layout((("pytorch_model.bin", 2),), _BOTH, is_first_format=True),
    "musicgen-stereo-small": Layout(
        (("model.safetensors", 1), ("model.fp32.safetensors", 1)),
        dtype=torch.float16,
        others=_AUDIOCRAFT,
    ),
    "musicgen-stereo-medium": Layout((("model.safetensors", 2),), ("encoder.embed_tokens",)),
    "musicgen-stereo-large": Layout((("model.safetensors", 3),)),
    "musicgen-melody": Layout((("model.safetensors", 2),)),
    "musicgen-melody-large": Layout((("model.safetensors", 3),), ("encoder.embed_tokens",)),
    "musicgen-stereo-melody": Layout((("model.safetensors", 2),), _BOTH),
    "musicgen-stereo-melody-large": Layout((("model.safetensors", 4),)),
}


def build(name: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """Return the toy whose weights the repository holds, and a tokenizer with a vocabulary of letters."""
    info = MODELS[name]
    model, _ = (build_tiny_melody if info.hears_melody else build_tiny)(info.channels)
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz-"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), *letters]
    return model.to(LAYOUTS[name].dtype).float(), T5Tokenizer(vocab=vocabulary)


def write_plainly(name: str, folder: Path) -> Path:
    """Save the toy as ``save_pretrained`` does, and return the folder."""
    for part in build(name):
        part.save_pretrained(folder)
    return folder


def write_repository(name: str, folder: Path) -> Path:
    """Write the files of the repository, and return the folder."""
    layout, (model, tokenizer) = LAYOUTS[name], build(name)
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    _write_json(
        folder / "config.json", _as_first_written(config) if layout.is_first_format else config
    )
    _write_json(
        folder / "special_tokens_map.json",
        {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    )
    for each in ("generation_config.json", "preprocessor_config.json"):
        _write_json(folder / each, {"is_read": False, "name": each})
    for each in (".gitattributes", "README.md", "spiece.model", *layout.others):
        (folder / each).write_text(f"{each}, which is not read")
    tensors = _as_stored(model.state_dict(), layout)
    for file, shards in layout.weights:
        is_wide = "fp32" in file
        _write_weights(
            folder / file,
            {key: each.float() if is_wide else each for key, each in tensors.items()},
            shards,
        )
    return folder


def fill_cache(info: ModelInfo, folder: Path, hub: Path, revision: str | None = None) -> Path:
    """Copy a repository's folder into a Hugging Face cache, and return the snapshot."""
    root = hub / f"models--{str(info.repository).replace('/', '--')}"
    snapshot = root / "snapshots" / str(revision or info.revision)
    for place in (snapshot, root / "blobs", root / "refs"):
        place.mkdir(parents=True)
    (root / "refs" / "main").write_text(snapshot.name)
    for file in folder.iterdir():
        blob = root / "blobs" / digest(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def digest(file: Path) -> str:
    """Return what the hub's record of the file is: the SHA-256 of a large one, else git's name of its content."""
    data = file.read_bytes()
    if is_large(file.name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(_LARGE)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, default=str))


def _as_first_written(config: dict[str, Any]) -> dict[str, Any]:
    parts = {
        part: _FIRST_FORMAT | _without_news(config[part])
        for part in ("text_encoder", "audio_encoder", "decoder")
    }
    whole = {
        "architectures": config["architectures"],
        "is_encoder_decoder": True,
        "model_type": "musicgen",
    }
    return {
        "_name_or_path": "/tmp/musicgen",
        **whole,
        "torch_dtype": "float32",
        "transformers_version": None,
    } | parts


def _without_news(part: dict[str, Any]) -> dict[str, Any]:
    """Drop what transformers 4.31 did not know: the number of channels came with the stereo models."""
    is_decoder = part["model_type"] == "musicgen_decoder"
    return {
        key: value
        for key, value in part.items()
        if key != "dtype" and not (is_decoder and key == "audio_channels")
    }


def _as_stored(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    embedding = state["text_encoder.shared.weight"]
    tensors = {
        key: tensor
        for key, tensor in state.items()
        if key not in {f"text_encoder.{each}.weight" for each in _BOTH}
    }
    tensors |= {f"text_encoder.{each}.weight": embedding.clone() for each in layout.text_embedding}
    if layout.is_first_format:
        tensors["decoder.model.decoder.embed_positions.weights"] = torch.zeros(2_048, 64)
        tensors = {_former_name(key): tensor for key, tensor in tensors.items()}
    return {
        key: each.to(layout.dtype) if each.is_floating_point() else each
        for key, each in tensors.items()
    }


def _former_name(key: str) -> str:
    normalised = ".parametrizations.weight.original"
    return key.replace(f"{normalised}0", ".weight_g").replace(f"{normalised}1", ".weight_v")


def _write_weights(file: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = {}
    for number, part in enumerate(_shard_names(file, shards)):
        some = list(tensors)[number::shards]
        names |= dict.fromkeys(some, part.name)
        _write_tensors(part, {key: tensors[key].contiguous() for key in some})
    if shards > 1:
        _write_json(
            file.with_name(f"{file.name}.index.json"),
            {"metadata": {"total_size": 1}, "weight_map": names},
        )


def _write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, metadata={"format": "pt"})


def _shard_names(file: Path, shards: int) -> Iterator[Path]:
    if shards == 1:
        yield file
    else:
        yield from (
            file.with_name(f"{file.stem}-{part:05}-of-{shards:05}{file.suffix}")
            for part in range(1, shards + 1)
        )
