"""Whether downloaded files still are what the hub has: its cache names each file by the digest of its content.

A file is read once: its size, times and place on the disk are remembered, and while they are the same it is believed.
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
    """Raise ``EngineUnavailableError`` for a file of the Hugging Face cache whose content is not what the hub recorded.

    Of files that are elsewhere, the hub's record is not known, and they are not read.
    """
    known = _read_notes()
    fresh = {
        str(blob): stamp for blob in map(_blob_of, files) if blob and known.get(str(blob)) != (stamp := _stamp(blob))
    }
    for blob in map(Path, fresh):
        if not _is_as_recorded(blob):
            raise EngineUnavailableError(
                f"{blob} is damaged: its content is not what the hub's record, its name, says; delete it, and it is "
                "downloaded again."
            )
    if fresh:
        _write_notes({name: stamp for name, stamp in known.items() if Path(name).exists()} | fresh)


def _blob_of(file: Path) -> Path | None:
    """Return the cache's file that a snapshot's file is a link to; ``None`` where it is none."""
    target = file.resolve()
    is_named_by_digest = _SHA256.fullmatch(target.name) or _GIT.fullmatch(target.name)
    return target if target.parent.name == "blobs" and is_named_by_digest else None


def _is_as_recorded(blob: Path) -> bool:
    """Compare a large file's SHA-256, or a small one's SHA-1: as git counts it, or plain, as some mirrors name files."""
    with blob.open("rb") as content:
        if _SHA256.fullmatch(blob.name):
            return hashlib.file_digest(content, "sha256").hexdigest() == blob.name
        data = content.read()
    return blob.name in {_sha1(b"blob %d\0" % len(data) + data), _sha1(data)}


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _stamp(file: Path) -> list[int]:
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
    """Replace what is remembered; where that cannot be written, every start reads the files again."""
    place = _notes_file()
    with suppress(OSError), NamedTemporaryFile("w", dir=place.parent, prefix=place.stem, delete=False) as part:
        json.dump(notes, part)
        part.flush()
        Path(part.name).replace(place)
