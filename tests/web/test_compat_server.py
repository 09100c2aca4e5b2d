"""The packages of other services against a real server with a real worker, as programs use them."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import replicate
from elevenlabs.client import ElevenLabs

from tests.factories import ROOT, audio_file
from tests.patience import PATIENCE
from tests.web.test_server import Server, token

SECTION = re.compile(r"^## Clients of other services\n(.*?)^## ", re.DOTALL | re.MULTILINE)
SNIPPET = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def variables(migrated_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated_file, folder / "test.db")
    return {
        **{name: each for name, each in os.environ.items() if not name.startswith("DGX_MUSIC_")},
        "DGX_MUSIC_DATABASE_URL": f"sqlite:///{folder / 'test.db'}",
        "DGX_MUSIC_OUTPUT": str(folder / "audio"),
        "DGX_MUSIC_ENGINE": "tone",
        "DGX_MUSIC_HEARTBEAT_SECONDS": "0.1",
        "DGX_MUSIC_POLL_SECONDS": "0.2",
        "DGX_MUSIC_GRACE_SECONDS": "2",
    }


@pytest.fixture(scope="module")
def secret(variables: dict[str, str]) -> str:
    return token(variables)


@pytest.fixture(scope="module")
def server(variables: dict[str, str], secret: str) -> Iterator[Server]:
    """A server with a worker, for all tests of this module."""
    command = [sys.executable, "-m", "dgx_music.cli", "web", "--port", "0", "--with-worker"]
    command += ["--requests-per-second", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    running = Server(process)
    assert running.address
    yield running
    assert running.end() == 0
    process.communicate()


@pytest.fixture
def client(
    server: Server, secret: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[replicate.Client]:
    """A client of Replicate whose address and token are in the environment only."""
    monkeypatch.setenv("REPLICATE_BASE_URL", server.address)
    monkeypatch.setenv("REPLICATE_API_TOKEN", secret)
    client = replicate.Client()
    with client._client:
        yield client


def get(server: Server, secret: str, path: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {secret}"}
    return httpx.get(server.address + path, headers=headers, timeout=PATIENCE)


def test_a_program_for_replicate_runs_unchanged(client: replicate.Client, tmp_path: Path) -> None:
    (tmp_path / "riff.wav").write_bytes(audio_file(1.0))

    with (tmp_path / "riff.wav").open("rb") as riff:
        output = client.run(
            "meta/musicgen:671ac645ce5e552cc63a54a2bbff63fcf798043055d2dac5fc9e36a837eedcfb",
            input={
                "prompt": "lofi rain",
                "duration": 2,
                "input_audio": riff,
                "continuation": True,
                "top_p": 0,
                "seed": -1,
                "output_format": "mp3",
            },
        )

    assert output.read().startswith(b"ID3")


def test_a_prediction_is_made_looked_at_and_cancelled(client: replicate.Client) -> None:
    made = client.predictions.create("meta/musicgen", {"prompt": "a", "duration": 1})
    never = client.models.predictions.create(
        "meta/musicgen", {"prompt": "b", "model_version": "large"}, wait=1
    )
    made.wait()
    status = never.status
    never.cancel()

    assert (made.status, made.progress.percentage) == ("succeeded", 1.0)
    assert (status, never.status) == ("starting", "canceled")
    assert {made.id, never.id} <= {each.id for each in client.predictions.list()}


def test_a_program_for_elevenlabs_gets_an_mp3(server: Server, secret: str) -> None:
    with httpx.Client(timeout=PATIENCE) as http:
        client = ElevenLabs(base_url=server.address, api_key=secret, httpx_client=http)

        audio = b"".join(client.music.compose(prompt="lofi rain", music_length_ms=4_000))

    assert audio.startswith(b"ID3")
    assert len(audio) == pytest.approx(4 * 128_000 / 8, rel=0.1)


def test_a_client_that_hangs_up_leaves_its_generation(server: Server, secret: str) -> None:
    body = b'{"input": "a client that hangs up", "model": "musicgen-large"}'
    place = urlsplit(server.address)
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(
            b"POST /v1/audio/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nxi-api-key: "
            + secret.encode()
            + b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body
        )
        while not (rows := get(server, secret, "/v1/generations?q=hangs").json()["generations"]):
            pass

    row = get(server, secret, rows[0]["urls"]["self"]).json()
    assert (row["status"], row["prompt"]) == ("pending", "a client that hangs up")


def snippets() -> list[tuple[str, str]]:
    section = SECTION.search((ROOT / "docs/web.md").read_text())
    assert section
    return SNIPPET.findall(section[1])


@pytest.mark.parametrize(("kind", "code"), snippets())
def test_the_examples_of_the_documents_run(
    server: Server, secret: str, tmp_path: Path, kind: str, code: str
) -> None:
    code = code.replace("http://127.0.0.1:8321", server.address).replace("dgx_…", secret)
    if kind == "console":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        given = f"-H 'xi-api-key: {secret}' "
        command = ["bash", "-c", code.removeprefix("$ ").replace("curl ", f"curl {given}", 1)]
    else:
        command = [sys.executable, "-c", code]

    subprocess.run(command, cwd=tmp_path, check=True, timeout=PATIENCE)

    (made,) = tmp_path.iterdir()
    assert made.read_bytes()[:3] == {"wav": b"RIF", "mp3": b"ID3"}[made.suffix[1:]]
