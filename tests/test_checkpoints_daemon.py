"""Real workers with the hub's repositories at tiny size: from a filled cache, and with nothing to be had."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dgx_music.catalog import MODELS
from dgx_music.storage.database import Database
from tests.daemons import Daemon, add, rows_of

pytest.importorskip("torch")

from tests.inference.fake_hub import FakeHub
from tests.inference.repositories import fill_cache, write_repository

LARGE = MODELS["musicgen-large"]
Start = Callable[..., Daemon]


@pytest.fixture
async def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    """A migrated database where the daemons look for it; their Hugging Face cache is ``tmp_path / "hub"``."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    await database.migrate()
    yield database
    await database.dispose()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Returns a worker of musicgen-large that ends when its queue is empty."""
    daemons: list[Daemon] = []

    def start_daemon(**settings: Any) -> Daemon:
        fixed = {
            "engine": "musicgen",
            "model": LARGE.name,
            "device": "cpu",
            "slots": 1,
            "kernels": "off",
        }
        calm = {"lease_seconds": 30, "heartbeat_seconds": 2}
        daemons.append(Daemon(tmp_path, "--drain", **(fixed | calm | settings)))
        return daemons[-1]

    yield start_daemon
    for daemon in daemons:
        daemon.close()


def sentence_of(daemon: Daemon) -> str:
    """Return the one line that a worker ends with, exit code 6; beside it, it has only said that it stopped."""
    assert daemon.wait() == 6
    stopped, sentence = daemon.said().splitlines()
    assert stopped.endswith("stopped")
    return sentence


async def test_pickled_shards_in_the_cache_make_music_offline(
    database: Database, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fill_cache(LARGE, write_repository(LARGE.name, tmp_path / "large"), tmp_path / "hub")
    generation = await add(database, model=LARGE.name)
    daemon = start()
    assert daemon.wait() == 0, daemon.said()
    row = (await rows_of(database))[generation.id]
    assert (row.status, row.model_version) == ("completed", LARGE.revision)


@pytest.mark.usefixtures("database")
def test_offline_without_weights_a_worker_ends_with_one_sentence(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    sentence = sentence_of(start())
    assert "facebook/musicgen-large" in sentence
    assert "Connection refused" in sentence


@pytest.mark.usefixtures("database")
def test_a_pin_that_the_hub_does_not_know_ends_a_worker_with_the_settings_name(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_repository(LARGE.name, tmp_path / "large")
    with FakeHub(str(LARGE.repository), "f" * 40, folder) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        sentence = sentence_of(start())
    assert "DGX_MUSIC_REVISION" in sentence
    assert str(LARGE.revision) in sentence
