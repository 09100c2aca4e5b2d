"""``GET generations``, cancel and retry."""

from __future__ import annotations

import pytest

from dgx_music.storage import queue
from tests.factories import (
    SQLITE,
    add_generation,
    back_date,
    claim_one,
    completion_of,
    on,
    start_one,
)

pytestmark = pytest.mark.any_driver


async def add(database, *prompts, **values):
    """Add a row for each prompt, the first one oldest; return their ids."""
    ids = []
    async with database.session() as session:
        for number, prompt in enumerate(prompts):
            row = await add_generation(session, prompt=prompt, **values)
            await back_date(session, row.id, created_at=100 - number)
            ids.append(row.id)
    return ids


async def test_pages_follow_one_another_newest_first(client, default_database):
    ids = await add(default_database, *"abcde")
    found, after = [], ""
    for _ in range(3):
        page = (await client.get(f"/v1/generations?limit=2{after}")).json()
        found += [row["id"] for row in page["generations"]]
        after = f"&after={page['next']}"

    assert found == ids[::-1]
    assert page["next"] is None


async def test_filters_narrow_the_list(client, default_database):
    (wanted,) = await add(default_database, "a", tenant="label-7", status="failed")
    await add(default_database, "b", tenant="label-7")
    await add(default_database, "c", status="failed")

    page = (await client.get("/v1/generations?tenant=label-7&status=failed")).json()
    none = (await client.get("/v1/generations?created_before=2020-01-01T00:00:00Z")).json()

    assert [row["id"] for row in page["generations"]] == [wanted]
    assert none == {"generations": [], "next": None}


async def test_words_search_the_prompts(client):
    for prompt in ("lofi rain", "trap beat"):
        await client.post("/v1/generations", json={"prompt": prompt})

    page = (await client.get("/v1/generations", params={"q": "RAIN -vocals"})).json()

    assert [row["prompt"] for row in page["generations"]] == ["lofi rain"]


@on(SQLITE)
@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("limit=0", "limit"),
        ("limit=201", "limit"),
        ("limit=x", "limit"),
        ("limit=٣", "limit"),
        ("limit=" + "9" * 5_000, "limit"),
        ("status=done", "status"),
        ("after=x", "after"),
        ("q=", "q"),
        ("q=the", "q"),
        ("q=rain&after=x", "after"),
        ("colour=red", "colour"),
        ("limit=1&limit=2", "limit"),
        ("bpm_from=fast", "bpm_from"),
        ("bpm_from=100&bpm_to=90", "bpm_from"),
        ("starred=yes", "starred"),
        ("sort=size", "sort"),
        ("q=rain&sort=bpm", "sort"),
        ("created_from=yesterday", "created_from"),
        ("tenant=%00", "tenant"),
    ],
)
async def test_a_wrong_parameter_is_a_problem(client, query, field):
    answer = await client.get(f"/v1/generations?{query}")

    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_one_generation_has_its_attempts_and_its_estimate(client, default_database):
    lease = await start_one(default_database, metadata={"order": 7})

    row = (await client.get(f"/v1/generations/{lease.generation_id}")).json()

    assert (row["status"], row["metadata"]) == ("processing", {"order": 7})
    assert [attempt["attempt"] for attempt in row["attempts"]] == [1]
    assert "generation_id" not in row["attempts"][0]
    assert row["estimate"]["status"] == "processing"
    assert row["urls"]["cancel"] == f"{row['urls']['self']}/cancel"
    assert row["urls"]["retry"] is None


async def test_the_waveform_is_not_in_the_row(client, default_database):
    lease = await start_one(default_database)
    done = completion_of(lease, audio={"peak": 0.5, "waveform": [0.1] * 1_000})
    async with default_database.session() as session:
        await queue.complete(session, [done])

    row = (await client.get(f"/v1/generations/{lease.generation_id}")).json()
    (in_list,) = (await client.get("/v1/generations")).json()["generations"]

    assert row["metadata"] == {"audio": {"peak": 0.5}}
    assert (in_list["metadata"], "sha256" in in_list) == ({"audio": {}}, False)
    assert row["urls"]["audio"] == f"{row['urls']['self']}/audio"


@pytest.mark.parametrize("generation_id", ["x", "01a21733-54a2-7c39-9a6e-0f7a4be3f0a1", "%00", "é"])
async def test_an_unknown_id_is_not_found(client, generation_id):
    for method, path in (
        ("GET", ""),
        ("GET", "/audio"),
        ("GET", "/waveform"),
        ("POST", "/cancel"),
        ("POST", "/retry"),
    ):
        answer = await client.request(method, f"/v1/generations/{generation_id}{path}")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:dgx-music:not-found")


async def test_a_cancelled_generation_can_be_tried_again(client, default_database):
    (generation_id,) = await add(default_database, "a")
    path = f"/v1/generations/{generation_id}"

    cancelled = await client.post(f"{path}/cancel")
    retried = await client.post(f"{path}/retry")
    refused = await client.post(f"{path}/retry")

    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert cancelled.json()["urls"]["retry"] == f"{path}/retry"
    assert (retried.status_code, retried.json()["status"]) == (202, "pending")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:dgx-music:wrong-status")


async def test_a_generation_that_runs_is_asked_to_stop(client, default_database):
    (generation_id,) = await add(default_database, "a")
    async with default_database.session() as session:
        await claim_one(session)

    row = (await client.post(f"/v1/generations/{generation_id}/cancel")).json()

    assert (row["status"], row["cancel_requested"]) == ("processing", True)
