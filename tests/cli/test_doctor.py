from __future__ import annotations

from pathlib import Path

import pytest

from dgx_music.cli.doctor import _examine_device, _examine_model
from dgx_music.config import load_settings
from dgx_music.storage.schema import SCHEMA_REVISION
from tests.cli.conftest import Result, Run, add


def findings(result: Result) -> dict[str, tuple[str, str]]:
    return {item["subject"]: (item["verdict"], item["detail"]) for item in result.json["findings"]}


def test_doctor_finds_all_well_for_the_tone_engine(run: Run) -> None:
    add("lofi rain")

    result = run("doctor", "--engine", "tone", "--json")

    assert (result.code, result.json["is_usable"]) == (0, True)
    found = findings(result)
    assert found["database"] == ("ok", f"sqlite:///data/generations.db is at head ({SCHEMA_REVISION})")
    assert found["output"][0] == "ok"
    assert "free" in found["output"][1]


def test_doctor_creates_nothing(run: Run) -> None:
    assert "does not exist yet" in run("doctor", "--engine", "tone").out
    assert not Path("data").exists()


def test_doctor_says_that_untrained_weights_make_noise(run: Run) -> None:
    pytest.importorskip("torch")

    found = findings(run("doctor", "--model", "musicgen-tiny-untrained", "--device", "cpu", "--json"))

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
    monkeypatch.setattr("dgx_music.inference.inventory.find_cuda_devices", lambda: devices)

    finding = _examine_device(wanted)

    assert (finding.verdict, words in finding.detail) == (verdict, True)


@pytest.mark.parametrize(("is_there", "verdict"), [(True, "ok"), (False, "warning")])
def test_doctor_says_whether_the_weights_are_here_and_their_licence(
    monkeypatch: pytest.MonkeyPatch, is_there: bool, verdict: str
) -> None:
    monkeypatch.setattr("dgx_music.inference.inventory.has_weights", lambda repository, revision: is_there)

    finding = _examine_model(load_settings(), "musicgen-large")

    assert (finding.verdict, "CC-BY-NC" in finding.detail) == (verdict, True)


def test_doctor_tells_how_to_install_a_missing_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgx_music.cli.doctor.ENGINE_PACKAGES", ("torch-of-nowhere",))

    result = run("doctor", "--json")

    assert result.code == 1
    assert findings(result)["engine"] == (
        "failed",
        "torch-of-nowhere not installed; pip install 'dgx-music[musicgen]'",
    )


def test_doctor_ends_1_where_the_database_or_the_output_cannot_be_used(run: Run) -> None:
    Path("notes.txt").write_text("not a database, but long enough to look at" * 50)

    result = run(
        "doctor", "--engine", "tone", "--database-url", "sqlite:///notes.txt", "--output", "notes.txt/x", "--json"
    )

    found = findings(result)
    assert (result.code, found["database"][0], found["output"][0]) == (1, "failed", "failed")


def test_doctor_looks_into_a_local_folder(run: Run, place: Path) -> None:
    pytest.importorskip("torch")

    result = run("doctor", "--model", place, "--device", "cpu", "--json")

    assert findings(result)["model"] == (
        "failed",
        f"{place} holds no complete weights; save the model there with save_pretrained",
    )


def test_doctor_prints_a_table_and_a_verdict(run: Run) -> None:
    result = run("doctor", "--engine", "tone")

    assert result.out.startswith("CHECK")
    assert "A worker can run here." in result.err
