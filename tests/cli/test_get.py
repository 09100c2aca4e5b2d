from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import os
import pty
import subprocess
import weakref
from pathlib import Path
from typing import Any

import pytest
import soundfile

from dgx_music.client.audio_out import Saved, Saving
from dgx_music.storage.models import Batch, Generation
from tests.cli.conftest import Run, Spawn, add, opened_default
from tests.factories import audio_file
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("migrated")

DATA = audio_file(0.5)


def add_made(*prompts: str, **values: Any) -> list[str]:
    """Store completed generations whose audio is in a folder, and return their ids."""
    audio = Path("audio").absolute()
    audio.mkdir(exist_ok=True)
    ids = []
    for prompt in prompts:
        path = audio / f"{len([*audio.iterdir()])}-1.wav"
        path.write_bytes(DATA)
        told = {
            "status": "completed",
            "attempt": 1,
            "file_path": str(path),
            "file_size_bytes": len(DATA),
            "sha256": hashlib.sha256(DATA).hexdigest(),
        }
        ids += add(prompt, **told | values)
    return ids


def add_batch() -> str:
    """Store a batch, and return its id."""

    async def store() -> str:
        async with opened_default() as database, database.session() as session:
            batch = Batch(name="night")
            session.add(batch)
            await session.flush()
            return batch.id

    return asyncio.run(store())


def test_get_saves_under_the_default_name_here_and_prints_the_path(run: Run) -> None:
    (generation_id,) = add_made("lofi rain", bpm=72.4, musical_key="F#m")

    result = run("get", generation_id)

    name = f"lofi rain_F#m_72bpm_{generation_id[-8:]}.wav"
    assert (result.code, result.out, result.err) == (0, f"{name}\n", "")
    assert Path(name).read_bytes() == DATA


def test_get_takes_many_and_numbers_equal_names(run: Run) -> None:
    ids = add_made("a", "b", "b")

    result = run("get", *ids, ids[0], "--out", "takes/{title}", "--json")

    assert [Path(each["path"]).name for each in result.json["saved"]] == [
        "a.wav",
        "b.wav",
        "b-2.wav",
    ]
    assert result.json["saved"][0] == {
        "id": ids[0],
        "path": str(Path("takes/a.wav").absolute()),
        "audio_format": "wav",
        "size_bytes": len(DATA),
    }
    assert result.json["refused"] == []


def test_get_converts(run: Run) -> None:
    (generation_id,) = add_made("lofi rain", title="Rain")

    assert run("get", generation_id, "--out", "a", "--format", "flac").out == "a.flac\n"
    assert run("get", generation_id, "--out", "b.ogg").out == "b.ogg\n"

    assert soundfile.info("a.flac").format == "FLAC"
    with soundfile.SoundFile("b.ogg") as file:
        assert (file.format, file.title) == ("OGG", "Rain")


def test_get_goes_on_after_a_refusal_and_ends_with_the_first_ones_code(run: Run) -> None:
    (pending,) = add("still to come")
    (made,) = add_made("lofi rain")

    result = run("get", pending, made, "01a2021d-nope", "--out", "{title}")

    assert (result.code, result.out) == (4, "lofi rain.wav\n")
    first, second, summary = result.err.splitlines()
    assert first == f"Error: Generation {pending} is pending and has no audio yet."
    assert "There is no generation '01a2021d-nope'" in second
    assert summary == "1 of 3 saved."


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"status": "failed"}, 4, "is failed and has no audio."),
        ({"file_path": "/nowhere/song-1.wav"}, 7, "cannot be read: no such file or directory."),
        ({"sha256": "ab" * 32}, 7, "is damaged: its hash is not that of its row."),
        ({"sample_rate": 96_000}, 2, "'mp3' cannot hold 96,000 Hz"),
    ],
)
def test_get_says_in_one_line_why_there_is_no_file(
    run: Run, values: dict[str, Any], code: int, message: str
) -> None:
    (generation_id,) = add_made("lofi rain", **values)

    result = run("get", generation_id, "--out", "song.mp3", "--json")

    assert (result.code, Path("song.mp3").exists()) == (code, False)
    assert message in result.err
    assert result.err.count("\n") == 1
    assert (result.json["saved"], result.json["refused"][0]["id"]) == ([], generation_id)


def test_get_replaces_nothing_unasked(run: Run) -> None:
    (generation_id,) = add_made("lofi rain")
    Path("song.wav").write_bytes(b"precious")

    result = run("get", generation_id, "--out", "song.wav")
    assert (result.code, Path("song.wav").read_bytes()) == (2, b"precious")
    assert "which exists already" in result.err

    assert run("get", generation_id, "--out", "song.wav", "--force").code == 0
    assert Path("song.wav").read_bytes() == DATA


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--out", "{tempo}"],
            "--out has the placeholder {tempo}, which is not known; use {title}",
        ),
        (["--out", "a.flac", "--format", "mp3"], "--out ends with .flac, and the format is mp3"),
        (["--format", "aac"], "Invalid value for '--audio-format'"),
        (["--out", "-", "--json"], "--json is given, and the audio goes to stdout"),
        (["more", "--out", "-"], "--out is stdout; give one id, or a folder"),
        (["--status", "completed"], "ID comes with filters; name ids, or choose by --batch and"),
    ],
)
def test_get_refuses_at_once_what_cannot_be_done(
    run: Run, arguments: list[str], message: str
) -> None:
    (generation_id,) = add_made("lofi rain")

    result = run("get", generation_id, *arguments)

    assert (result.code, result.err.count("\n")) == (2, 1)
    assert message in result.err


@pytest.mark.parametrize("options", [[], ["--format", "flac"]])
def test_get_writes_one_to_stdout(spawn: Spawn, options: list[str]) -> None:
    (generation_id,) = add_made("lofi rain")

    process = spawn("get", generation_id, "--out", "-", *options, text=False)
    out, err = process.communicate(timeout=PATIENCE)

    assert (process.returncode, err) == (0, b"")
    assert soundfile.info(io.BytesIO(out)).frames == 16_000
    assert options or out == DATA


def test_get_writes_no_audio_to_a_terminal(spawn: Spawn) -> None:
    (generation_id,) = add_made("lofi rain")
    terminal, end = pty.openpty()

    process = spawn("get", generation_id, "--out", "-", stdout=end, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=PATIENCE)
    os.close(terminal)
    os.close(end)

    assert process.returncode == 2
    assert "--out is stdout, which is a terminal; send it to a file or to a player" in err


def test_get_shows_a_bar_on_a_terminal_and_the_paths_on_stdout(spawn: Spawn) -> None:
    ids = add_made("a", "b")
    terminal, end = pty.openpty()

    process = spawn("get", *ids, "--out", "{title}", stderr=end)
    out, _ = process.communicate(timeout=PATIENCE)
    os.close(end)
    shown = os.read(terminal, 100_000)
    os.close(terminal)

    assert out == "a.wav\nb.wav\n"
    assert b"2/2" in shown


def test_get_takes_the_filters_of_list_and_counts_what_has_no_audio(run: Run) -> None:
    batch = add_batch()
    ids = add_made("a", "b", "c", batch_id=batch)
    add("d", "e", batch_id=batch)
    add_made("of no batch")

    result = run("get", "--batch", batch[-8:], "--out", "{title}", "--json")

    assert [each["id"] for each in result.json["saved"]] == ids
    assert (result.code, result.json["without_audio"]) == (0, 2)
    assert "2 more are not completed, so they have no audio." in result.err


@pytest.mark.parametrize(
    ("wanted", "saved", "without"),
    [(["completed"], 2, 0), (["pending"], 0, 1), (["pending", "completed"], 2, 1)],
)
def test_get_takes_the_status_that_is_asked_for(
    run: Run, wanted: list[str], saved: int, without: int
) -> None:
    add_made("a", "b")
    add("c")

    result = run("get", *(f"--status={each}" for each in wanted), "--json")

    assert (len(result.json["saved"]), result.json["without_audio"]) == (saved, without)


def test_get_keeps_no_row_after_its_file_is_saved(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = add_made("a", "b", "c")
    seen: list[weakref.ref[Generation]] = []
    really = Saving.save

    async def save(self: Saving, row: Generation) -> Saved:
        gc.collect()
        assert [each() for each in seen[:-1]] == [None] * len(seen[:-1])
        seen.append(weakref.ref(row))
        return await really(self, row)

    monkeypatch.setattr(Saving, "save", save)

    assert run("get", *ids).code == 0
    assert len(seen) == 3


def test_get_says_that_nothing_fits_the_filters(run: Run) -> None:
    add_made("a")

    result = run("get", "--tenant", "label-7")

    assert (result.code, result.out, result.err) == (0, "", "There are no such generations.\n")


def test_get_without_ids_and_filters_takes_nothing(run: Run) -> None:
    add_made("a")

    result = run("get")

    assert (result.code, "ID is missing, and so are filters" in result.err) == (2, True)


def test_get_notes_that_untrained_weights_make_noise(run: Run) -> None:
    (generation_id,) = add_made("x", model_name="musicgen-tiny-untrained")

    assert "untrained weights" in run("get", generation_id).err


def test_of_a_batch_that_is_not_there_only_that_is_said(run: Run) -> None:
    result = run("get", "--batch", "nope")

    assert (result.code, result.err.splitlines()) == (
        3,
        ["Error: There is no batch 'nope'; `dgx-music batches` shows those that exist."],
    )
