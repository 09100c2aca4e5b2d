from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import pytest
import soundfile

from dgx_music.artifacts import LocalArtifacts
from dgx_music.cli import listen
from tests.cli.conftest import Run, Spawn, Work, add
from tests.cli.test_get import DATA, add_batch, add_made
from tests.cli.test_play import install, players  # noqa: F401

pytestmark = pytest.mark.usefixtures("migrated")

PCM = soundfile.read(io.BytesIO(DATA), dtype="int16")[0].tobytes()


def test_watch_writes_what_is_heard_to_a_wav_file(run: Run) -> None:
    (generation_id,) = add_made("lofi rain", duration_seconds=0.5)

    result = run("watch", generation_id, "--out", "heard.wav")

    assert (result.code, result.out) == (0, "")
    assert soundfile.read("heard.wav", dtype="int16")[0].tobytes() == PCM


def test_watch_writes_what_is_heard_to_stdout(spawn: Spawn) -> None:
    (generation_id,) = add_made("lofi rain", duration_seconds=0.5)
    out: Any = spawn("watch", generation_id, "--out", "-", text=False).communicate()[0]
    assert soundfile.read(io.BytesIO(out), dtype="int16")[0].tobytes() == PCM


@pytest.mark.parametrize("name", ["ffplay", "mpv", "aplay"])
def test_watch_plays_what_is_heard(run: Run, players: Path, name: str) -> None:  # noqa: F811
    program = players / name
    program.write_text("#!/bin/sh\n/bin/cat > played\n")
    program.chmod(0o700)
    (generation_id,) = add_made("lofi rain", duration_seconds=0.5)

    assert run("watch", generation_id, "--play").code == 0
    assert Path("played").read_bytes().endswith(PCM)


def test_without_a_player_for_streams_watch_says_so(run: Run, players: Path) -> None:  # noqa: F811
    install(players, "afplay")
    (generation_id,) = add_made("lofi rain")
    result = run("watch", generation_id, "--play")
    assert result.code == 1
    assert "ffplay, mpv or aplay is needed" in result.err


def test_watch_hears_a_generation_that_has_just_begun(
    run: Run, work: Work, tone: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGX_MUSIC_OUTPUT", "audio")
    (generation_id,) = add("lofi rain", duration_seconds=0.5, model_name="musicgen-small")
    asyncio.run(LocalArtifacts(Path("audio")).publish_preview(generation_id, 1, 0, b"\0\0" * 800))
    work()

    result = run("watch", generation_id, "--out", "heard.wav", "--timeout", 30)

    assert result.code == 0
    assert soundfile.info("heard.wav").frames == 16_000


def test_a_file_begins_again_with_the_next_attempt() -> None:
    async def write() -> None:
        async with listen.opened_sink("heard.wav") as sink:
            await sink.begin(b"header")
            await sink.write(b"first attempt")
            await sink.begin(b"header")
            await sink.write(b"second")

    asyncio.run(write())
    assert Path("heard.wav").read_bytes() == b"headersecond"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--out", "x.wav", "--play"), "--play is given beside --out; leave one of them out."),
        (("--out", "-", "--json"), "--json is given, and the audio goes to stdout; leave it out."),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    run: Run, options: tuple[str, ...], told: str
) -> None:
    result = run("watch", "any", *options)
    assert (result.code, told in result.err) == (2, True)


def test_a_file_that_is_there_is_left_alone(run: Run) -> None:
    (generation_id,) = add_made("lofi rain")
    Path("mine.wav").write_bytes(b"mine")
    result = run("watch", generation_id, "--out", "mine.wav")
    assert (result.code, Path("mine.wav").read_bytes()) == (2, b"mine")
    assert "exists already; choose another name." in result.err


def test_a_batch_cannot_be_heard(run: Run) -> None:
    result = run("watch", add_batch(), "--out", "x.wav")
    assert result.code == 2
    assert "name one generation to hear it" in result.err


@pytest.mark.parametrize("values", [{}, {"status": "failed", "error_message": "no memory"}])
def test_where_nothing_was_heard_no_file_is_left(run: Run, values: dict[str, str]) -> None:
    (generation_id,) = add("lofi rain", **values)
    result = run("watch", generation_id, "--out", "heard.wav", "--timeout", 0.1)
    assert result.code != 0
    assert not Path("heard.wav").exists()
