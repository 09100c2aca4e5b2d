"""Models, prompts, counts, workers, pauses, health."""

from __future__ import annotations

import pytest

from dgx_music.catalog import MODELS
from dgx_music.storage.workers import register_worker
from tests.factories import SQLITE, on
from tests.storage.test_migrations import DESCRIBED

pytestmark = pytest.mark.any_driver


async def test_the_models_say_whether_they_are_served_and_paused(client, default_database):
    async with default_database.session() as session:
        await register_worker(session, **DESCRIBED)
    await client.post("/v1/pause", json={"model": "musicgen-large"})

    models = {each["name"]: each for each in (await client.get("/v1/models")).json()["models"]}

    assert [*models] == [*MODELS]
    assert [name for name, each in models.items() if each["is_served"]] == ["musicgen-small"]
    assert [name for name, each in models.items() if each["is_paused"]] == ["musicgen-large"]
    assert [name for name, each in models.items() if each["is_default"]] == ["musicgen-small"]


async def test_prompts_and_counts(client):
    for prompt in ("lofi rain", "lofi rain", "trap beat"):
        await client.post("/v1/generations", json={"prompt": prompt})

    prompts = (await client.get("/v1/prompts?limit=1")).json()["prompts"]
    counts = (await client.get("/v1/stats")).json()

    assert [(each["text"], each["used_count"]) for each in prompts] == [("lofi rain", 2)]
    assert (counts["pending_generations"], counts["total_prompts"]) == (3, 2)


@pytest.mark.parametrize(("role", "is_seen"), [("read", False), ("operate", True)])
async def test_only_operators_see_where_workers_run(holding, default_database, role, is_seen):
    async with default_database.session() as session:
        await register_worker(session, **DESCRIBED)

    (worker,) = (await (await holding(role)).get("/v1/workers")).json()["workers"]

    assert (worker["model_name"], worker["is_alive"]) == ("musicgen-small", True)
    assert [name in worker for name in ("id", "host", "pid")] == [is_seen] * 3


async def test_everything_is_paused_and_resumed(client):
    paused = await client.post("/v1/pause")
    resumed = await client.post("/v1/resume", json={})

    assert [each["model_name"] for each in paused.json()["pauses"]] == ["*"]
    assert resumed.json() == {"pauses": []}


@on(SQLITE)
@pytest.mark.parametrize("body", [{"model": "x"}, {"colour": "red"}, {"model": 7}])
async def test_a_wrong_pause_is_a_problem(client, body):
    assert (await client.post("/v1/pause", json=body)).status_code == 422


async def test_a_healthy_process_is_ready(client):
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ok"}


async def test_an_older_schema_is_not_ready(client, default_database):
    async with default_database.session() as session:
        from sqlalchemy import text

        await session.execute(text("UPDATE dgx_music_alembic_version SET version_num = '0001'"))

    answer = await client.get("/readyz")

    assert answer.status_code == 503
    assert answer.json()["reasons"][0].startswith("schema: it is at revision 0001")


@on(SQLITE)
async def test_a_database_that_is_gone_is_a_problem_without_its_name(
    client, default_database, caplog
):
    default_database.path.unlink()

    readiness, answer = await client.get("/readyz"), await client.get("/v1/generations")

    assert readiness.json()["reasons"] == ["database: it cannot be reached"]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["type"] == "urn:dgx-music:database-away"
    assert str(default_database.path) not in answer.text
    assert str(default_database.path) in caplog.text
