"""Where finished audio is kept: one file per generation and attempt, whole or not there at all."""

from dgx_music.artifacts.interface import EXTENSIONS, Artifact, Artifacts, StoredFile
from dgx_music.artifacts.local import LocalArtifacts
from dgx_music.artifacts.memory import MemoryArtifacts
from dgx_music.artifacts.missing import FileInspection, FileState, look_at_file
from dgx_music.artifacts.output import open_output, open_place_of

__all__ = [
    "EXTENSIONS",
    "Artifact",
    "Artifacts",
    "FileInspection",
    "FileState",
    "LocalArtifacts",
    "MemoryArtifacts",
    "StoredFile",
    "look_at_file",
    "open_output",
    "open_place_of",
]
