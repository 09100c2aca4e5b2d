from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dgx_music.catalog import MODELS
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference import checkpoint, hub
from dgx_music.inference.musicgen import inventory
from tests.inference.fake_hub import FakeHub
from tests.inference.repositories import LAYOUTS, write_repository

MEDIUM = MODELS["musicgen-medium"]
Serve = Callable[..., FakeHub]


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, and no hub yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    use("http://127.0.0.1:9", monkeypatch)
    return tmp_path / "hub"


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Returns a hub that has a model's repository, from then on the one that is asked."""
    hubs = []

    def start(name: str, commit: str | None = None) -> FakeHub:
        info = MODELS[name]
        folder = write_repository(name, tmp_path / name)
        hubs.append(FakeHub(str(info.repository), commit or str(info.revision), folder))
        use(hubs[-1].url, monkeypatch)
        return hubs[-1]

    yield start
    for each in hubs:
        each.__exit__()


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_files_that_are_loaded_are_downloaded(name: str, serve: Serve) -> None:
    fake = serve(name)
    folder = checkpoint.obtain(MODELS[name], None)
    weights = [file for file in fake.taken if file.endswith((".bin", ".safetensors"))]
    assert sorted(weights) == sorted(file.name for file in checkpoint.find_weights(folder))
    assert set(fake.taken) - set(weights) == {
        file.name for file in checkpoint.list_small_files(folder)
    }
    assert folder.name == MODELS[name].revision


def test_what_is_there_is_not_asked_for_again(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    fake = serve(MEDIUM.name)
    with caplog.at_level(logging.WARNING, "dgx_music"):
        checkpoint.obtain(MEDIUM, None)
    assert "CC-BY-NC 4.0" in caplog.text
    fake.requests.clear()
    checkpoint.check_obtainable(MEDIUM, None)
    checkpoint.obtain(MEDIUM, None)
    assert fake.requests == []


def test_a_damaged_file_that_was_deleted_is_downloaded_again(serve: Serve) -> None:
    serve(MEDIUM.name)
    weights = checkpoint.find_weights(checkpoint.obtain(MEDIUM, None))[0]
    content = weights.read_bytes()
    weights.resolve().unlink()
    assert checkpoint.find_weights(checkpoint.obtain(MEDIUM, None))[0].read_bytes() == content


@pytest.mark.parametrize("ask", [checkpoint.obtain, checkpoint.check_obtainable])
@pytest.mark.parametrize("revision", [None, "no-such-branch"])
def test_a_revision_that_the_hub_does_not_know_is_told_with_the_setting(
    ask: Callable[..., object], revision: str | None, serve: Serve
) -> None:
    fake = serve(MEDIUM.name, commit="f" * 40)
    with pytest.raises(EngineUnavailableError) as caught:
        ask(MEDIUM, revision)
    message = str(caught.value)
    assert all(
        part in message
        for part in ("DGX_MUSIC_REVISION", revision or str(MEDIUM.revision), "commits/main")
    )
    assert "\n" not in message
    assert len(fake.requests) == 1
    assert "has no revision no-such-branch" in str(
        inventory.find_obstacle(MEDIUM, "no-such-branch")
    )


def test_a_repository_without_weights_is_refused_before_the_download(serve: Serve) -> None:
    fake = serve(MEDIUM.name)
    (fake.folder / "pytorch_model.bin").unlink()
    assert "the hub has none of model.safetensors" in str(inventory.find_obstacle(MEDIUM, None))
    with pytest.raises(EngineUnavailableError, match=r"none of model\.safetensors"):
        checkpoint.obtain(MEDIUM, None)
    assert fake.taken == []


def test_a_repository_that_is_not_there_is_told(serve: Serve) -> None:
    serve(MEDIUM.name)
    assert "(the hub answers 404)" in str(
        inventory.find_obstacle(replace(MEDIUM, repository="facebook/absent"), None)
    )


def test_a_login_page_is_not_the_hub(serve: Serve) -> None:
    fake = serve(MEDIUM.name)
    fake.is_login_page = True
    assert "(what answers is not the hub)" in str(inventory.find_obstacle(MEDIUM, None))


def test_files_that_can_be_had_are(serve: Serve) -> None:
    serve(MEDIUM.name)
    assert inventory.find_obstacle(MEDIUM, None) is None


def test_a_hub_that_cannot_be_reached_is_asked_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(EngineUnavailableError, match="Connection refused") as caught:
        checkpoint.obtain(MEDIUM, None)
    assert "\n" not in str(caught.value)
    assert caplog.text == ""


def test_what_cannot_be_had_is_told_before_torch_is_imported() -> None:
    program = (
        "import sys\n"
        "from dgx_music.inference.residents import EngineSettings, EngineUnavailableError, load_engine\n"
        "try: load_engine(EngineSettings(engine='musicgen', model='musicgen-small'))\n"
        "except EngineUnavailableError as error: print('torch' in sys.modules, error)\n"
    )
    command = [sys.executable, "-c", program]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": "/absent"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.startswith("False The model facebook/musicgen-small")
    assert "HF_HUB_OFFLINE is set" in said.stdout


def test_a_machine_that_is_told_to_be_offline_asks_nobody(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = serve(MEDIUM.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "(HF_HUB_OFFLINE is set)" in str(inventory.find_obstacle(MEDIUM, None))
    assert fake.requests == []


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        problem = inventory.find_obstacle(MEDIUM, None)
    assert "(the hub does not answer within 0.2 s)" in str(problem)


def test_names_that_are_resolved_for_ever_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.05)
    resolver, never = socket.socketpair()
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_arguments, **_options: resolver.recv(1)
    )
    with resolver, never:
        problem = inventory.find_obstacle(MEDIUM, None)
    assert "(the hub does not answer within 0.05 s)" in str(problem)
