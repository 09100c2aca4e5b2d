"""A model's files, on this machine or on the Hugging Face hub: which ones are loaded.

Safetensors are preferred to pickled tensors (``pytorch_model.bin``). Both may be one file or shards
with an index. Other copies of the weights, such as ``model.fp32.safetensors`` or audiocraft's
``state_dict.bin``, are neither downloaded nor read. Needs no torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from dgx_music.catalog import ModelInfo
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.hub import HubUnavailableError, RevisionUnknownError, list_files
from dgx_music.inference.integrity import check_integrity

logger = logging.getLogger(__name__)

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The file of the weights, or the index of their shards: the first of these that is complete."""
NO_WEIGHTS = f"it holds none of {', '.join(WEIGHTS)} with all its files"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZERS = ("tokenizer.json", "spiece.model", _TOKENIZER_CONFIG)
_WITHOUT_VOCABULARY = "ByT5Tokenizer"
"""The only kind of tokenizer that needs no more than its configuration: its tokens are bytes."""
_MODEL_TYPES = ("musicgen", "musicgen_melody")
_LONGEST_HEADER_BYTES = 100_000_000
"""The limit of a safetensors file; the library for such files refuses longer headers too."""
_SMALL = (".json", ".model")


def find_weights(folder: Path) -> list[Path]:
    """Return the files that hold the folder's weights; empty if any of them is missing."""
    for name in WEIGHTS:
        files = _with_shards(folder / name)
        if files and all(file.is_file() for file in files):
            return files
    return []


def find_damage(folder: Path) -> str | None:
    """Return why the folder's model cannot be loaded, as a part of a sentence; ``None`` if it can.

    Reads only what is small: the configuration, the tokenizer's, and how the weights' files begin.
    """
    try:
        _check_small_files(folder)
        files = find_weights(folder)
        if not files:
            return NO_WEIGHTS
        for file in files:
            _check_weights(file)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return f"{Path(error.filename or folder).name} cannot be read ({reason})"
    except ValueError as error:
        return str(error)
    return None


def list_small_files(folder: Path) -> list[Path]:
    """Return the folder's configuration, tokenizer and indexes."""
    return sorted(file for file in folder.iterdir() if file.suffix in _SMALL and file.is_file())


def find_folder(info: ModelInfo, revision: str | None) -> Path | None:
    """Return the model's folder, its own or in the Hugging Face cache; ``None`` if incomplete."""
    if info.repository is not None:
        return find_snapshot(info.repository, revision_of(info, revision))
    folder = Path(info.name)
    return folder if find_weights(folder) else None


def find_snapshot(repository: str, revision: str) -> Path | None:
    """Return the revision's folder in the Hugging Face cache; ``None`` if a file is missing.

    The folder's name is the commit.
    """
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            repository, revision=revision, allow_patterns=["config.json"], local_files_only=True
        )
    except OSError:
        return None
    folder = Path(found)
    has_config = (folder / "config.json").is_file()
    has_tokenizer = any((folder / name).is_file() for name in _TOKENIZERS)
    return folder if has_config and has_tokenizer and find_weights(folder) else None


def obtain(info: ModelInfo, revision: str | None) -> Path:
    """Return the folder with the model's files; download them if they are missing.

    Raises ``EngineUnavailableError`` if the hub lacks them or does not answer within 3 s.
    """
    if info.repository is None:
        return Path(info.name)
    revision = revision_of(info, revision)
    found = find_snapshot(info.repository, revision)
    return found or _download(info.repository, revision, licence_of(info))


def check_obtainable(info: ModelInfo, revision: str | None) -> None:
    """Raise what ``obtain`` would raise before it downloads; download nothing."""
    if info.repository is not None:
        revision = revision_of(info, revision)
        if find_snapshot(info.repository, revision) is None:
            _choose_files(info.repository, revision)


def revision_of(info: ModelInfo, revision: str | None) -> str:
    """Return the revision of the repository to use: the setting's, else the pinned one."""
    return revision or info.revision or "main"


def licence_of(info: ModelInfo) -> str:
    """Return what a user must know of the licence, as a part of a sentence."""
    return f"the weights of {info.name} are licensed {info.licence}: no commercial use"


def _check_small_files(folder: Path) -> None:
    if _read_object(folder / "config.json").get("model_type") not in _MODEL_TYPES:
        raise ValueError("config.json is not that of a MusicGen model")
    tokenizers = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not tokenizers:
        raise ValueError(f"it holds no tokenizer, none of {', '.join(_TOKENIZERS)}")
    read = {file.name: _read_object(file) for file in tokenizers if file.suffix == ".json"}
    if [file.name for file in tokenizers] == [_TOKENIZER_CONFIG]:
        kind = str(read[_TOKENIZER_CONFIG].get("tokenizer_class"))
        if not kind.startswith(_WITHOUT_VOCABULARY):
            raise ValueError("its tokenizer has no vocabulary")


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises ``OSError`` if the file cannot be read, and ``ValueError`` if it holds anything else.
    """
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return found


def _check_weights(file: Path) -> None:
    if file.suffix == ".safetensors":
        if not _has_whole_header(file):
            raise ValueError(f"{file.name} is cut short, damaged, or no file of safetensors")
    elif not (is_zipfile(file) or _begins_as_pickle(file)):
        raise ValueError(f"{file.name} is cut short, damaged, or was not written by torch.save")


def _has_whole_header(file: Path) -> bool:
    """Return whether the header is readable and its tensors fill the rest of the file."""
    size_bytes = file.stat().st_size
    with file.open("rb") as content:
        header_bytes = int.from_bytes(content.read(8), "little")
        rest_bytes = size_bytes - 8 - header_bytes
        if rest_bytes <= 0 or header_bytes > _LONGEST_HEADER_BYTES:
            return False
        header = content.read(header_bytes)
    try:
        entries = json.loads(header).items()
        spans = [entry["data_offsets"] for name, entry in entries if name != "__metadata__"]
        are_in_order = all(0 <= start <= end for start, end in spans)
        return are_in_order and max(end for _, end in spans) == rest_bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _begins_as_pickle(file: Path) -> bool:
    """Return whether the file begins as older versions of torch write it."""
    with file.open("rb") as content:
        mark = content.read(2)
    return mark[:1] == b"\x80" and mark[1:] in (b"\2", b"\3", b"\4", b"\5")


def _with_shards(file: Path) -> list[Path]:
    """Return the file itself, or the shards that an index names; empty if it cannot be read."""
    if file.suffix != ".json":
        return [file]
    try:
        names = set(json.loads(file.read_bytes())["weight_map"].values())
        return sorted(file.with_name(name) for name in names)  # refuses names with a slash
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _download(repository: str, revision: str, licence: str) -> Path:
    """Download the small files and then the weights; return their folder.

    In this order, weights in the cache always have the other files beside them.
    """
    from huggingface_hub import snapshot_download

    small, first = _choose_files(repository, revision)
    logger.warning(
        "Before the first download: %s (https://huggingface.co/%s).", licence, repository
    )
    with _explaining_failures(repository, revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
        check_integrity(list_small_files(folder))
        files = small + [file.name for file in _with_shards(folder / first)]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files))


def _choose_files(repository: str, revision: str) -> tuple[list[str], str]:
    """Return the names of the small files on the hub, and the one of ``WEIGHTS`` to use."""
    with _explaining_failures(repository, revision):
        names = list_files(repository, revision)
        first = next((name for name in WEIGHTS if name in names), None)
        if first is None:
            raise HubUnavailableError(f"the hub has none of {', '.join(WEIGHTS)}")
    return [name for name in names if name.endswith(_SMALL) and "/" not in name], first


@contextmanager
def _explaining_failures(repository: str, revision: str) -> Iterator[None]:
    """Turn every exception into ``EngineUnavailableError`` with the reason and the remedies."""
    try:
        yield
    except EngineUnavailableError:
        raise
    except RevisionUnknownError as error:
        raise EngineUnavailableError(
            f"The hub has no revision {revision} of {repository}; set DGX_MUSIC_REVISION to one of "
            f"https://huggingface.co/{repository}/commits/main."
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise EngineUnavailableError(
            f"The model {repository} (revision {revision}) is not on this machine and cannot be "
            f"downloaded ({reason}); connect to the internet once, or point DGX_MUSIC_MODEL at a "
            "local folder, or use musicgen-tiny-untrained."
        ) from error
