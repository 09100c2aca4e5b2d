"""The example application runs as it is, on each kind of database."""

from __future__ import annotations

import httpx
import pytest

from dgx_music.storage import count_generations, get_database
from examples import fastapi_app
from tests.factories import ROOT

pytestmark = pytest.mark.any_driver

ADA, BOB, SHOP = ({"X-Key": key} for key in fastapi_app.CUSTOMERS)
ORDER = {"title": "For the rain", "prompt": "lofi rain"}


@pytest.fixture
async def shop(database_url, monkeypatch, tmp_path):
    """A client of the running application."""
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)
    monkeypatch.setenv("DGX_MUSIC_OUTPUT", str(tmp_path))
    transport = httpx.ASGITransport(fastapi_app.app, raise_app_exceptions=False)
    async with (
        fastapi_app.lifespan(fastapi_app.app),
        httpx.AsyncClient(transport=transport, base_url="http://shop.example") as client,
    ):
        yield client


async def test_an_order_and_its_music_are_stored_together(shop):
    order = (await shop.post("/orders", json=ORDER, headers=ADA)).json()

    music = (await shop.get(order["music"], headers=ADA)).json()
    told = await shop.get(f"/orders/{order['id']}", headers=ADA)

    assert (music["title"], music["tenant"], music["prompt"]) == (
        "For the rain",
        "ada",
        "lofi rain",
    )
    assert told.json() == {"title": "For the rain", "status": "pending"}


async def test_an_order_that_cannot_be_stored_leaves_no_music(shop, monkeypatch):
    monkeypatch.setattr(fastapi_app.Order, "__init__", lambda self, **values: 1 / 0)

    answer = await shop.post("/orders", json=ORDER, headers=ADA)

    async with get_database().session(read_only=True) as session:
        assert (answer.status_code, await count_generations(session)) == (500, 0)


async def test_customers_see_their_own_and_the_shop_sees_all(shop):
    order = (await shop.post("/orders", json=ORDER, headers=ADA)).json()

    seen = [await shop.get(order["music"], headers=key) for key in (ADA, BOB, SHOP)]
    assert [answer.status_code for answer in seen] == [200, 404, 200]
    assert (await shop.get(f"/orders/{order['id']}", headers=BOB)).status_code == 404
    assert (await shop.get("/music/", headers=ADA)).status_code == 200
    assert (await shop.get(order["music"], headers={"X-Key": "x"})).status_code == 401


async def test_what_is_wrong_is_told(shop, monkeypatch):
    bad = await shop.post("/orders", json={**ORDER, "prompt": "\a"}, headers=ADA)
    monkeypatch.setenv("DGX_MUSIC_MAX_PENDING_PER_TENANT", "1")
    full = [await shop.post("/orders", json=ORDER, headers=ADA) for _ in range(2)]

    assert (bad.status_code, bad.json()["detail"].partition(" ")[0]) == (422, "prompt")
    assert [answer.status_code for answer in full] == [201, 429]


def test_the_example_is_short():
    assert len((ROOT / "examples" / "fastapi_app.py").read_text().splitlines()) <= 100
