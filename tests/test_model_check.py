"""Whatever happens, in whatever order, what was promised holds: schedules of accidents, each from a seed."""

import pytest

from tests import model

EMPTY = 91
"""The seed of a schedule in which nobody happens to enqueue anything."""
SOAK = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(10, 131) if seed != EMPTY]


@pytest.mark.parametrize("seed", [1, 2, *SOAK])
async def test_a_schedule_of_accidents_breaks_no_promise(database_url, tmp_path, seed):
    world = await model.check_schedule(seed, database_url, tmp_path / "audio")
    assert world.known
