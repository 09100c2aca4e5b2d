"""Who may read what is made here: the owner alone, unless ``DGX_MUSIC_FILE_ACCESS`` says otherwise.

The umask can only take away from these modes. Folders that exist already keep theirs.
"""

from __future__ import annotations

import os
from pathlib import Path


def file_mode(*, is_private: bool) -> int:
    """Return the mode to create a file with."""
    return 0o600 if is_private else 0o666


def make_folders(folder: Path, *, is_private: bool) -> list[Path]:
    """Make the folder and those above it if they are missing.

    Returns the folders that it made, the uppermost first.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    for path in missing:
        path.mkdir(0o700 if is_private else 0o777, exist_ok=True)
    return missing


def create_file(file: Path, *, is_private: bool) -> None:
    """Make an empty file; raises ``FileExistsError`` if there is one, which it leaves alone."""
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file_mode(is_private=is_private)))
