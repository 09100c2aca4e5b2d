"""What other sites, other names and too long bodies meet."""

from __future__ import annotations

import pytest

from dgx_music.storage import count_generations
from dgx_music.web.guard import SECURITY_HEADERS, host_of, is_loopback

BODY = {"prompt": "lofi rain"}


@pytest.fixture
def database_url(sqlite_url):
    """One kind of database is enough: these tests are about HTTP."""
    return sqlite_url


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),  # no browser
        ({"Sec-Fetch-Site": "same-origin"}, 202),
        ({"Sec-Fetch-Site": "none"}, 202),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:8321"}, 202),
        ({"Origin": "http://127.0.0.1:9999"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8321.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Origin": "http://LOCALHOST:1", "Host": "localhost:1"}, 202),
        ({"Origin": "http://127.0.0.1:8321", "Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
async def test_the_page_of_another_site_changes_nothing(client, default_database, headers, status):
    answer = await client.post("/v1/generations", json=BODY, headers=headers)

    assert answer.status_code == status
    count = await default_database.transact(count_generations, read_only=True)
    assert count == (status == 202)


async def test_a_form_of_another_site_changes_nothing(client, default_database):
    headers = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    for path in ("/v1/pause", "/v1/generations/x/cancel"):
        assert (await client.post(path, headers=headers)).status_code == 403


async def test_other_sites_may_not_read_either(client):
    answer = await client.options("/v1/generations", headers={"Origin": "https://evil.example"})

    assert not any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8321", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1", 200),
        ("127.9.9.9:80", 200),
        ("[::1]:8321", 200),
        ("music.example", 200),
        ("Music.Example:443", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.nip.io", 421),
        ("evil.example#localhost", 421),
        ("localhost@evil.example", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
async def test_only_known_hosts_are_answered(connect, host, status):
    client = connect(allowed_hosts=frozenset({"Music.example"}))

    answer = await client.get("/v1/models", headers={"Host": host})

    assert answer.status_code == status
    if status == 421:
        assert answer.json()["type"] == "urn:dgx-music:wrong-host"


async def test_a_request_with_two_hosts_is_not_answered(client):
    hosts = [("Host", "localhost"), ("Host", "evil.example")]

    assert (await client.get("/v1/models", headers=hosts)).status_code == 421


async def test_probes_are_answered_by_any_name(client):
    for path in ("/healthz", "/readyz"):
        assert (await client.get(path, headers={"Host": "10.0.0.7"})).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing", "/nothing", "/healthz"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_every_answer_has_the_security_headers(client, path, method):
    answer = await client.request(method, path)

    assert (
        SECURITY_HEADERS.items()
        <= {name: answer.headers.get(name.lower()) for name in SECURITY_HEADERS}.items()
    )
    assert "default-src 'none'" in answer.headers["content-security-policy"]


async def chunks(count):
    yield b'{"prompt": "'
    for _ in range(count):
        yield b"a" * 2**16
    yield b'"}'


@pytest.mark.parametrize("count", [16, 64])
async def test_a_long_body_is_refused_also_in_chunks(client, count):
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/v1/generations", content=chunks(count), headers=headers)

    assert (answer.status_code, answer.json()["type"]) == (413, "urn:dgx-music:too-large")


async def test_a_long_body_is_refused_by_its_length_alone(client):
    headers = {"Content-Type": "application/json", "Content-Length": str(2**40)}
    answer = await client.post("/v1/generations", content=chunks(0), headers=headers)

    assert answer.status_code == 413


async def test_a_body_of_nearly_a_mebibyte_is_read(client):
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/v1/generations", content=chunks(15), headers=headers)

    assert (answer.status_code, answer.json()["field"]) == (422, "prompt")


@pytest.mark.parametrize(
    ("host", "expected"), [("localhost", True), ("::1", True), ("10.0.0.1", False), ("x", False)]
)
def test_which_hosts_are_loopback(host, expected):
    assert is_loopback(host) is expected


def test_a_hosts_name_is_read_without_its_port():
    assert [host_of(each) for each in ("a:1", "[::1]:1", "[", "b@a", "")] == [
        "a",
        "::1",
        "",
        "",
        "",
    ]
