"""``dgx-music token``."""

from __future__ import annotations

import asyncio

import pytest

from dgx_music.client.tokens import find_holder
from dgx_music.storage import close_db
from tests.cli.conftest import Run

pytestmark = pytest.mark.usefixtures("migrated")


def holder_of(secret: str):
    async def find():
        try:
            return await find_holder(secret)
        finally:
            await close_db()

    return asyncio.run(find())


def test_a_token_is_printed_once(run: Run) -> None:
    made = run("token", "create", "shop", "--role", "operate")
    listed = run("token", "list", "--json")

    secret = made.out.strip()
    holder = holder_of(secret)
    assert (made.code, holder.name, holder.role) == (0, "shop", "operate")
    assert "cannot be shown again" in made.err
    assert secret not in listed.out
    assert [row["name"] for row in listed.json] == ["shop"]
    assert "sha256" not in listed.json[0]


def test_a_token_in_json_has_its_row_beside_it(run: Run) -> None:
    made = run("token", "create", "shop", "--tenant", "label-7", "--days", "90", "--json").json

    assert (made["token"][:4], made["role"], made["tenant"]) == ("dgx_", "enqueue", "label-7")
    assert made["is_valid"]
    assert made["expires_at"] > made["created_at"]


def test_a_revoked_token_is_listed_as_such(run: Run) -> None:
    secret = run("token", "create", "shop").out.strip()

    revoked = run("token", "revoke", "shop")

    assert (revoked.code, revoked.err) == (0, "The token shop is revoked.\n")
    assert holder_of(secret) is None
    assert "revoked" in run("token", "list").out


def test_no_tokens_yet(run: Run) -> None:
    assert "token create" in run("token", "list").err


@pytest.mark.parametrize(
    "arguments", [["revoke", "shop"], ["create", "shop", "--days", "0"], ["create", ""]]
)
def test_a_wrong_wish_ends_with_2(run: Run, arguments: list[str]) -> None:
    assert run("token", *arguments).code == 2
