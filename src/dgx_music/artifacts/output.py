"""The place for audio that a setting, or a row's path, names."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dgx_music.artifacts.interface import Artifacts
from dgx_music.artifacts.local import LocalArtifacts
from dgx_music.config import PREFIX, parse_output
from dgx_music.errors import ConfigurationError, how_to_install


def open_output(output: str | Path, *, is_private: bool = True) -> Artifacts:
    """Return the place for audio that ``output`` names, as ``DGX_MUSIC_OUTPUT`` does.

    That is a folder, or a bucket and a prefix in an object store. A new folder is for its owner
    alone if ``is_private``. This does not look at the place yet: see ``Artifacts.find_problem``.
    Raises ``ConfigurationError`` for any other URL, and if the package for object stores is not
    installed.
    """
    place = parse_output(output)
    if isinstance(place, Path):
        return LocalArtifacts(place, is_private=is_private)
    if find_spec("obstore") is None:
        raise ConfigurationError(
            f"{PREFIX}OUTPUT",
            f"is {place}, for which obstore is not installed",
            how_to_install("s3"),
        )
    from dgx_music.artifacts.objects import ObjectArtifacts

    return ObjectArtifacts(place)


def open_place_of(path: str) -> Artifacts:
    """Return the place of a file, by the path in its row; raises what ``open_output`` raises."""
    if "://" in path:
        return open_output(path.rpartition("/")[0])
    return LocalArtifacts(Path(path).absolute().parent)
