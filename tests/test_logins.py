"""The log-ins of the page: kept as hashes, and valid no longer than their tokens."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, text, update

from dgx_music.client.logins import find_visitor, log_in, log_out
from dgx_music.client.tokens import create_token, revoke_token
from dgx_music.storage.models import Login
from dgx_music.storage.schema import now_plus

pytestmark = pytest.mark.any_driver


async def end_all(database):
    async with database.session() as session:
        await session.execute(update(Login).values(expires_at=now_plus(-1.0)))


async def test_whoever_logs_in_is_found_with_role_and_tenant(default_database):
    token = await create_token("shop", "enqueue", tenant="label-7")

    visitor = await find_visitor(await log_in(token.secret))

    assert (visitor.name, visitor.role, visitor.tenant) == ("shop", "enqueue", "label-7")


async def test_a_login_is_stored_as_its_hash_only(default_database):
    secret = await log_in((await create_token("shop", "read")).secret)

    async with default_database.session(read_only=True) as session:
        (row,) = (await session.execute(text("SELECT * FROM logins"))).all()
    assert secret not in map(str, row)


@pytest.mark.parametrize("wrong", ["", "x", "dgx_" + "a" * 43, "ä" * 43])
async def test_no_other_text_logs_in_or_is_a_login(default_database, wrong):
    assert await log_in(wrong) is None
    assert await find_visitor(wrong) is None
    await log_out(wrong)


async def test_a_token_is_no_login(default_database):
    token = await create_token("shop", "read")

    assert await find_visitor(token.secret) is None


async def test_a_login_ends_with_its_token(default_database):
    secret = await log_in((await create_token("shop", "read")).secret)
    await revoke_token("shop")

    assert await find_visitor(secret) is None


async def test_a_login_ends_when_it_is_ended(default_database):
    secret = await log_in((await create_token("shop", "read")).secret)
    await log_out(secret)

    assert await find_visitor(secret) is None


async def test_a_login_ends_by_itself_and_is_deleted_by_the_next_one(default_database):
    token = await create_token("shop", "read")
    secret = await log_in(token.secret)
    await end_all(default_database)
    assert await find_visitor(secret) is None

    await log_in(token.secret)

    async with default_database.session(read_only=True) as session:
        assert await session.scalar(select(func.count()).select_from(Login)) == 1
