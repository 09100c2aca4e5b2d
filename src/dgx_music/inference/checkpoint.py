"""A model's files: which of them are loaded, on this machine or on the Hugging Face hub. Needs no torch.

Safetensors come first, then pickled tensors (``pytorch_model.bin``), each as one file or as shards with an index; other
copies of the weights, such as ``model.fp32.safetensors`` or audiocraft's ``state_dict.bin``, are neither downloaded nor read.
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

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The files that weights begin with, the one to prefer first."""
NO_WEIGHTS = f"it holds none of {', '.join(WEIGHTS)} with all its files"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZERS = ("tokenizer.json", "spiece.model", _TOKENIZER_CONFIG)
_WITHOUT_VOCABULARY = "ByT5Tokenizer"
"""The one kind of tokenizer that needs no more than its configuration: it counts bytes."""
_MODEL_TYPES = ("musicgen", "musicgen_melody")
_LONGEST_HEADER_BYTES = 100_000_000
"""Of a file of safetensors; its own library reads no longer one."""
_SMALL = (".json", ".model")


def find_weights(folder: Path) -> list[Path]:
    """Return the files that hold the folder's weights; empty where there are none, or not all of them."""
    for name in WEIGHTS:
        files = _with_shards(folder / name)
        if files and all(file.is_file() for file in files):
            return files
    return []


def find_damage(folder: Path) -> str | None:
    """Return in half a sentence why the folder's model cannot be loaded, or ``None``; no weights are read.

    Only what costs nothing is looked at: the configuration, whether there is a tokenizer, and how the weights' files begin.
    """
    try:
        _check_small_files(folder)
        files = find_weights(folder)
        if not files:
            return NO_WEIGHTS
        for file in files:
            _check_weights(file)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({(error.strerror or str(error)).lower()})"
    except ValueError as error:
        return str(error)
    return None


def list_small_files(folder: Path) -> list[Path]:
    """Return the folder's configuration, tokenizer and indexes."""
    return sorted(file for file in folder.iterdir() if file.suffix in _SMALL and file.is_file())


def find_folder(info: ModelInfo, revision: str | None) -> Path | None:
    """Return the model's folder on this machine, its own or one of the Hugging Face cache; ``None`` without weights."""
    if info.repository is not None:
        return find_snapshot(info.repository, revision_of(info, revision))
    folder = Path(info.name)
    return folder if find_weights(folder) else None


def find_snapshot(repository: str, revision: str) -> Path | None:
    """Return the folder, named for its commit, of the Hugging Face cache; ``None`` where it is not there or not complete."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=["config.json"], local_files_only=True)
    except OSError:
        return None
    folder = Path(found)
    has_the_rest = (folder / "config.json").is_file() and any((folder / name).is_file() for name in _TOKENIZERS)
    return folder if has_the_rest and find_weights(folder) else None


def obtain(info: ModelInfo, revision: str | None) -> Path:
    """Return the folder with the model's files, downloaded if need be.

    Raises ``EngineUnavailableError`` where the hub does not have them or does not answer within 3 s.
    """
    if info.repository is None:
        return Path(info.name)
    revision = revision_of(info, revision)
    return find_snapshot(info.repository, revision) or _download(info.repository, revision, licence_of(info))


def check_obtainable(info: ModelInfo, revision: str | None) -> None:
    """Raise what ``obtain`` would raise at once, and download nothing."""
    if info.repository is not None:
        revision = revision_of(info, revision)
        if find_snapshot(info.repository, revision) is None:
            _choose_files(info.repository, revision)


def revision_of(info: ModelInfo, revision: str | None) -> str:
    """Return which revision of the repository is meant: the one that is set, else the pinned one."""
    return revision or info.revision or "main"


def licence_of(info: ModelInfo) -> str:
    """Return what a user must know of the licence."""
    return f"the weights of {info.name} are licensed {info.licence}: no commercial use"


def _check_small_files(folder: Path) -> None:
    if _read_object(folder / "config.json").get("model_type") not in _MODEL_TYPES:
        raise ValueError("config.json is not that of a MusicGen model")
    tokenizers = [folder / name for name in _TOKENIZERS if (folder / name).is_file()]
    if not tokenizers:
        raise ValueError(f"it holds no tokenizer, none of {', '.join(_TOKENIZERS)}")
    told = {file.name: _read_object(file) for file in tokenizers if file.suffix == ".json"}
    if [file.name for file in tokenizers] == [_TOKENIZER_CONFIG]:
        kind = str(told[_TOKENIZER_CONFIG].get("tokenizer_class"))
        if not kind.startswith(_WITHOUT_VOCABULARY):
            raise ValueError("its tokenizer has no vocabulary")


def _read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raises ``ValueError`` that says which file is none, and ``OSError``."""
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
    """Return whether the header can be read, and names tensors that fill the rest of the file."""
    size_bytes = file.stat().st_size
    with file.open("rb") as content:
        header_bytes = int.from_bytes(content.read(8), "little")
        rest_bytes = size_bytes - 8 - header_bytes
        if rest_bytes <= 0 or header_bytes > _LONGEST_HEADER_BYTES:
            return False
        header = content.read(header_bytes)
    try:
        tensors = {name: tensor for name, tensor in json.loads(header).items() if name != "__metadata__"}
        spans = [tensor["data_offsets"] for tensor in tensors.values()]
        return all(0 <= start <= end for start, end in spans) and max(end for _, end in spans) == rest_bytes
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _begins_as_pickle(file: Path) -> bool:
    """Return whether the file begins as older versions of torch wrote it."""
    with file.open("rb") as content:
        mark = content.read(2)
    return mark[:1] == b"\x80" and mark[1:] in (b"\2", b"\3", b"\4", b"\5")


def _with_shards(file: Path) -> list[Path]:
    """Return the file itself, or the shards that an index names; empty where it cannot be read."""
    if file.suffix != ".json":
        return [file]
    try:
        names = set(json.loads(file.read_bytes())["weight_map"].values())
        return sorted(file.with_name(name) for name in names)  # refuses names with a slash
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _download(repository: str, revision: str, licence: str) -> Path:
    """Download the small files, then the weights, which are never there alone; return their folder."""
    from huggingface_hub import snapshot_download

    small, first = _choose_files(repository, revision)
    logger.warning("Before the first download: %s (https://huggingface.co/%s).", licence, repository)
    with _telling_why(repository, revision):
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=small))
        check_integrity(list_small_files(folder))
        weights = [file.name for file in _with_shards(folder / first)]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[*small, *weights]))


def _choose_files(repository: str, revision: str) -> tuple[list[str], str]:
    """Return the names of the small files on the hub, and of the file that the weights begin with."""
    with _telling_why(repository, revision):
        names = list_files(repository, revision)
        first = next((name for name in WEIGHTS if name in names), None)
        if first is None:
            raise HubUnavailableError(f"the hub has none of {', '.join(WEIGHTS)}")
    return [name for name in names if name.endswith(_SMALL) and "/" not in name], first


@contextmanager
def _telling_why(repository: str, revision: str) -> Iterator[None]:
    """Turn whatever goes wrong into ``EngineUnavailableError``, with the reason and the remedies."""
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
            f"The model {repository} (revision {revision}) is not on this machine and cannot be downloaded "
            f"({reason}); connect to the internet once, or point DGX_MUSIC_MODEL at a local folder, "
            "or use musicgen-tiny-untrained."
        ) from error
