"""The tokens of the web API: made once, kept as hashes, valid until they end."""

from __future__ import annotations

import hashlib

import pytest
from sqlalchemy import select, text, update

from dgx_music.client.tokens import (
    create_token,
    find_holder,
    has_tokens,
    list_tokens,
    revoke_token,
)
from dgx_music.errors import InvalidRequestError
from dgx_music.roles import Role
from dgx_music.storage.models import Token
from dgx_music.storage.schema import now_plus

pytestmark = pytest.mark.any_driver


async def back_date_token(database, **seconds):
    values = {column: now_plus(-float(ago)) for column, ago in seconds.items()}
    async with database.session() as session:
        await session.execute(update(Token).values(values))


async def stored(database):
    async with database.session(read_only=True) as session:
        return await session.scalar(select(Token))


async def test_a_token_is_stored_as_its_hash_only(default_database):
    made = await create_token("shop", "enqueue", tenant="label-7")

    assert made.secret.startswith("dgx_")
    assert len(made.secret) == 47
    assert made.token.sha256 == hashlib.sha256(made.secret.encode()).hexdigest()
    async with default_database.session(read_only=True) as session:
        (row,) = (await session.execute(text("SELECT * FROM tokens"))).all()
    assert made.secret not in map(str, row)


async def test_its_holder_is_found_with_role_and_tenant(default_database):
    made = await create_token("shop", "enqueue", tenant="label-7")

    holder = await find_holder(made.secret)

    assert holder is not None
    assert (holder.name, holder.role, holder.tenant) == ("shop", Role.ENQUEUE, "label-7")


@pytest.mark.parametrize("secret", ["", "dgx_", "dgx_" + "A" * 43, "x" * 10_000, "dgx_\ud800"])
async def test_nobody_holds_another_token(default_database, secret):
    await create_token("shop", "read")

    assert await find_holder(secret) is None


async def test_a_revoked_token_is_invalid_for_ever(default_database):
    made = await create_token("shop", "read")

    first = await revoke_token("shop")
    again = await revoke_token("shop")

    assert await find_holder(made.secret) is None
    assert first.revoked_at == again.revoked_at is not None
    assert [(token.name, is_valid) for token, is_valid in await list_tokens()] == [("shop", False)]


async def test_a_token_ends_with_its_time(default_database):
    made = await create_token("shop", "read", days=1)
    assert await find_holder(made.secret) is not None

    await back_date_token(default_database, expires_at=0.001)

    assert await find_holder(made.secret) is None


async def test_its_use_is_noted_once_an_hour(default_database):
    made = await create_token("shop", "read")
    await find_holder(made.secret)
    first = (await stored(default_database)).last_used_at
    await find_holder(made.secret)
    assert (await stored(default_database)).last_used_at == first

    await back_date_token(default_database, last_used_at=3_601)
    await find_holder(made.secret)

    assert (await stored(default_database)).last_used_at >= first


async def test_a_name_is_used_once(default_database):
    await create_token("shop", "read")
    await revoke_token("shop")

    with pytest.raises(InvalidRequestError, match="'shop' is taken"):
        await create_token("shop", "read")


@pytest.mark.parametrize(
    "wrong", [{"role": "admin"}, {"days": 0}, {"days": -1}, {"tenant": ""}, {"name": " "}]
)
async def test_a_wrong_wish_makes_no_token(default_database, wrong):
    wishes = {"name": "shop", "role": "read"} | wrong

    with pytest.raises(InvalidRequestError):
        await create_token(wishes.pop("name"), wishes.pop("role"), **wishes)

    assert await list_tokens() == []


async def test_an_unknown_name_cannot_be_revoked(default_database):
    with pytest.raises(InvalidRequestError, match="token list"):
        await revoke_token("shop")


async def test_whether_there_is_a_token_and_a_valid_one(default_database):
    assert not await has_tokens()
    await create_token("shop", "read")
    assert await has_tokens(valid_only=True)
    await revoke_token("shop")

    assert not await has_tokens(valid_only=True)
    assert await has_tokens()


def test_a_role_includes_the_weaker_ones():
    assert [[role.includes(other) for other in Role] for role in Role] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
