"""Another version has migrated the database under a running worker: it claims and rescues nothing, and finishes what it has."""

import pytest
from sqlalchemy import select, text

from dgx_music.errors import DatabaseNotMigratedError
from dgx_music.storage import claims, queue
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.models import Attempt
from tests.factories import (
    add_generation,
    back_date,
    claim_up_to,
    completion_of,
    read,
    read_all,
    rescue_lapsed,
    start_one,
)

BOTH_WAYS = pytest.mark.parametrize("revision", ["0001", "0003", "9999", "abc"])


async def become(database, revision):
    async with database.session() as session:
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '{revision}'"))


@BOTH_WAYS
@pytest.mark.parametrize("tenant_limit", [None, 2])
async def test_nothing_is_claimed_under_another_schema(database, revision, tenant_limit):
    async with database.session() as session:
        row = await add_generation(session, tenant="a")
    await become(database, revision)

    with pytest.raises(
        DatabaseNotMigratedError, match=f"at revision {revision} and this version needs"
    ):
        async with database.session() as session:
            await claim_up_to(session, 2, tenant_limit=tenant_limit)

    assert ((await read(database, row.id)).status, await read_all(database, select(Attempt))) == (
        "pending",
        [],
    )


async def test_the_claim_itself_compares_so_that_nothing_slips_in_between(database, monkeypatch):
    monkeypatch.setattr(claims, "check_schema", lambda session: nothing())
    async with database.session() as session:
        await add_generation(session)
    await become(database, "9999")

    async with database.session() as session:
        assert await claim_up_to(session, 2) == []


async def nothing():
    pass


async def test_what_a_lost_worker_left_is_for_those_who_know_the_schema(database):
    lease = await start_one(database)
    async with database.session() as session:
        await back_date(session, lease.generation_id, lease_expires_at=60)
    await become(database, "9999")

    async with database.session() as session:
        assert await rescue_lapsed(session) == []


async def test_a_database_at_no_revision_is_only_empty_for_now(database):
    async with database.session() as session:
        await add_generation(session)
        await session.execute(text(f"DELETE FROM {VERSION_TABLE}"))

        assert await claim_up_to(session, 2) == []


@pytest.mark.parametrize("end", ["complete", "fail", "release"])
async def test_what_runs_is_finished_under_another_schema(database, end):
    lease = await start_one(database)
    await become(database, "9999")

    async with database.session() as session:
        assert await queue.renew(session, {lease: 0.5}, lease_seconds=30.0) == {lease: False}
        match end:
            case "complete":
                assert await queue.complete(session, [completion_of(lease)]) == {lease}
            case "fail":
                assert await queue.fail(session, lease, "no", retry_in_seconds=None) == "failed"
            case "release":
                assert await queue.release(session, [lease]) == {lease: "pending"}
