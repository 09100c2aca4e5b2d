"""Who may read what is made here: prompts and music are their owner's, unless ``DGX_MUSIC_FILE_ACCESS`` says otherwise.

The umask can only take away from these modes, and what was there before keeps its own.
"""

from __future__ import annotations

import os
from pathlib import Path


def file_mode(*, is_private: bool) -> int:
    """Return the mode to create a file with."""
    return 0o600 if is_private else 0o666


def make_folders(folder: Path, *, is_private: bool) -> list[Path]:
    """Make the folder and those above it, where they are missing, and return those that were, the uppermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    for path in missing:
        path.mkdir(0o700 if is_private else 0o777, exist_ok=True)
    return missing


def create_file(file: Path, *, is_private: bool) -> None:
    """Make an empty file where there is none; raises ``FileExistsError`` where there is one, and does not open that."""
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file_mode(is_private=is_private)))
