"""A warm connection is handed out at once; all others come in SQLAlchemy's own way."""

import pytest
from sqlalchemy.util import greenlet_spawn

from tests.factories import on

BOTH = on("sqlite", "asyncpg")


@pytest.fixture
async def pool(database):
    """The pool of the writing engine, with one connection at rest."""
    engine = database.engine.sync_engine
    (await greenlet_spawn(engine.raw_connection)).close()
    return engine.pool


def good(_entry):
    return True


def nothing(_entry):
    pass


@BOTH
async def test_a_connection_at_rest_is_given_once_until_it_is_closed(pool):
    warm = pool.take(good, nothing)

    assert pool.take(good, nothing) is None
    warm.close()
    again = pool.take(good, nothing)
    assert again.dbapi_connection is warm.dbapi_connection
    again.close()


@BOTH
async def test_a_connection_that_is_not_good_stays_in_the_pool(pool):
    assert pool.take(lambda _entry: False, nothing) is None
    assert pool.checkedin() == 1


@BOTH
async def test_a_connection_that_cannot_be_judged_stays_in_the_pool(pool):
    def fail(_entry):
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        pool.take(fail, nothing)
    assert pool.checkedin() == 1


@BOTH
async def test_a_connection_that_was_closed_is_not_given(pool):
    warm = pool.take(good, nothing)
    await greenlet_spawn(warm.invalidate)
    warm.close()

    assert pool.take(good, nothing) is None
    assert pool.checkedin() == 1


@on("asyncpg")
async def test_a_lost_connection_makes_the_others_untrusted(database, pool):
    connect = database.engine.sync_engine.raw_connection
    first, second = await greenlet_spawn(connect), await greenlet_spawn(connect)
    second.close()

    await greenlet_spawn(pool._invalidate, first, OSError())
    opened_again = await greenlet_spawn(connect)

    assert pool.checkedin() == 1
    assert pool.take(good, nothing) is None
    opened_again.close()
