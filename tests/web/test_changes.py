"""Again, continue, labels, stars, deletion, and what is done with many at once."""

from __future__ import annotations

import pytest

from dgx_music.storage import get_generation
from dgx_music.storage.schema import new_id
from tests.factories import SQLITE, add_generation, on, read

pytestmark = pytest.mark.any_driver


async def add(database, **values):
    async with database.session() as session:
        return (await add_generation(session, **values)).id


async def make(client, **fields):
    return (await client.post("/v1/generations", json={"prompt": "lofi rain", **fields})).json()


@pytest.mark.parametrize(
    ("changes", "seed"), [({"seed": "same"}, "7"), ({"seed": "8"}, "8"), ({"seed": 9}, "9")]
)
async def test_a_request_is_made_again_with_changes(client, changes, seed):
    row = await make(client, seed=7, temperature=1.5)

    answer = await client.post(f"{row['urls']['self']}/again", json={**changes, "duration": 4})

    made = answer.json()
    assert (answer.status_code, made["parent_id"]) == (202, row["id"])
    assert (made["sampling"]["seed"], made["sampling"]["temperature"]) == (seed, 1.5)
    assert made["duration_seconds"] == 4.0
    assert answer.headers["location"] == made["urls"]["self"]


async def test_again_without_a_body_takes_a_new_seed(client):
    row = await make(client, seed=7)

    made = (await client.post(f"{row['urls']['self']}/again")).json()

    assert made["sampling"]["seed"] != "7"


@on(SQLITE)
@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": "old"}, "seed"),
        ({"session": 1}, "session"),
        ({"count": 2}, "count"),
        ({"generation_id": "x"}, "generation_id"),
        ({"melody": "/etc/passwd"}, "melody"),
        ({"duration": 999}, "duration"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_wrong_change_is_a_problem(client, changes, field):
    row = await make(client)

    answer = await client.post(f"{row['urls']['self']}/again", json=changes)

    assert (answer.status_code, answer.json()["field"]) == (422, field)


async def test_what_is_not_completed_cannot_be_continued(client):
    row = await make(client)

    answer = await client.post(f"{row['urls']['self']}/continue", json={"duration": 20})
    missing = await client.post(f"{row['urls']['self']}/continue", json={})

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:dgx-music:wrong-status")
    assert (missing.status_code, missing.json()["field"]) == (422, "duration")


@pytest.mark.parametrize("audio", [{}, {"sha256": "ab" * 32}])
async def test_what_has_lost_its_audio_cannot_be_continued(client, default_database, audio):
    generation_id = new_id()
    if audio:
        audio = {**audio, "file_path": f"/nowhere/{generation_id}-1.wav"}
    await add(default_database, id=generation_id, status="completed", **audio)

    answer = await client.post(f"/v1/generations/{generation_id}/continue", json={"duration": 20})

    assert (answer.status_code, answer.json()["type"]) == (410, "urn:dgx-music:gone")


async def test_a_star_is_given_and_taken(client, default_database):
    row = await make(client)
    star = f"{row['urls']['self']}/star"

    assert (await client.put(star)).status_code == 204
    assert (await client.get(row["urls"]["self"])).json()["starred"] is True
    found = (await client.get("/v1/generations?starred=true")).json()["generations"]
    assert [each["id"] for each in found] == [row["id"]]
    assert (await client.delete(star)).status_code == 204
    assert not (await read(default_database, row["id"])).is_starred


async def test_labels_are_changed(client):
    row = await make(client, title="Rain", tags=["night"])

    answer = await client.patch(row["urls"]["self"], json={"tags": ["work", "Day"], "title": None})
    wrong = await client.patch(row["urls"]["self"], json={"prompt": "x"})

    assert answer.status_code == 200
    assert (answer.json()["title"], answer.json()["tags"]) == (None, ["day", "work"])
    assert (wrong.status_code, wrong.json()["field"]) == (422, "prompt")


async def test_filters_of_labels_narrow_the_list(client):
    wanted = await make(client, tags=["night", "work"])
    await make(client, tags=["night"])

    page = await client.get("/v1/generations?tag=night&tag=work&status=pending&status=failed")
    sorted_page = await client.get("/v1/generations?sort=duration&reverse=true")

    assert [row["id"] for row in page.json()["generations"]] == [wanted["id"]]
    assert len(sorted_page.json()["generations"]) == 2


async def test_a_generation_is_deleted_unless_it_runs(client, default_database):
    row, running = await make(client), await add(default_database, worker_id="worker-1")

    gone = await client.delete(row["urls"]["self"])
    refused = await client.delete(f"/v1/generations/{running}")

    assert (gone.status_code, refused.status_code) == (204, 409)
    async with default_database.session(read_only=True) as session:
        assert await get_generation(session, row["id"]) is None


async def test_many_are_cancelled_if_they_are_as_many_as_expected(client):
    rows = [await make(client, tags=["night"]) for _ in range(3)]
    body = {"filters": {"tag": "night", "status": "pending"}, "expected": 2}

    differs = await client.post("/v1/generations/cancel", json=body)
    done = await client.post("/v1/generations/cancel", json={**body, "expected": 3})

    assert (differs.status_code, differs.json()["type"]) == (409, "urn:dgx-music:count-differs")
    assert (done.status_code, done.json()["changed"]) == (200, 3)
    assert (await client.get(rows[0]["urls"]["self"])).json()["status"] == "cancelled"


@on(SQLITE)
@pytest.mark.parametrize(
    "body",
    [
        {"expected": 1},
        {"filters": {"status": "pending"}},
        {"filters": {}, "expected": 0},
        {"filters": {"status": None}, "expected": 0},
        {"filters": {"session": 1}, "expected": 0},
        {"filters": {"ids": ["x"]}, "expected": 0},
        {"filters": "all", "expected": 0},
        {"filters": {"status": {"x": 1}}, "expected": 0},
        {"filters": {"status": "pending"}, "expected": "0"},
    ],
)
async def test_a_wrong_change_of_many_is_a_problem(client, body):
    assert (await client.post("/v1/generations/cancel", json=body)).status_code == 422


async def test_a_tenants_operator_changes_its_own_only(holding, default_database):
    own, other = await add(default_database, tenant="a"), await add(default_database, tenant="b")
    client = await holding("operate", "a")
    body = {"filters": {"status": "pending"}, "expected": 1}

    done = await client.post("/v1/generations/cancel", json=body)
    for method, path in (("DELETE", ""), ("PUT", "/star"), ("PATCH", ""), ("POST", "/again")):
        json = {} if method in ("PATCH", "POST") else None
        answer = await client.request(method, f"/v1/generations/{other}{path}", json=json)
        assert answer.status_code == 404

    assert done.json()["changed"] == 1
    assert [(await read(default_database, each)).status for each in (own, other)] == [
        "cancelled",
        "pending",
    ]


async def test_takes_are_a_batch(client):
    first = await make(client, variations=3, seed=5)

    page = (await client.get(f"/v1/generations?batch={first['batch_id']}")).json()

    assert {row["sampling"]["seed"] for row in page["generations"]} == {"5", "6", "7"}


async def test_a_batch_has_a_name_and_no_other_argument(client):
    body = {"requests": ["a"], "batch": "night"}
    named = await client.post("/v1/generations/batch", json=body)
    wrong = await client.post("/v1/generations/batch", json={**body, "session": 1})

    assert named.json()["generations"][0]["batch_id"]
    assert (wrong.status_code, wrong.json()["field"]) == (422, "request 1: session")
