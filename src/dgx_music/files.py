"""Making files and folders: who may read them, and how they outlive a crash.

Only the owner may read them, unless ``DGX_MUSIC_FILE_ACCESS`` says otherwise. The umask can only
take rights away, and folders that exist already keep theirs. If a file system cannot flush or has
no hard links, the functions do without and say so.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

_CANNOT_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_CANNOT_FLUSH_FOLDER = _CANNOT_FLUSH | {
    errno.EBADF,
    errno.EISDIR,
    errno.ENOTTY,
    errno.EACCES,
    errno.EPERM,
}
"""Errors of a file system that cannot flush, or of a folder that may not be read.

A broken disk gives other errors.
"""
_NOT_OF_LINKS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE}


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


def flush(descriptor: int) -> bool:
    """Flush the file to disk, so that it survives a power cut.

    Returns ``False`` if its file system cannot do that.
    """
    return _flush(descriptor, _CANNOT_FLUSH)


def flush_folder(folder: Path) -> bool:
    """Flush the folder to disk, so that the names in it survive a power cut.

    Returns ``False`` if its file system cannot do that.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        return _cannot(error, _CANNOT_FLUSH_FOLDER)
    try:
        return _flush(descriptor, _CANNOT_FLUSH_FOLDER)
    finally:
        os.close(descriptor)


def give_name(part: Path, target: Path, *, is_private: bool) -> bool:
    """Give a whole file its name; return ``False`` if the file system has no hard links.

    Without hard links a crash can leave an empty file. Raises ``FileExistsError`` if another file
    has the name, which then stays as it is. The part file may be left over. File systems refuse
    links with many different errors, even with those of a broken disk; so any error that clearly
    has another reason is raised, and every other one counts as a refusal.
    """
    try:
        os.link(part, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno in _NOT_OF_LINKS or not part.exists():  # somebody has deleted it
            raise
        _claim_and_rename(part, target, is_private=is_private)
        return False
    return True


def _claim_and_rename(part: Path, target: Path, *, is_private: bool) -> None:
    """Move without hard links (exFAT, some network shares): the exclusive empty file is what makes the rename safe.

    The name goes from empty to whole in one step; a crash between the two leaves an empty file.
    """
    create_file(target, is_private=is_private)
    try:
        part.replace(target)
    except OSError:
        target.unlink()
        raise


def _flush(descriptor: int, refusals: set[int]) -> bool:
    try:
        os.fsync(descriptor)
    except OSError as error:
        return _cannot(error, refusals)
    return True


def _cannot(error: OSError, refusals: set[int]) -> bool:
    """Return ``False`` for a refusal, and raise every other error."""
    if error.errno not in refusals:
        raise error
    return False
