from __future__ import annotations

import io
from hashlib import sha256
from pathlib import Path

import pytest
import soundfile

from tests.cli.conftest import Run, add
from tests.cli.test_get import DATA, add_made

pytestmark = pytest.mark.usefixtures("migrated")


@pytest.fixture
def players(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which programs are looked for; it is empty."""
    folder = place / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(players: Path, name: str, code: int = 0) -> None:
    """Make a player that copies its file to ``played`` and its options to ``options``."""
    program = players / name
    program.write_text(
        '#!/bin/sh\nfor last; do :; done\n/bin/cat "$last" > played\n'
        f'echo "$*" > options\nexit {code}\n'
    )
    program.chmod(0o700)


@pytest.mark.parametrize("name", ["ffplay", "mpv", "aplay", "afplay"])
def test_show_plays_through_the_player_that_is_there(run: Run, players: Path, name: str) -> None:
    install(players, name)
    (generation_id,) = add_made("lofi rain")

    result = run("show", generation_id, "--play")

    assert (result.code, result.err) == (0, "")
    assert generation_id in result.out
    assert Path("played").read_bytes() == DATA
    assert not Path(Path("options").read_text().split()[-1]).exists()


def test_aplay_gets_a_wav_file_of_any_format(run: Run, players: Path) -> None:
    install(players, "aplay")
    flac = io.BytesIO()
    soundfile.write(flac, soundfile.read(io.BytesIO(DATA))[0], 32_000, format="FLAC")
    Path("song-1.flac").write_bytes(flac.getvalue())
    file = {"file_path": str(Path("song-1.flac").absolute())}
    (generation_id,) = add_made("x", sha256=sha256(flac.getvalue()).hexdigest(), **file)

    assert run("show", generation_id, "--play").code == 0
    assert soundfile.info("played").format == "WAV"


def test_without_a_player_show_says_so(run: Run, players: Path) -> None:
    (generation_id,) = add_made("lofi rain")

    result = run("show", generation_id, "--play")

    assert result.code == 1
    assert result.err == "Error: No player is installed: ffplay, mpv, aplay or afplay is needed.\n"


def test_a_player_that_fails_is_named(run: Run, players: Path) -> None:
    install(players, "mpv", code=2)
    (generation_id,) = add_made("lofi rain")

    result = run("show", generation_id, "--play")

    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "mpv could not play" in result.err


def test_what_is_not_completed_cannot_be_played(run: Run, players: Path) -> None:
    install(players, "mpv")
    (generation_id,) = add("lofi rain")

    result = run("show", generation_id, "--play")

    assert (result.code, "is pending and has no audio yet." in result.err) == (4, True)
