"""Which connections the pool asks whether they live, before it hands them out again."""

import pytest
from sqlalchemy import func, select

from dgx_music.storage.connection import postgres
from dgx_music.storage.models import Generation
from tests.factories import POSTGRES, on


@pytest.fixture
def asked(monkeypatch):
    """The connections that were asked, as often as they were."""
    asked = []

    def answers(dialect, connection, answers=postgres._answers):
        asked.append(connection)
        return answers(dialect, connection)

    monkeypatch.setattr(postgres, "_answers", answers)
    return asked


async def look(database):
    async with database.session(read_only=True) as session:
        return list(await session.scalars(select(Generation)))


@on(*POSTGRES)
async def test_a_new_connection_is_not_asked(database, asked):
    await look(database)

    assert asked == []


@on("asyncpg")
async def test_a_connection_that_was_in_use_a_moment_ago_is_not_asked(database, asked):
    for _ in range(3):
        await look(database)

    assert asked == []


@on(*POSTGRES)
async def test_a_connection_that_has_rested_is_asked_each_time(database, asked, monkeypatch):
    monkeypatch.setattr(postgres, "_TRUSTED_SECONDS", 0.0)
    for _ in range(3):
        await look(database)

    assert len(asked) == 2


@on(*POSTGRES)
async def test_one_that_does_not_answer_is_replaced(database, monkeypatch):
    monkeypatch.setattr(postgres, "_TRUSTED_SECONDS", 0.0)
    former = await backend_pid(database)
    monkeypatch.setattr(postgres, "_answers", lambda dialect, connection: False)

    assert await backend_pid(database) != former


async def backend_pid(database):
    async with database.session(read_only=True) as session:
        return await session.scalar(select(func.pg_backend_pid()))
