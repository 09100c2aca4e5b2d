"""Which role each route needs, on each kind of database."""

from __future__ import annotations

import pytest

from dgx_music.roles import Role
from dgx_music.web import create_app
from tests.factories import add_generation

pytestmark = pytest.mark.any_driver

READ, ENQUEUE, OPERATE = Role
ONE = "/v1/generations/{generation_id}"
NEEDED = {
    ("GET", "/v1/generations"): READ,
    ("POST", "/v1/generations"): ENQUEUE,
    ("POST", "/v1/generations/batch"): ENQUEUE,
    ("POST", "/v1/generations/cancel"): OPERATE,
    ("GET", ONE): READ,
    ("PATCH", ONE): ENQUEUE,
    ("DELETE", ONE): OPERATE,
    ("GET", f"{ONE}/audio"): READ,
    ("GET", f"{ONE}/waveform"): READ,
    ("GET", f"{ONE}/preview"): READ,
    ("GET", f"{ONE}/events"): READ,
    ("PUT", f"{ONE}/star"): ENQUEUE,
    ("DELETE", f"{ONE}/star"): ENQUEUE,
    ("POST", f"{ONE}/cancel"): ENQUEUE,
    ("POST", f"{ONE}/retry"): ENQUEUE,
    ("POST", f"{ONE}/again"): ENQUEUE,
    ("POST", f"{ONE}/continue"): ENQUEUE,
    ("GET", "/v1/events"): READ,
    ("POST", "/v1/uploads"): ENQUEUE,
    ("GET", "/v1/models"): READ,
    ("GET", "/v1/prompts"): READ,
    ("GET", "/v1/stats"): READ,
    ("GET", "/v1/workers"): READ,
    ("POST", "/v1/pause"): OPERATE,
    ("POST", "/v1/resume"): OPERATE,
}
OPEN = {("GET", "/healthz"), ("GET", "/readyz")}
BODIES = {
    "/v1/generations": {"prompt": "a"},
    "/v1/generations/batch": {"requests": ["a"]},
    "/v1/generations/cancel": {"filters": {"status": "pending"}, "expected": 99},
    f"{ONE}/continue": {"duration": 9},
    ONE: {"title": "x"},
}


def test_the_table_has_all_routes_but_those_for_clients_of_other_services():
    paths = create_app().openapi()["paths"]
    found = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method, operation in methods.items()
        if not operation["tags"][0].startswith("for clients of")
    }

    assert found == NEEDED.keys() | OPEN


@pytest.mark.parametrize("role", [None, *Role])
async def test_a_route_answers_those_who_have_its_role(holding, connect, default_database, role):
    client = (
        connect(token="dgx_unknown") if role is None else await holding(role, requests_per_second=0)
    )
    async with default_database.session() as session:
        # a finished one, so that the stream of its events ends
        row = await add_generation(session, status="failed")

    for (method, path), needed in NEEDED.items():
        if method == "GET" and path == "/v1/events":
            path += "?unknown=1"  # refused, since the stream has no end
        answer = await client.request(
            method,
            path.replace("{generation_id}", row.id),
            json=BODIES.get(path.partition("?")[0]) if method in ("POST", "PATCH") else None,
        )
        refused = answer.status_code if answer.status_code in (401, 403) else None
        assert refused == refusal(role, needed), f"{method} {path}: {answer.text}"
        assert answer.status_code < 500


def refusal(role, needed):
    if role is None:
        return 401
    return None if role.includes(needed) else 403
