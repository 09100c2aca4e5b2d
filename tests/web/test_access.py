"""Who may do what: tokens, roles, tenants, and how often."""

from __future__ import annotations

import pytest

from dgx_music.client.tokens import create_token, revoke_token
from dgx_music.web import Access, WebOptions, create_app
from dgx_music.web.tokens import Rates, Tokens
from tests.factories import SQLITE, add_generation, on

pytestmark = pytest.mark.any_driver

READS = ["/v1/generations", "/v1/generations/{id}", "/v1/models", "/v1/workers"]
READS_OF_ALL = ["/v1/prompts", "/v1/stats"]
WRITES = ["/v1/generations", "/v1/generations/batch", "/v1/generations/{id}/cancel"]
OPERATIONS = ["/v1/pause", "/v1/resume"]
BODIES = {"/v1/generations": {"prompt": "a"}, "/v1/generations/batch": {"requests": ["a"]}}
ALLOWED = {
    "read": {*READS, *READS_OF_ALL},
    "enqueue": {*READS, *READS_OF_ALL, *WRITES},
    "operate": {*READS, *READS_OF_ALL, *WRITES, *OPERATIONS},
}


async def add(database, **values):
    async with database.session() as session:
        return (await add_generation(session, **values)).id


async def ask(client, method, path, generation_id):
    return await client.request(
        method,
        path.replace("{id}", generation_id),
        json=BODIES.get(path) if method == "POST" else None,
    )


@pytest.mark.parametrize("role", ALLOWED)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_each_role_may_do_its_part(holding, default_database, role, method):
    client, generation_id = await holding(role), await add(default_database)
    paths = READS + READS_OF_ALL if method == "GET" else WRITES + OPERATIONS
    for path in paths:
        answer = await ask(client, method, path, generation_id)
        is_allowed = path in ALLOWED[role] if method == "GET" else path in may_post(role)
        assert (answer.status_code == 403) != is_allowed, path
        assert answer.status_code < 500
        if not is_allowed:
            assert answer.json()["type"] == "urn:dgx-music:forbidden"


def may_post(role):
    return {"read": [], "enqueue": WRITES, "operate": WRITES + OPERATIONS}[role]


CHANGES = [
    ("PUT", "/star", None, "enqueue", 204),
    ("DELETE", "/star", None, "enqueue", 204),
    ("PATCH", "", {"title": "x"}, "enqueue", 200),
    ("POST", "/again", None, "enqueue", 202),
    ("POST", "/continue", {"duration": 9}, "enqueue", 409),
    ("DELETE", "", None, "operate", 204),
]


@pytest.mark.parametrize(("method", "path", "body", "weakest", "status"), CHANGES)
@pytest.mark.parametrize("role", ALLOWED)
async def test_each_role_may_change_its_part(
    holding, default_database, role, method, path, body, weakest, status
):
    client, generation_id = await holding(role), await add(default_database)

    answer = await client.request(method, f"/v1/generations/{generation_id}{path}", json=body)

    is_allowed = [*ALLOWED].index(role) >= [*ALLOWED].index(weakest)
    assert answer.status_code == (status if is_allowed else 403)


async def test_without_a_token_all_is_refused(connect, default_database):
    await create_token("shop", "read")
    client = connect(token="dgx_" + "A" * 43)
    for path in READS + READS_OF_ALL:
        answer = await ask(client, "GET", path, "x")
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["type"] == "urn:dgx-music:token-needed"
    client.headers.pop("authorization")
    assert (await client.get("/v1/models")).json()["detail"].startswith("A token is needed")


async def test_a_token_in_the_header_xi_api_key_counts_too(connect):
    made = await create_token("shop", "read")
    client = connect(token="unused")
    client.headers.pop("authorization")

    answer = await client.get("/v1/models", headers={"xi-api-key": made.secret})

    assert answer.status_code == 200


async def test_a_token_in_the_url_does_not_count(connect):
    made = await create_token("shop", "read")
    client = connect(token="unused")
    client.headers.pop("authorization")

    assert (await client.get(f"/v1/stats?token={made.secret}")).status_code == 401


async def test_an_open_server_is_closed_by_the_first_token(connect, default_database):
    app = create_app(options=WebOptions(is_open=True))
    assert (await connect(app).get("/v1/stats")).status_code == 200

    await create_token("shop", "read")
    await revoke_token("shop")
    fresh = connect(create_app(options=WebOptions(is_open=True)))

    assert (await fresh.get("/v1/stats")).status_code == 401


async def test_a_revoked_token_is_accepted_for_two_seconds_at_most(default_database):
    now = 100.0
    tokens = Tokens(clock=lambda: now)
    made = await create_token("shop", "read")
    assert await tokens.find_holder(made.secret) is not None
    await revoke_token("shop")
    assert await tokens.find_holder(made.secret) is not None

    now += 2.0

    assert await tokens.find_holder(made.secret) is None


async def test_a_tenant_sees_its_own_rows_only(holding, default_database):
    own, other = await add(default_database, tenant="a"), await add(default_database, tenant="b")
    await add(default_database)
    client = await holding("operate", "a")

    page = (await client.get("/v1/generations")).json()["generations"]
    found = (await client.get("/v1/generations?q=lofi")).json()["generations"]

    assert [row["id"] for row in page] == [own]
    assert {row["id"] for row in found} <= {own}
    for path in ("", "/audio", "/waveform"):
        answer = await client.get(f"/v1/generations/{other}{path}")
        assert answer.status_code == 404
    for path in ("cancel", "retry"):
        assert (await client.post(f"/v1/generations/{other}/{path}")).status_code == 404
    assert (await client.get("/v1/generations?tenant=b")).status_code == 403


async def test_a_tenant_makes_its_own_rows_only(holding):
    client = await holding("enqueue", "a")

    one = await client.post("/v1/generations", json={"prompt": "x"})
    many = await client.post("/v1/generations/batch", json={"requests": ["x", {"prompt": "y"}]})
    refused = [
        await client.post("/v1/generations", json={"prompt": "x", "tenant": "b"}),
        await client.post("/v1/generations/batch", json={"requests": ["x"], "tenant": "b"}),
        await client.post(
            "/v1/generations/batch", json={"requests": [{"prompt": "x", "tenant": "b"}]}
        ),
    ]

    assert one.json()["tenant"] == "a"
    assert [row["tenant"] for row in many.json()["generations"]] == ["a", "a"]
    assert [(answer.status_code, answer.json()["field"]) for answer in refused] == [
        (403, "tenant")
    ] * 3


async def test_a_tenant_learns_nothing_of_others(holding, default_database):
    client, worker = await holding("operate", "a"), {"worker_id": "worker-1"}
    await add(default_database, tenant="b", idempotency_key="order-7", **worker)

    taken = await client.post(
        "/v1/generations", json={"prompt": "x"}, headers={"Idempotency-Key": "order-7"}
    )

    assert "generation " not in taken.json()["detail"]
    for path in READS_OF_ALL:
        assert (await client.get(path)).status_code == 403
    for path in OPERATIONS:
        assert (await client.post(path)).status_code == 403


@pytest.mark.parametrize(("role", "is_seen"), [("enqueue", False), ("operate", True)])
async def test_only_operators_see_workers_ids(holding, default_database, role, is_seen):
    generation_id = await add(default_database, worker_id="worker-1")
    row = (await (await holding(role)).get(f"/v1/generations/{generation_id}")).json()

    assert ("worker_id" in row, "worker_id" in row["attempts"][0]) == (is_seen, is_seen)


@on(SQLITE)
@pytest.mark.parametrize("model", ["/models/mine", "~/mine", "~root/mine"])
async def test_only_operators_name_folders(holding, model):
    for role, status in (("enqueue", 403), ("operate", 202)):
        client = await holding(role)
        answer = await client.post("/v1/generations", json={"prompt": "x", "model": model})
        assert answer.status_code == status


@on(SQLITE)
async def test_too_many_requests_are_refused_for_a_while(holding):
    client = await holding("read", requests_per_second=2)
    answers = [await client.get("/v1/models") for _ in range(4)]

    assert [answer.status_code for answer in answers][:2] == [200, 200]
    late = answers[-1]
    assert (late.status_code, late.headers["retry-after"]) == (429, "1")
    assert late.json()["type"] == "urn:dgx-music:too-fast"


def test_a_rate_allows_so_many_at_once_and_so_many_a_second():
    now = 0.0
    rates = Rates(2.0, clock=lambda: now)
    assert [rates.take("a") for _ in range(3)] == [0.0, 0.0, 0.5]
    assert rates.take("b") == 0.0

    now += 0.5

    assert (rates.take("a"), rates.take("a")) == (0.0, 0.5)


def test_a_rate_of_0_allows_any_number():
    rates = Rates(0.0)

    assert {rates.take("a") for _ in range(1_000)} == {0.0}


def test_an_access_has_a_role_that_exists():
    with pytest.raises(ValueError, match="use read, enqueue, operate"):
        Access("admin")
