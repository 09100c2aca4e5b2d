"""How many generations may wait: what the web answers to one more."""

from __future__ import annotations

import pytest

from dgx_music import enqueue
from dgx_music.config import load_settings
from dgx_music.storage.room import QueueLimits
from dgx_music.web import WebOptions
from dgx_music.web.site import Site

pytestmark = pytest.mark.any_driver

PATH = "/v1/generations"


@pytest.fixture
def limit(monkeypatch):
    """Sets how many may wait, in all and of each tenant."""

    def set_limit(most="", per_tenant=""):
        monkeypatch.setenv("DGX_MUSIC_MAX_PENDING", str(most))
        monkeypatch.setenv("DGX_MUSIC_MAX_PENDING_PER_TENANT", str(per_tenant))

    return set_limit


async def test_one_more_is_refused_for_a_while(limit, client):
    limit(1)
    first = await client.post(PATH, json={"prompt": "a"})

    full = await client.post(PATH, json={"prompt": "b"})

    assert (first.status_code, full.status_code) == (202, 429)
    assert full.headers["content-type"] == "application/problem+json"
    assert full.headers["retry-after"] == "10"
    assert full.json() == {
        "type": "urn:dgx-music:queue-full",
        "title": "Too many generations wait.",
        "status": 429,
        "detail": "The queue has no room for one more generation: DGX_MUSIC_MAX_PENDING lets 1 "
        "wait; wait until some have begun.",
    }


async def test_each_way_into_the_queue_is_limited(limit, client):
    limit(1)
    row = (await client.post(PATH, json={"prompt": "a"})).json()
    asked = [
        await client.post(PATH, json={"prompt": "a", "variations": 2}),
        await client.post(f"{PATH}/batch", json={"requests": ["a"]}),
        await client.post(f"{PATH}/{row['id']}/again"),
        await client.post("/", data={"prompt": "a"}),
    ]

    assert [answer.status_code for answer in asked] == [429] * 4


async def test_a_repeat_of_a_stored_request_gets_its_row(limit, client):
    limit(1)
    key = {"Idempotency-Key": "order-7"}
    first = await client.post(PATH, json={"prompt": "a"}, headers=key)

    again = await client.post(PATH, json={"prompt": "a"}, headers=key)

    assert (again.status_code, again.json()["id"]) == (200, first.json()["id"])


async def test_a_tenant_has_room_of_its_own(limit, holding):
    limit(per_tenant=1)
    client, other = await holding("enqueue", "a"), await holding("enqueue", "b")
    await client.post(PATH, json={"prompt": "x"})

    full = await client.post(PATH, json={"prompt": "x"})

    assert full.status_code == 429
    assert full.json()["detail"].startswith("The queue of tenant 'a' has no room")
    assert (await other.post(PATH, json={"prompt": "x"})).status_code == 202


async def test_what_the_program_around_enqueues_has_no_limit_of_the_web(
    client, monkeypatch, default_database
):
    monkeypatch.setattr("dgx_music.web.site.MAX_PENDING", 1)
    await enqueue("a")

    answer = await client.post(PATH, json={"prompt": "b"})

    await enqueue("c")

    assert answer.status_code == 429


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({}, QueueLimits(10_000, 1_000)),
        ({"max_pending": 7}, QueueLimits(7, 1_000)),
        ({"max_pending": 0, "max_pending_per_tenant": 0}, QueueLimits()),
    ],
)
def test_the_web_has_limits_unless_they_are_set(settings, limits):
    assert Site(load_settings(**settings), WebOptions()).queue_limits == limits
