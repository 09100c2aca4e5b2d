"""A server that is away, or takes no writes for a while: one error, and no second wait for what cannot answer."""

import pytest
from sqlalchemy import text

from dgx_music.errors import DatabaseUnavailableError
from dgx_music.storage.sessions import Session
from tests.factories import POSTGRES, add_generation, on


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
    monkeypatch.setattr(Session, "rollback", lambda session: (asked.append(session), rollback(session))[1])
    with pytest.raises(DatabaseUnavailableError):
        await lose_connection(database)
    assert asked == []
