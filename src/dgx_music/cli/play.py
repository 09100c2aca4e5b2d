"""Playing a generation through whichever player is installed."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dgx_music.cli.output import fail

if TYPE_CHECKING:
    from dgx_music.storage import Generation

PLAYERS = {
    "ffplay": ("-nodisp", "-autoexit", "-loglevel", "error"),
    "mpv": ("--no-video", "--really-quiet"),
    "aplay": ("--quiet",),
    "afplay": (),
}
"""Each player's options, in the order in which they are looked for."""
_NONE = "No player is installed: ffplay, mpv, aplay or afplay is needed."


def play(row: Generation) -> None:
    """Play the audio of a completed row to its end; without a player, say so and end with 1.

    Raises what ``save_audio`` raises.
    """
    from dgx_music.client.audio_out import Saving
    from dgx_music.client.content import path_of

    path_of(row)
    name = next((name for name in PLAYERS if shutil.which(name)), None)
    if name is None:
        raise typer.Exit(fail(_NONE, 1))
    with tempfile.TemporaryDirectory(prefix="dgx-music-") as folder:
        # aplay knows no other format
        saving = Saving(Path(folder) / "audio", audio_format="wav" if name == "aplay" else None)
        saved = asyncio.run(saving.save(row))
        command = [name, *PLAYERS[name], str(saved.path)]
        code = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode  # noqa: S603 - no shell
    if code != 0:
        raise typer.Exit(fail(f"{name} could not play {row.file_path}; it ended with {code}.", 1))
