from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from sqlalchemy import text

from dgx_music.cli.examination import (
    Finding,
    _examine_database,
    _examine_device,
    _examine_memory,
    _examine_model,
    exit_code_of,
)
from dgx_music.config import load_settings
from dgx_music.inference.musicgen.inventory import MemoryPlan
from dgx_music.storage import Database
from dgx_music.storage.connection.revision import SCHEMA_REVISION, VERSION_TABLE
from dgx_music.storage.trial import check_writable
from dgx_music.storage.workers import get_workers
from tests.cli.conftest import Result, Run, add
from tests.factories import SQLITE, on


def findings(result: Result) -> dict[str, tuple[str, str]]:
    return {item["subject"]: (item["verdict"], item["detail"]) for item in result.json["findings"]}


def test_doctor_finds_all_well_for_the_tone_engine(run: Run) -> None:
    add("lofi rain")

    result = run("doctor", "--engine", "tone", "--json")

    assert (result.code, result.json["is_usable"]) == (0, True)
    found = findings(result)
    assert found["database"] == (
        "ok",
        f"sqlite:///data/generations.db is at head ({SCHEMA_REVISION})",
    )
    assert found["output"][0] == "ok"
    assert "free" in found["output"][1]


def test_doctor_creates_nothing(run: Run) -> None:
    assert "does not exist yet" in run("doctor", "--engine", "tone").out
    assert not Path("data").exists()


def test_doctor_says_that_untrained_weights_make_noise(run: Run) -> None:
    pytest.importorskip("torch")

    found = findings(
        run("doctor", "--model", "musicgen-tiny-untrained", "--device", "cpu", "--json")
    )

    assert found["device"] == ("ok", "cpu, as asked for")
    assert "the audio is noise" in found["model"][1]


@pytest.mark.parametrize(
    ("wanted", "devices", "verdict", "words"),
    [
        ("cpu", ["H200"], "ok", "cpu, as asked for"),
        ("auto", ["H200", "A100"], "ok", "cuda:0, H200"),
        ("cuda:1", ["H200", "A100"], "ok", "cuda:1, A100"),
        ("auto", [], "warning", "finds no CUDA device"),
        ("cuda", [], "failed", "finds 0 CUDA devices"),
        ("cuda:1", ["H200"], "failed", "finds 1 CUDA devices"),
    ],
)
def test_doctor_looks_for_the_device_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, wanted: str, devices: list[str], verdict: str, words: str
) -> None:
    monkeypatch.setattr("dgx_music.inference.musicgen.inventory.find_cuda_devices", lambda: devices)

    finding = _examine_device(wanted)

    assert (finding.verdict, words in finding.detail) == (verdict, True)


@pytest.mark.parametrize(
    ("is_there", "problem", "verdict", "words"),
    [
        (True, "never asked", "ok", "is in the Hugging Face cache (CC-BY-NC 4.0)"),
        (False, None, "warning", "is downloaded when a worker starts; its licence is CC-BY-NC 4.0"),
        (
            False,
            "It cannot be downloaded (HF_HUB_OFFLINE is set).",
            "failed",
            "It cannot be downloaded (HF_HUB_OFFLINE is set).",
        ),
    ],
)
def test_doctor_says_whether_the_weights_are_here_or_can_be_had(
    monkeypatch: pytest.MonkeyPatch, is_there: bool, problem: str | None, verdict: str, words: str
) -> None:
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.has_weights", lambda model, revision: is_there
    )
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.find_obstacle", lambda model, revision: problem
    )

    finding = _examine_model(load_settings(model="musicgen-large"), "musicgen-large")

    assert (finding.verdict, words in finding.detail) == (verdict, True)


def test_a_model_beside_the_first_that_cannot_be_had_keeps_no_worker_from_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.has_weights", lambda model, revision: False
    )
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.find_obstacle",
        lambda model, revision: "No network.",
    )
    settings = load_settings(models="musicgen-small,musicgen-large")

    verdicts = [_examine_model(settings, name).verdict for name in settings.served_models]

    assert verdicts == ["failed", "warning"]


@pytest.mark.parametrize(
    ("failed", "code"),
    [
        ([], 0),
        (["model"], 6),
        (["device", "output"], 7),
        (["output", "database"], 5),
        (["database", "settings"], 2),
        (["answers"], 6),
    ],
)
def test_doctor_ends_with_what_a_worker_would_meet_first(failed: list[str], code: int) -> None:
    findings = [
        Finding("ok", "python", ""),
        *(Finding("failed", subject, "") for subject in failed),
    ]

    assert exit_code_of(findings) == code


def test_doctor_says_what_a_model_takes_of_the_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("DGX_MUSIC_SLOTS", "3")

    result = run("doctor", "--model", "musicgen-tiny-untrained", "--device", "cpu", "--json")

    assert " + 3 slots of " in findings(result)["memory"][1]
    figures = next(item["figures"] for item in result.json["findings"] if item["figures"])
    assert (figures["model"], figures["slot_count"]) == ("musicgen-tiny-untrained", 3)
    assert figures["free_bytes"] > figures["weights_bytes"] > 0


@pytest.mark.parametrize(
    ("free", "verdict", "words"),
    [
        (None, "ok", "1.2 GiB = 1.0 GiB weights + 0 bytes steps + 0 bytes codec + 2 slots of"),
        (None, "ok", "how much is free is not known here"),
        (2 << 30, "ok", "2.0 GiB free"),
        (1150 << 20, "warning", "1.1 GiB free: there will be fewer slots"),
        (1 << 30, "failed", "too little for one slot; use a smaller model"),
    ],
)
def test_doctor_compares_what_a_model_takes_with_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free: int | None, verdict: str, words: str
) -> None:
    plan = MemoryPlan("cpu", 1 << 30, 0, 0, 100 << 20, 2, free)
    monkeypatch.setattr("dgx_music.inference.musicgen.inventory.plan_memory", lambda _: plan)

    finding = _examine_memory(load_settings(model="musicgen-small"), "musicgen-small")

    assert (finding.verdict, words in finding.detail) == (verdict, True)


def test_doctor_goes_on_if_the_memory_of_a_model_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = Mock(side_effect=ValueError("its config.json is damaged"))
    monkeypatch.setattr("dgx_music.inference.musicgen.inventory.plan_memory", problem)

    finding = _examine_memory(load_settings(model="musicgen-small"), "musicgen-small")

    assert finding.verdict == "warning"
    assert finding.detail.startswith("not known for musicgen-small: ")


def test_doctor_tells_how_to_install_a_missing_engine(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgx_music.cli.examination.ENGINE_PACKAGES", ("torch-of-nowhere",))

    result = run("doctor", "--json")

    assert (result.code, result.json["exit_code"]) == (6, 6)
    assert findings(result)["engine"] == (
        "failed",
        "torch-of-nowhere not installed; run pip install '.[musicgen]' in a checkout of dgx-music",
    )


def test_doctor_ends_5_where_neither_the_database_nor_the_output_can_be_used(run: Run) -> None:
    Path("notes.txt").write_text("not a database, but long enough to look at" * 50)

    options = ("--database-url", "sqlite:///notes.txt", "--output", "notes.txt/x")
    result = run("doctor", "--engine", "tone", *options, "--json")

    found = findings(result)
    assert (result.code, found["database"][0], found["output"][0]) == (5, "failed", "failed")
    assert run("worker", "--engine", "tone", *options).code == 5


def test_doctor_ends_7_where_a_worker_would_for_its_output(run: Run, migrated: None) -> None:
    Path("file").write_text("no folder")

    codes = [
        run(command, "--engine", "tone", "--output", "file/audio").code
        for command in ("doctor", "worker")
    ]

    assert codes == [7, 7]


def test_doctor_ends_2_where_a_setting_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGX_MUSIC_SLOTS", "many")

    assert [run(command, "--engine", "tone").code for command in ("doctor", "worker")] == [2, 2]


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DGX_MUSIC_TONE_SPEED", "abc", "DGX_MUSIC_TONE_SPEED is 'abc'; use a number above 0."),
        (
            "DGX_MUSIC_TONE_SCRIPT",
            "/no/script.json",
            "the tone script /no/script.json cannot be read: No such file",
        ),
    ],
)
def test_a_wrong_variable_of_the_tone_engine_ends_2(
    run: Run, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)

    doctor, worker = [run(command, "--engine", "tone") for command in ("doctor", "worker")]

    assert [doctor.code, worker.code] == [2, 2]
    assert [words in doctor.out, words in worker.err, variable in worker.err] == [True, True, True]
    assert not Path("data").exists()


def test_doctor_notices_a_database_that_cannot_be_written(run: Run, migrated: None) -> None:
    # what SQLite reads as: only later versions may write here
    with Path("data/generations.db").open("r+b") as file:
        file.seek(18)
        file.write(bytes([3]))

    result = run("doctor", "--engine", "tone", "--json")

    assert (result.code, findings(result)["database"][0]) == (5, "failed")
    assert "readonly" in findings(result)["database"][1]


def test_doctor_notices_a_place_where_no_database_can_be_made(run: Run) -> None:
    Path("file").write_text("no folder")

    result = run("doctor", "--engine", "tone", "--database-url", "sqlite:///file/x.db", "--json")

    assert (result.code, findings(result)["database"][0]) == (5, "failed")
    assert "does not exist and cannot be created" in findings(result)["database"][1]


@on("asyncpg", "psycopg")
async def test_doctor_notices_a_server_that_only_reads(
    database: Database, database_url: str
) -> None:
    async with database.migrating() as engine, engine.connect() as connection:
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        name = await autocommit.scalar(text("SELECT current_database()"))
        await autocommit.execute(
            text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        )

    finding = await _examine_database(Database(database_url))

    assert (finding.verdict, "read-only" in finding.detail) == ("failed", True)


async def test_what_doctor_tries_leaves_nothing_behind(database: Database) -> None:
    await check_writable(database)

    async with database.session(read_only=True) as session:
        assert await get_workers(session) == []


@pytest.mark.parametrize(("revision", "verdict"), [("9999", "failed"), ("0003", "warning")])
@on(SQLITE)
async def test_doctor_tells_a_newer_schema_from_an_older_one(
    database: Database, revision: str, verdict: str
) -> None:
    async with database.session() as session:
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'"))

    finding = await _examine_database(database)

    assert (finding.verdict, "upgrade dgx-music" in finding.detail) == (
        verdict,
        verdict == "failed",
    )


def test_files_that_are_gone_are_counted_and_shown(run: Run, migrated: None, place: Path) -> None:
    (place / "there.wav").write_text("music")
    ids = [
        add("x", status="completed", file_path=str(place / f"{name}.wav"))[0]
        for name in ("there", "gone")
    ]
    add("x", status="completed", file_path="relative/to/nobody/knows.wav")
    add("x", status="failed", file_path=str(place / "gone.wav"))

    result = run("doctor", "--engine", "tone", "--files", "--json")

    assert (result.code, findings(result)["files"][0]) == (0, "warning")
    assert findings(result)["files"][1].startswith("1 of 3 are missing")
    assert [run("show", one, "--json").json["file_is_missing"] for one in ids] == [False, True]
    assert ["missing:" in run("show", one).out for one in ids] == [False, True]


def test_files_of_another_size_are_counted_and_shown(run: Run, migrated: None, place: Path) -> None:
    for name, content in {"whole": b"music", "cut": b"mus", "empty": b""}.items():
        (place / f"{name}.wav").write_bytes(content)
    (place / "folder.wav").mkdir()
    names = ("whole", "cut", "empty", "folder")
    ids = [
        add("x", status="completed", file_size_bytes=5, file_path=str(place / f"{name}.wav"))[0]
        for name in names
    ]

    assert findings(run("doctor", "--engine", "tone", "--files", "--json"))["files"] == (
        "warning",
        f"3 of 4 are damaged, such as {place / 'cut.wav'}",
    )
    assert [run("show", one, "--json").json["file_is_damaged"] for one in ids] == [
        False,
        True,
        True,
        True,
    ]
    assert [run("show", one, "--json").json["file_is_missing"] for one in ids] == [False] * 4
    assert "file is 3 bytes and not 5" in run("show", ids[1]).out


def test_no_file_is_missing_where_there_is_none(run: Run, migrated: None) -> None:
    (waiting,) = add("x")

    assert run("show", waiting, "--json").json["file_is_missing"] is None
    assert findings(run("doctor", "--engine", "tone", "--files", "--json"))["files"] == (
        "ok",
        "none of 0 is missing or damaged",
    )


def test_an_output_folder_that_is_gone_is_said_not_to_exist(run: Run, migrated: None) -> None:
    assert (
        "data/audio does not exist yet"
        in findings(run("doctor", "--engine", "tone", "--json"))["output"][1]
    )


def test_doctor_does_not_download_what_is_to_be_verified(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.has_weights", lambda model, revision: False
    )
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.find_obstacle", lambda model, revision: None
    )

    found = findings(run("doctor", "--device", "cpu", "--verify", "--json"))

    assert found["answers"] == (
        "warning",
        "not compared: the weights of musicgen-small are not on this machine",
    )


def test_doctor_looks_into_a_local_folder(run: Run, place: Path) -> None:
    pytest.importorskip("torch")

    result = run("doctor", "--model", place, "--device", "cpu", "--json")

    assert result.code == 6
    assert findings(result)["model"] == (
        "failed",
        f"{place} holds no complete weights; save the model there with save_pretrained",
    )


def test_doctor_notices_a_local_folder_of_junk(run: Run, place: Path) -> None:
    pytest.importorskip("torch")
    (place / "config.json").write_text("{}")
    (place / "model.safetensors").write_text("junk")

    result = run("doctor", "--model", place, "--device", "cpu", "--json")

    problem = f"{place} cannot be loaded: config.json is not that of a MusicGen model"
    assert result.code == 6
    assert findings(result)["model"] == (
        "failed",
        f"{problem}; save the model there with save_pretrained",
    )


@pytest.mark.parametrize(
    ("models", "verdict"),
    [("musicgen-large", "failed"), ("musicgen-small,musicgen-large", "warning")],
)
def test_doctor_notices_damage_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, models: str, verdict: str
) -> None:
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.has_weights", lambda model, revision: True
    )
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.inventory.find_damage_of", lambda model, revision: "it is bad"
    )

    finding = _examine_model(load_settings(models=models), "musicgen-large")

    assert (
        finding.verdict,
        "in the Hugging Face cache cannot be loaded: it is bad" in finding.detail,
    ) == (
        verdict,
        True,
    )


def test_doctor_prints_a_table_and_a_verdict(run: Run) -> None:
    result = run("doctor", "--engine", "tone")

    assert result.out.startswith("CHECK")
    assert "A worker can run here." in result.err


def test_a_file_system_without_links_is_a_warning(
    run: Run, migrated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    result = run("doctor", "--engine", "tone", "--json")
    (output,) = [finding for finding in result.json["findings"] if finding["subject"] == "output"]
    assert (result.code, output["verdict"]) == (0, "warning")
    assert "has no hard links" in output["detail"]


def test_a_format_that_cannot_be_written_here_is_a_wrong_setting(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soundfile.available_formats", lambda: {"FLAC": ""})
    monkeypatch.setenv("DGX_MUSIC_AUDIO_FORMAT", "mp3")

    result = run("doctor", "--engine", "tone")

    assert result.code == 2
    assert "DGX_MUSIC_AUDIO_FORMAT is mp3, which this machine's libsndfile cannot" in result.out
