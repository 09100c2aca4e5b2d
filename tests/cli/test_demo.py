from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dgx_music.cli.demo import PROMPTS, find_problems
from dgx_music.storage import Generation
from tests.cli.conftest import Run


def test_the_demo_makes_and_checks_audio_and_does_so_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", "sqlite:///mine.db")

    result = run("demo", "--engine", "tone")

    assert (result.code, "All is well" in result.err) == (0, True)
    assert all(prompt in result.out for prompt in PROMPTS)
    assert run("demo", "--engine", "tone").code == 0
    assert len(list(Path("demo/audio").glob("*.wav"))) == 2 * len(PROMPTS)
    assert not Path("mine.db").exists()
    assert [path for path in Path("demo").rglob("*") if path.stat().st_mode & 0o077] == []


def test_a_generation_that_fails_ends_the_demo_with_1(run: Run, tone: Callable[..., None]) -> None:
    tone({"prompt": "rain", "do": "reject", "message": "no water"})

    result = run("demo", "--engine", "tone")

    assert result.code == 1
    assert "is failed: no water" in result.err


def test_a_worker_that_cannot_start_ends_the_demo_and_shows_its_log(
    run: Run, tone: Callable[..., None]
) -> None:
    Path("demo").mkdir()
    Path("demo/audio").write_text("a file")

    result = run("demo", "--engine", "tone")

    assert result.code == 7
    assert "Audio cannot be stored" in result.err
    assert "worker.log" in result.err


def test_the_demo_says_what_to_install_where_torch_is_missing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)

    result = run("demo")

    assert (result.code, "run pip install '.[musicgen]' in a checkout" in result.err) == (6, True)
    assert not Path("demo").exists()


def test_the_demo_finds_a_file_that_is_not_as_its_row_says(place: Path) -> None:
    soundfile.write("made.wav", np.zeros(800), 8_000)
    row = Generation(
        status="completed",
        file_path="made.wav",
        file_size_bytes=1,
        sha256="ab",
        duration_seconds=9.0,
    )

    problems = find_problems(row)

    assert [
        word
        for word, problem in zip(("bytes", "hash", "lasts"), problems, strict=True)
        if word not in problem
    ] == []
    assert find_problems(Generation(status="completed", file_path="gone.wav")) == [
        "The file gone.wav is not there."
    ]
