"""Checks that downloaded files are what the hub has: its cache names each file by its digest.

A file is read once. Its size, times and place on the disk are noted; while they stay the same, it
is not read again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from dgx_music.errors import EngineUnavailableError

_SHA256 = re.compile("[0-9a-f]{64}")
_GIT = re.compile("[0-9a-f]{40}")


def check_integrity(files: Iterable[Path]) -> None:
    """Raise ``EngineUnavailableError`` if a file of the Hugging Face cache is damaged.

    Files elsewhere are not read, because nothing says what the hub has recorded of them.
    """
    known = _read_notes()
    stamps = {str(blob): _stamp(blob) for blob in map(_blob_of, files) if blob}
    fresh = {name: stamp for name, stamp in stamps.items() if known.get(name) != stamp}
    for blob in map(Path, fresh):
        if not _is_as_recorded(blob):
            raise EngineUnavailableError(
                f"{blob} is damaged: its content is not what the hub's record, its name, says; "
                "delete it, and it is downloaded again."
            )
    if fresh:
        _write_notes({name: stamp for name, stamp in known.items() if Path(name).exists()} | fresh)


def _blob_of(file: Path) -> Path | None:
    """Return the cache's file to which a snapshot's file links; ``None`` for any other file."""
    target = file.resolve()
    is_named_by_digest = _SHA256.fullmatch(target.name) or _GIT.fullmatch(target.name)
    return target if target.parent.name == "blobs" and is_named_by_digest else None


def _is_as_recorded(blob: Path) -> bool:
    """Return whether the file's name is its digest.

    That is SHA-256 for a large file. For a small one it is SHA-1, as git computes it, or of the
    content alone, as some mirrors do.
    """
    with blob.open("rb") as content:
        if _SHA256.fullmatch(blob.name):
            return hashlib.file_digest(content, "sha256").hexdigest() == blob.name
        data = content.read()
    return blob.name in {_sha1(b"blob %d\0" % len(data) + data), _sha1(data)}


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _stamp(file: Path) -> list[int]:
    """Return what changes if the file is replaced or written to."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino]


def _notes_file() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "dgx-music-checked.json"


def _read_notes() -> dict[str, list[int]]:
    try:
        notes = json.loads(_notes_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}


def _write_notes(notes: dict[str, list[int]]) -> None:
    """Replace the notes. If that fails, the next start reads the files again."""
    target = _notes_file()
    with (
        suppress(OSError),
        NamedTemporaryFile("w", dir=target.parent, prefix=target.stem, delete=False) as part,
    ):
        json.dump(notes, part)
        part.flush()
        Path(part.name).replace(target)
