"""A server that is away, or takes no writes for a while: one error, and no second wait for what cannot answer."""

import pytest
from sqlalchemy import text

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage import queue
from dgx_music.storage.connection.sessions import Session
from tests.factories import POSTGRES, add_generation, back_date, on, rescue_lapsed, start_one


async def write_where_nobody_may(database):
    async with database.session() as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        await add_generation(session)


@on(*POSTGRES)
async def test_a_write_that_the_server_takes_from_nobody_is_told_as_an_outage(database):
    with pytest.raises(DatabaseUnavailableError, match="read-only transaction"):
        await write_where_nobody_may(database)


async def lose_connection(database):
    async with database.session() as session:
        await session.execute(text("SELECT 1"))
        raise DatabaseUnavailableError("it", "its connection was lost")


async def test_a_connection_that_is_lost_is_not_asked_to_roll_back(database, monkeypatch):
    asked = []
    rollback = Session.rollback
    monkeypatch.setattr(
        Session, "rollback", lambda session: (asked.append(session), rollback(session))[1]
    )
    with pytest.raises(DatabaseUnavailableError):
        await lose_connection(database)
    assert asked == []


async def wait_for_lock(database, generation_id):
    async with database.session() as session:
        await session.execute(text("SET LOCAL lock_timeout = '50ms'"))
        await queue.cancel(session, generation_id)


@on(*POSTGRES)
async def test_a_lock_that_is_not_had_in_time_is_told_as_an_outage_with_its_reason(database):
    lease = await start_one(database)
    async with database.session() as other:
        await queue.cancel(other, lease.generation_id)
        with pytest.raises(DatabaseUnavailableError, match="others are using its tables"):
            await wait_for_lock(database, lease.generation_id)


@on(*POSTGRES)
async def test_a_rescue_passes_over_a_row_that_a_caller_has_locked(database):
    async with database.session() as session:
        rows = [await add_generation(session, worker_id="lost") for _ in range(2)]
        for row in rows:
            await back_date(session, row.id, lease_expires_at=1)
    async with database.session() as caller:
        await queue.cancel(caller, rows[0].id)
        rescued = await database.transact(rescue_lapsed)
    assert [item.lease.generation_id for item in rescued] == [rows[1].id]
