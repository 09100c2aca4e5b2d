"""The server keeps to its OpenAPI description, whatever a client sends.

Schemathesis makes the requests from the description. Two kinds of routes are left out: streams of events, whose
description is one text, and those that answer with the bytes of new audio. A client of either would wait for its end.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dgx_music.storage.database import Database
from dgx_music.web import create_app
from tests.factories import MODEL, add_generation
from tests.postgres import PostgresServer
from tests.web.test_server import Server

SETTINGS = hypothesis.settings(
    max_examples=15,  # for each operation: all take about 20 s of CPU time on each database
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
WAITING = r"/(events|music|music/stream|sound-generation|audio/generate)$"
SCHEMA = schemathesis.openapi.from_dict(create_app().openapi()).exclude(path_regex=WAITING)
OPERATIONS = {each.ok().label: each.ok() for each in SCHEMA.get_all_operations()}
STATUSES = ("pending", "completed", "failed", "cancelled")


class Place:
    """A server, and ids: of generations of each status, and one of none."""

    def __init__(self, server: Server, ids: list[str]) -> None:
        self.ids = ids
        self.address = server.address
        self.session = requests.Session()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated database of each kind, for all operations."""
    if request.param == "sqlite":
        path = tmp_path_factory.mktemp("contract") / "test.db"
        shutil.copy(request.getfixturevalue("migrated_file"), path)
        yield f"sqlite:///{path}"
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    name = f"contract_{secrets.token_hex(4)}"
    yield server.create_database(name, template=request.getfixturevalue("migrated_template"))
    server.drop_database(name)


@pytest.fixture(scope="module")
def place(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("audio")
    settings = {"DGX_MUSIC_DATABASE_URL": url, "DGX_MUSIC_OUTPUT": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-m", "dgx_music.cli", "web", "--port", "0"],
        env={**os.environ, **settings},
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        place = Place(Server(process), asyncio.run(fill(url)))
        yield place
        place.session.close()
        process.send_signal(signal.SIGTERM)


async def fill(url: str) -> list[str]:
    database = Database(url)
    async with database.session() as session:
        rows = [await add_generation(session, status=status) for status in STATUSES * 8]
        rows.append(await add_generation(session, worker_id="worker-1", model_name=MODEL))
    await database.dispose()
    return [*(row.id for row in rows), "unknown"]


@pytest.mark.parametrize("label", OPERATIONS)
def test_the_answers_are_those_that_the_description_promises(place: Place, label: str) -> None:
    operation = OPERATIONS[label]
    good, bad = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

    @SETTINGS
    @hypothesis.given(case=good | bad, generation_id=strategies.sampled_from(place.ids))
    def check(case: schemathesis.Case, generation_id: str) -> None:
        if "generation_id" in case.path_parameters:
            case.path_parameters["generation_id"] = generation_id
        case.call_and_validate(place.address, place.session, checks=CHECKS)

    check()
