"""A worker's process is killed between any two steps of a generation's life; another worker makes it whole."""

import signal

import pytest

from dgx_music.artifacts import LocalArtifacts
from tests.daemons import add, check_everything_is_true, rows_of, url_of
from tests.factories import add_generation, back_date, on
from tests.mortal import PROMPT, die_at, make_worker

POINTS = [
    "claim: before statement 1",
    "claim: before the commit",
    "claim: after the commit",
    "renew: before statement 1",
    "renew: before the commit",
    "renew: after the commit",
    "infer: before",
    "infer: after",
    "store: before",
    "store: in the middle of the write",
    "store: before the flush",
    "store: after the flush",
    "store: after the link",
    "store: after",
    "complete: before statement 1",
    "complete: before the commit",
    "complete: after the commit",
    "fail: before statement 1",
    "fail: before statement 2",
    "fail: before the commit",
    "fail: after the commit",
    "release: before statement 1",
    "release: before statement 2",
    "release: before the commit",
    "release: after the commit",
    "rescue: before statement 1",
    "rescue: before statement 2",
    "rescue: before the commit",
    "rescue: after the commit",
]
SQLITES = ["claim: before statement 2", "complete: before statement 2"]
"""PostgreSQL needs one statement fewer for each."""


async def leave_to_be_rescued(database, folder):
    """Leave what a worker leaves that was killed right before its completion."""
    async with database.session() as session:
        lost = await add_generation(session, prompt=PROMPT, duration_seconds=0.08, worker_id="lost")
        await back_date(session, lost.id, lease_expires_at=1)
    await LocalArtifacts(folder).publish(lost.id, 1, "wav", b"the lost attempt's")


async def check_a_kill_costs_nothing(database, folder, point):
    if point.startswith("rescue"):
        await leave_to_be_rescued(database, folder / "audio")
    else:
        await add(database, PROMPT, duration=0.08)
    assert await die_at(point, url_of(database), folder / "audio") == -signal.SIGKILL
    async with database.session() as session:
        for row in (await rows_of(database)).values():
            if row.worker_id is not None:
                await back_date(session, row.id, lease_expires_at=1)
    await make_worker(database, folder / "audio").run(drain=True)
    await check_everything_is_true(database, folder, 1)


@on("sqlite")
@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_at_any_point_of_a_generations_life_costs_nothing(database, tmp_path, point):
    await check_a_kill_costs_nothing(database, tmp_path, point)


@on("asyncpg")
@pytest.mark.parametrize(
    "point", ["claim: after the commit", "complete: after the commit", "rescue: after the commit"]
)
async def test_a_kill_costs_nothing_on_postgresql(database, tmp_path, point):
    await check_a_kill_costs_nothing(database, tmp_path, point)


@pytest.mark.soak
@on("asyncpg")
@pytest.mark.parametrize("point", POINTS)
async def test_a_kill_at_any_point_costs_nothing_on_postgresql(database, tmp_path, point):
    await check_a_kill_costs_nothing(database, tmp_path, point)


@on("sqlite")
@pytest.mark.parametrize("point", SQLITES)
async def test_a_kill_between_two_statements_of_sqlites_costs_nothing(database, tmp_path, point):
    await check_a_kill_costs_nothing(database, tmp_path, point)


@on("psycopg")
@pytest.mark.parametrize("point", ["claim: after the commit", "complete: before the commit"])
async def test_a_kill_costs_nothing_with_the_other_driver(database, tmp_path, point):
    await check_a_kill_costs_nothing(database, tmp_path, point)
