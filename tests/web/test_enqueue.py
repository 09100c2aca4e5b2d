"""``POST generations``, one and many."""

from __future__ import annotations

import asyncio
import json

import pytest

from dgx_music.storage import count_generations, queue
from tests.factories import SQLITE, claim_one, completion_of, on, read

pytestmark = pytest.mark.any_driver

BIG_SEED = 2**63 - 1


async def test_a_request_becomes_a_row_that_waits(client, default_database):
    answer = await client.post("/v1/generations", json={"prompt": "lofi rain", "duration": 16})

    row = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == row["urls"]["self"] == f"/v1/generations/{row['id']}"
    assert (row["status"], row["duration_seconds"], row["starred"]) == ("pending", 16.0, False)
    assert (await read(default_database, row["id"])).prompt == "lofi rain"


async def test_a_row_shows_nothing_of_files_and_hashes(client):
    row = (await client.post("/v1/generations", json={"prompt": "lofi rain"})).json()

    hidden = {"file_path", "request_hash", "prompt_id", "lease_expires_at", "is_starred"}
    assert hidden & {*row} == set()
    assert row["urls"]["audio"] is None


@pytest.mark.parametrize("seed", [BIG_SEED, str(BIG_SEED)])
async def test_a_seed_of_63_bits_comes_as_number_or_text_and_goes_as_text(
    client, default_database, seed
):
    row = (await client.post("/v1/generations", json={"prompt": "a", "seed": seed})).json()

    assert row["sampling"]["seed"] == str(BIG_SEED)
    assert (await read(default_database, row["id"])).sampling["seed"] == BIG_SEED


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        ({"duration": 400}, "duration", "duration is 400 s; use 0.08 to 300 seconds."),
        ({"duration": "16"}, "duration", "duration is '16'; use a number of seconds."),
        ({"seed": "-1"}, "seed", None),
        ({"colour": "red"}, "colour", None),
        ({"model_dump": "red"}, "model_dump", None),
        ({"continuation": "/etc/passwd"}, "continuation", None),
        ({"melody": {"path": "x"}}, "melody", None),
        ({"prompt": None}, "prompt", None),
        ({"metadata": {"audio": {}}}, "metadata", None),
        ({"model": "musicgen-huge"}, "model", None),
        ({"\ud800": 1}, "body", None),
    ],
)
async def test_what_the_library_refuses_is_a_problem_with_its_sentence(
    client, default_database, fields, field, sentence
):
    content = json.dumps({"prompt": "lofi rain"} | fields)
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/v1/generations", content=content, headers=headers)

    problem = answer.json()
    assert answer.status_code == problem["status"] == 422
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["type"], problem["field"]) == ("urn:dgx-music:invalid-request", field)
    assert problem["detail"] == (sentence or problem["detail"])
    assert await default_database.transact(count_generations, read_only=True) == 0


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 422),
        (b"[]", "application/json", 422),
        (b'"x"', "application/json", 422),
        (b"", "application/json", 422),
        (b"{}", "application/json", 422),
        (b'{"prompt": "a"}', "text/plain", 422),
        (b"\xff", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
    ],
)
@on(SQLITE)
async def test_a_body_that_is_no_request_is_a_problem(client, content, kind, status):
    answer = await client.post("/v1/generations", content=content, headers={"Content-Type": kind})

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"].endswith(".")


async def test_the_same_request_with_its_key_gets_the_row_that_is_there(client):
    key = {"Idempotency-Key": "order-7"}
    first = await client.post("/v1/generations", json={"prompt": "lofi rain"}, headers=key)
    again = await client.post("/v1/generations", json={"prompt": "lofi rain"}, headers=key)
    other = await client.post("/v1/generations", json={"prompt": "trap beat"}, headers=key)

    assert (first.status_code, again.status_code) == (202, 200)
    assert again.json()["id"] == first.json()["id"]
    assert (other.status_code, other.json()["type"]) == (422, "urn:dgx-music:idempotency-conflict")


async def test_two_different_keys_are_refused(client):
    body = {"prompt": "lofi rain", "idempotency_key": "a"}
    answer = await client.post("/v1/generations", json=body, headers={"Idempotency-Key": "b"})

    assert (answer.status_code, answer.json()["field"]) == (422, "idempotency_key")


async def test_a_client_that_waits_gets_the_finished_row(client, default_database):
    async def finish() -> None:
        async with default_database.session() as session:
            lease = await claim_one(session)
            await queue.complete(session, [completion_of(lease)])

    body, headers = {"prompt": "lofi rain"}, {"Prefer": "wait=60"}
    posting = asyncio.create_task(client.post("/v1/generations", json=body, headers=headers))
    while await default_database.transact(count_generations, read_only=True) == 0:
        await asyncio.sleep(0.01)
    await finish()
    answer = await posting

    assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    assert answer.headers["preference-applied"] == "wait=60"


@on(SQLITE)
async def test_a_wait_that_is_over_answers_that_it_waits(client):
    headers = {"Prefer": "respond-async, wait=1"}
    answer = await client.post("/v1/generations", json={"prompt": "lofi rain"}, headers=headers)

    assert (answer.status_code, answer.json()["status"]) == (202, "pending")


async def test_a_batch_is_stored_all_or_none(client, default_database):
    body = {"requests": ["lofi rain", {"prompt": "trap beat", "seed": "7"}], "duration": 4}
    answer = await client.post("/v1/generations/batch", json=body)
    body["requests"].append({"prompt": "x", "duration": 999})
    refused = await client.post("/v1/generations/batch", json=body)

    rows = answer.json()["generations"]
    assert answer.status_code == 202
    assert [(row["prompt"], row["duration_seconds"]) for row in rows] == [
        ("lofi rain", 4.0),
        ("trap beat", 4.0),
    ]
    assert refused.json()["field"] == "request 3: duration"
    assert await default_database.transact(count_generations, read_only=True) == 2


@on(SQLITE)
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"requests": []}, "requests"),
        ({"requests": "lofi rain"}, "requests"),
        ({"requests": ["a"] * 1_001}, "requests"),
        ({"requests": ["a"], "prompt": "b"}, "prompt"),
        ({"requests": [{"prompt": "a", "melody": "/x"}]}, "request 1: melody"),
        ({"requests": [7]}, "request 1: request"),
        ({}, "requests"),
    ],
)
async def test_a_bad_batch_is_a_problem(client, body, field):
    answer = await client.post("/v1/generations/batch", json=body)

    assert (answer.status_code, answer.json()["field"]) == (422, field)
