"""A server that takes no writes for a while, since it has become a replica or is told to: it is away, not misused."""

import pytest
from sqlalchemy import text

from dgx_music.errors import DatabaseUnavailableError
from tests.factories import POSTGRES, add_generation, on

pytestmark = on(*POSTGRES)


async def test_a_write_that_the_server_takes_from_nobody_is_told_as_an_outage(database):
    with pytest.raises(DatabaseUnavailableError, match="read-only transaction"):
        async with database.session() as session:
            await session.execute(text("SET TRANSACTION READ ONLY"))
            await add_generation(session)
