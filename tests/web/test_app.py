"""The application itself: its description, its errors, and how it is mounted."""

from __future__ import annotations

from typing import Annotated

import pytest
from fastapi import FastAPI, Header, HTTPException

from dgx_music.storage import close_db, get_database
from dgx_music.storage.database import Database
from dgx_music.web import Access, create_app, music_lifespan, music_router
from dgx_music.web.enqueue import wait_seconds

DESCRIPTION = create_app().openapi()
OPERATIONS = [
    (path, method, operation)
    for path, methods in DESCRIPTION["paths"].items()
    for method, operation in methods.items()
]


@pytest.fixture
def database_url(sqlite_url):
    """One kind of database is enough: these tests are about HTTP."""
    return sqlite_url


@pytest.mark.parametrize(("path", "method", "operation"), OPERATIONS)
def test_each_answer_is_described_with_an_example(path, method, operation):
    assert operation["summary"]
    assert operation["description"]
    for status, answer in operation["responses"].items():
        assert answer["description"]
        for kind, content in answer.get("content", {}).items():
            assert kind.startswith("audio/") or "example" in content, status
    if path.startswith("/v1/"):
        assert {"401", "403", "422", "429", "503"} <= operation["responses"].keys()
        assert operation["security"]


def test_a_request_is_described_by_the_librarys_options():
    schema = DESCRIPTION["components"]["schemas"]["GenerationRequest"]

    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert schema["examples"]
    assert schema["properties"]["duration"] == {
        "type": "number",
        "default": 10.0,
        "title": "Duration",
        "description": "Seconds of audio: at least 0.08, and at most the model's 300.",
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/generations/../../etc/passwd", 404),
        ("DELETE", "/v1/generations", 405),
        ("PUT", "/healthz", 405),
    ],
)
async def test_the_frameworks_own_errors_are_problems_too(client, method, path, status):
    answer = await client.request(method, path)

    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/generations", "GET, POST"),
        ("/v1/generations/x", "DELETE, GET, PATCH"),
        ("/v1/generations/x/star", "DELETE, PUT"),
        ("/v1/generations/x/audio", "GET, HEAD"),
        ("/v1/generations/cancel", "POST"),
        ("/healthz", "GET"),
    ],
)
async def test_a_wrong_method_is_told_all_that_are_allowed(client, path, methods):
    answer = await client.request("OPTIONS", path)

    assert (answer.status_code, answer.headers["allow"]) == (405, methods)


async def test_a_mistake_of_ours_tells_nothing_of_itself(connect):
    app = create_app()

    @app.get("/v1/mistake")
    async def fail() -> None:
        raise ZeroDivisionError("secret")

    answer = await connect(app).get("/v1/mistake")

    assert (answer.status_code, answer.json()["type"]) == (500, "urn:dgx-music:internal-error")
    assert "secret" not in answer.text


async def who(x_user: Annotated[str, Header()] = "") -> Access:
    if not x_user:
        raise HTTPException(401, "Log in first.")
    return Access("enqueue", tenant=x_user)


def mounted(prefix="/music", **options):
    app = FastAPI(lifespan=music_lifespan)
    app.include_router(music_router(**options), prefix=prefix)
    return app


@pytest.mark.parametrize("prefix", ["", "/music", "/v1/music", "/a b"])
async def test_links_lead_to_where_it_is_mounted(connect, prefix):
    client = connect(mounted(prefix, authorize=who))
    client.headers["X-User"] = "label-7"

    row = (await client.post(f"{prefix}/v1/generations", json={"prompt": "lofi rain"})).json()

    assert row["tenant"] == "label-7"
    assert (await client.get(row["urls"]["self"])).json()["id"] == row["id"]
    assert row["urls"]["self"].endswith(f"/v1/generations/{row['id']}")


async def test_links_lead_into_a_mounted_application(connect):
    outer = FastAPI()
    outer.mount("/sub", mounted("/music", authorize=who))
    client = connect(outer)
    client.headers["X-User"] = "label-7"

    answer = await client.post("/sub/music/v1/generations", json={"prompt": "lofi rain"})

    assert answer.json()["urls"]["self"].startswith("/sub/music/v1/generations/")


async def test_errors_are_problems_in_another_application_too(connect):
    client = connect(mounted(authorize=who))

    refused = await client.get("/music/v1/generations")
    client.headers["X-User"] = "label-7"
    wrong = await client.post("/music/v1/generations", json={})
    foreign = await client.post("/music/v1/pause", headers={"Origin": "https://evil.example"})

    assert (refused.status_code, refused.json()["detail"]) == (401, "Log in first.")
    assert (wrong.status_code, wrong.json()["field"]) == (422, "prompt")
    assert foreign.json()["type"] == "urn:dgx-music:cross-site"
    assert wrong.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("scheme", ["Basic", "basic", "Negotiate"])
async def test_what_browsers_send_by_themselves_is_no_token(connect, scheme):
    client = connect(mounted(authorize=who))
    client.headers.update({"X-User": "label-7", "Authorization": f"{scheme} bGFiZWw6Nw=="})
    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}

    refused = await client.post("/music/v1/generations", json={"prompt": "a"}, headers=foreign)
    own = await client.post("/music/v1/generations", json={"prompt": "a"})

    assert (refused.status_code, own.status_code) == (403, 202)


async def test_the_page_leads_to_the_log_in_of_the_application(connect):
    async def redirect() -> Access:
        raise HTTPException(303, headers={"Location": "/login"})

    sent = await connect(mounted(authorize=redirect)).get("/music/")
    told = await connect(mounted(authorize=who)).get("/music/")

    assert (sent.status_code, sent.headers["location"]) == (303, "/login")
    assert (told.status_code, "Log in first." in told.text) == (401, True)
    assert "<form" not in told.text  # it would ask for a token of ours, which is of no use here


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b'{"prompt": "a", "duration": 4}'),
        ("application/vnd.x+JSON; charset=utf-8", b'{"prompt": "a"}'),
        ("application/json", b""),
        ("application/json", b"{"),
        ("application/json", b"\xff"),
        ("application/json", b"[" * 100_000),
        ("application/json", b"null"),
        ("application/json", b'["a"]'),
        ("application/json", b"{}"),
        ("application/json", b'{"prompt": "a", "\\ud800": 1}'),
        ("application/json", b'{"prompt": "a", "colour": 1}'),
        ("application/json", b'{"prompt": "' + b"a" * 2**20 + b'"}'),
        ("text/plain", b'{"prompt": "a"}'),
        ("", b'{"prompt": "a"}'),
    ],
)
async def test_it_enqueues_alike_whoever_says_who_asks(connect, kind, body):
    """By our own tokens it goes another way than by the framework's dependencies."""

    async def all_may() -> Access:
        return Access("operate")

    answers = []
    for client, prefix in ((connect(), ""), (connect(mounted(authorize=all_may)), "/music")):
        headers = {"Content-Type": kind} if kind else {}
        url = f"{prefix}/v1/generations"
        answers.append(await client.post(url, content=body, headers=headers))
    one, other = answers

    told = [each.json() if each.status_code >= 400 else {} for each in answers]
    assert (one.status_code, told[0]) == (other.status_code, told[1])
    assert {*one.headers} == {*other.headers}


async def test_the_other_applications_own_errors_stay_its_own(connect):
    answer = await connect(mounted()).get("/nothing")

    assert answer.json() == {"detail": "Not Found"}


async def test_a_mounted_api_needs_tokens_unless_it_is_told_who_asks(connect):
    assert (await connect(mounted()).get("/music/v1/models")).status_code == 401


async def test_the_lifespan_opens_and_closes_the_database(sqlite_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", sqlite_url)
    app = mounted()

    async with music_lifespan(app):
        opened = get_database()

    assert isinstance(opened, Database)
    with pytest.raises(RuntimeError):
        get_database()


async def test_the_lifespan_leaves_a_database_that_was_open(default_database):
    async with music_lifespan(mounted()):
        assert get_database() is default_database
    assert get_database() is default_database
    await close_db()


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("wait=30", 30),
        ("respond-async, wait=30", 30),
        ('Wait = "5"', 5),
        ("wait=600", 60),
        ("wait=-1", 0),
        ("await=5", 0),
        ("wait=0", 0),
    ],
)
def test_how_long_a_client_prefers_to_wait(prefer, seconds):
    assert wait_seconds(prefer) == seconds
