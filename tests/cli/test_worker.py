from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile

from dgx_music.cli.audio_copy import _removed_on_failure, copy_audio
from dgx_music.config import QUEUE_SETTINGS, SETTINGS
from dgx_music.errors import ArtifactError
from tests.cli.conftest import Run, Spawn, Work, add
from tests.factories import audio_file, made_of
from tests.patience import PATIENCE

pytestmark = pytest.mark.usefixtures("migrated")

Tone = Callable[..., None]


def wait_until_says(process: subprocess.Popen[str], words: str) -> None:
    assert process.stderr is not None
    assert any(words in line for line in process.stderr)


def test_every_setting_of_a_worker_is_an_option(run: Run) -> None:
    text = run("worker", "--help").out

    missing = {name for name in SETTINGS if f"--{name.replace('_', '-')[:20]}" not in text}
    assert missing == {*QUEUE_SETTINGS}


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--slots", "0", "DGX_MUSIC_SLOTS"),
        ("--device", "gpu", "DGX_MUSIC_DEVICE"),
        ("--model", "musicgen-huge", "DGX_MUSIC_MODEL"),
        ("--lease-seconds", "nan", "DGX_MUSIC_LEASE_SECONDS"),
        ("--heartbeat-seconds", "29", "DGX_MUSIC_HEARTBEAT_SECONDS"),
        ("--audio-format", "aiff", "--audio-format"),
        ("--slots", "many", "DGX_MUSIC_SLOTS"),
        ("--log-level", "loud", "--log-level"),
    ],
)
def test_a_wrong_setting_ends_2_and_is_named(run: Run, option: str, value: str, name: str) -> None:
    result = run("worker", option, value)

    assert (result.code, result.err.count("\n")) == (2, 1)
    assert name in result.err


def test_an_output_folder_that_cannot_be_written_ends_7(run: Run, tone: Tone) -> None:
    Path("taken").write_text("a file")

    assert run("worker", "--drain", "--output", "taken/audio").code == 7


def test_a_model_that_cannot_be_loaded_ends_6(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgx_music.worker.live_engine._ENGINE_STARTS", 1)
    # only the engine finds it
    monkeypatch.setattr("dgx_music.worker.daemon.tone.check_environment", lambda: None)
    monkeypatch.setenv("DGX_MUSIC_TONE_SPEED", "slow")

    result = run("worker", "--drain", "--engine", "tone")

    assert (result.code, "DGX_MUSIC_TONE_SPEED" in result.err) == (6, True)


def test_a_drained_queue_ends_0_and_the_rows_tell_the_truth(run: Run, tone: Tone) -> None:
    generation_id = run("enqueue", "lofi rain", "--duration", 2).out.strip()

    assert run("worker", "--drain").code == 0

    shown = run("show", generation_id, "--json").json
    assert (shown["status"], [attempt["outcome"] for attempt in shown["attempts"]]) == (
        "completed",
        ["completed"],
    )
    assert soundfile.info(shown["file_path"]).duration == 2.0
    assert "█" in run("show", generation_id).out or "▃" in run("show", generation_id).out


@pytest.mark.parametrize(("access", "mode"), [("owner", 0o600), ("umask", 0o644)])
def test_the_files_of_a_worker_are_for_whom_the_setting_says(
    run: Run, tone: Tone, access: str, mode: int
) -> None:
    add("rain")
    before = os.umask(0o022)
    try:
        run("worker", "--drain", "--file-access", access)
    finally:
        os.umask(before)

    (file,) = Path("data/audio").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize(("access", "mode"), [("owner", 0o600), ("umask", 0o666)])
def test_a_copy_is_for_whom_the_setting_says(
    tmp_path: Path, monkeypatch, access: str, mode: int
) -> None:
    monkeypatch.setenv("DGX_MUSIC_FILE_ACCESS", access)
    made = made_of(b"audio", tmp_path / "song-1.wav")
    before = os.umask(0)
    try:
        copy_audio(made, tmp_path / "rain.wav", force=False)
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "rain.wav").stat().st_mode) == mode


def test_a_worker_is_listed_and_a_sigterm_ends_it_with_0(
    run: Run, spawn: Spawn, tone: Tone
) -> None:
    process = spawn("worker")
    wait_until_says(process, "serves")

    listed = run("workers", "--json").json
    assert [(row["pid"], row["is_alive"]) for row in listed] == [(process.pid, True)]
    assert "alive" in run("workers").out

    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    (ended,) = run("workers", "--json").json
    assert (ended["state"], ended["is_alive"], ended["end_reason"]) == (
        "ended",
        False,
        "it was stopped",
    )


def test_enqueue_waits_for_a_real_worker_and_copies_the_audio(
    run: Run, work: Work, tone: Tone
) -> None:
    work()

    result = run("enqueue", "lofi rain", "--duration", 1, "--out", "rain.wav", "--json")

    assert (result.code, result.json["status"]) == (0, "completed")
    assert Path("rain.wav").read_bytes() == Path(result.json["file_path"]).read_bytes()
    assert "Copied to rain.wav" in result.err


def test_waiting_for_a_file_ends_1_where_one_of_its_generations_failed(
    run: Run, work: Work, tone: Tone
) -> None:
    tone({"prompt": "storm", "do": "reject", "message": "no thunder today"})
    Path("prompts.txt").write_text("".join(f"rain {number}\n" for number in range(10)) + "storm\n")
    work("--slots", 4)

    result = run("enqueue", "--file", "prompts.txt", "--duration", 0.1, "--wait")

    assert (result.code, len(result.out.split())) == (1, 11)
    assert "no thunder today" in result.err
    assert "10 of 11 completed." in result.err


@pytest.mark.parametrize("name", ["rain.OGG", "rain.mp3", "rain.flac"])
def test_the_suffix_of_a_copy_converts_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    copy_audio(made_of(audio_file(0.5)), Path(name), force=False)

    assert soundfile.info(name).format == Path(name).suffix[1:].upper()
    assert capsys.readouterr().err == f"Converted to {name}.\n"


def test_a_copy_without_the_suffix_of_a_format_is_as_it_is_stored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy_audio(made_of(b"audio"), Path("rain.bin"), force=False)

    assert Path("rain.bin").read_bytes() == b"audio"
    assert "Note: rain.bin holds WAV audio, as it is stored." in capsys.readouterr().err


def test_damaged_audio_is_not_copied() -> None:
    made = made_of(b"audio")
    Path("made-1.wav").write_bytes(b"audIo")

    with pytest.raises(ArtifactError, match="damaged"):
        copy_audio(made, Path("rain.wav"), force=False)

    assert not Path("rain.wav").exists()


def test_an_audio_file_that_appears_meanwhile_is_not_overwritten() -> None:
    Path("rain.wav").write_text("mine")

    with pytest.raises(ArtifactError, match="file exists"):
        copy_audio(made_of(b"music"), Path("rain.wav"), force=False)

    assert Path("rain.wav").read_text() == "mine"


def test_audio_that_is_on_another_machine_is_said_to_be_missing() -> None:
    made = made_of(b"music")
    Path("made-1.wav").unlink()

    with pytest.raises(ArtifactError, match="no such file"):
        copy_audio(made, Path("rain.wav"), force=False)


def test_music_starts_with_the_clip_that_it_continues(run: Run, tone: Tone) -> None:
    Path("clip.flac").write_bytes(audio_file(0.5, kind="FLAC"))
    generation_id = run(
        "enqueue", "", "--continuation", "clip.flac", "--duration", 1.25
    ).out.strip()

    assert run("worker", "--drain", "--loudness", "none").code == 0

    made, rate = soundfile.read(
        run("show", generation_id, "--json").json["file_path"], dtype="int16"
    )
    given, _ = soundfile.read("clip.flac", dtype="int16")
    assert (len(made), rate) == (40_000, 32_000)
    assert abs(made[:16_000].astype(int) - given).max() <= 1


def test_a_copy_that_fails_removes_files_and_nothing_else(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name in ("pipe", "file"):
        with pytest.raises(OSError, match="full"), _removed_on_failure(tmp_path / name):
            raise OSError("full")

    assert [(tmp_path / name).exists() for name in ("pipe", "file")] == [True, False]
