from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dgx_music.inference.process import EngineProcess
from dgx_music.inference.tone import SCRIPT_VARIABLE, SPEED_VARIABLE
from tests.inference.factories import make_process

WriteScript = Callable[..., Path]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteScript:
    """Replaces the tone engine's script, at any time; empty to begin with."""
    path = tmp_path / "script.json"

    def write(*rules: dict[str, object]) -> Path:
        path.with_suffix(".part").write_text(json.dumps(rules))
        return path.with_suffix(".part").replace(path)

    monkeypatch.setenv(SCRIPT_VARIABLE, str(write()))
    monkeypatch.delenv(SPEED_VARIABLE, raising=False)
    return write


@pytest.fixture
async def process(script: WriteScript) -> AsyncIterator[EngineProcess]:
    """A loaded tone engine with four slots and the script of this test."""
    async with make_process() as process:
        await process.start()
        yield process
