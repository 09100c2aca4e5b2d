"""What who waits is told of the workers: at first, and whenever it changes."""

import pytest
from sqlalchemy import update

from dgx_music.cli.service import ServiceTeller
from dgx_music.storage import Generation, pauses
from dgx_music.storage.database import Database
from dgx_music.storage.models import WorkerInfo
from dgx_music.storage.schema import now_plus
from dgx_music.storage.workers import end_worker, register_worker
from tests.cli.conftest import Run
from tests.factories import MODEL

DESCRIBED = {
    "id": "worker-1",
    "host": "dgx",
    "pid": 4711,
    "model_name": MODEL,
    "models": [MODEL],
    "device": "",
    "slots": 1,
    "lease_seconds": 30.0,
}
START = f"; start one with: dgx-music worker --model {MODEL}"


@pytest.fixture
async def database(migrated):
    database = Database("sqlite:///data/generations.db")
    yield database
    await database.dispose()


@pytest.fixture
def teller(database):
    return ServiceTeller(database, [Generation(id="g", model_name=MODEL, prompt="")])


async def told(teller, capsys):
    await teller.tell()
    return capsys.readouterr().err.splitlines()


async def change(database, work, *arguments, **values):
    async with database.session() as session:
        await work(session, *arguments, **values)


async def test_each_change_of_who_serves_a_model_is_one_line(database, teller, capsys):
    assert await told(teller, capsys) == [f"No worker serves {MODEL} now{START}"]
    await change(database, register_worker, **DESCRIBED, state="loading")
    assert await told(teller, capsys) == [
        f"A worker is loading {MODEL}, and serves it when that is done."
    ]
    assert await told(teller, capsys) == []
    await change(database, register_worker, **DESCRIBED)
    assert await told(teller, capsys) == [f"A worker serves {MODEL} now."]
    await change(database, end_worker, **DESCRIBED, reason="The weights are damaged.")
    (line,) = await told(teller, capsys)
    assert line.startswith(
        f"No worker serves {MODEL} now (the last one ended 0 s ago: The weights are damaged)"
    )


async def test_one_worker_after_another_that_ends_is_a_line_each(database, teller, capsys):
    for name in ("first", "second"):
        await change(database, end_worker, **DESCRIBED | {"id": name}, reason=f"the {name} reason")
        (line,) = await told(teller, capsys)
        assert f"the {name} reason" in line


async def test_a_worker_that_was_killed_has_given_no_reason(database, teller, capsys):
    await change(database, register_worker, **DESCRIBED)
    assert await told(teller, capsys) == []
    async with database.session() as session:
        await session.execute(update(WorkerInfo).values(heartbeat_at=now_plus(-60)))
    (line,) = await told(teller, capsys)
    assert "(the last one was heard of 1 min ago, and did not say that it ends)" in line


async def test_a_pause_and_its_end_are_a_line_each(database, teller, capsys):
    await change(database, register_worker, **DESCRIBED)
    await change(database, pauses.pause_model, MODEL)
    assert await told(teller, capsys) == [f"{MODEL} is paused; it goes on after: dgx-music resume"]
    await change(database, pauses.resume_model, MODEL)
    assert await told(teller, capsys) == [f"{MODEL} is no longer paused."]


async def test_nothing_is_said_of_what_is_finished(teller, capsys):
    teller.note(Generation(id="g", model_name=MODEL, status="completed"))
    assert await told(teller, capsys) == []


def test_who_waits_is_told_that_the_worker_ended_and_why(run: Run, migrated, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_TONE_SPEED", "slow")  # no such speed: the engine cannot start
    # and is the first to see it
    monkeypatch.setattr("dgx_music.worker.daemon.tone.check_environment", lambda: None)
    monkeypatch.setattr("dgx_music.worker.live_engine._ENGINE_STARTS", 1)
    assert run("worker", "--engine", "tone").code == 6

    result = run("enqueue", "lofi rain", "--wait", "--timeout", 0.5)

    assert (
        result.code,
        "No worker serves musicgen-small now (the last one ended" in result.err,
    ) == (124, True)
    assert "DGX_MUSIC_TONE_SPEED" in result.err
    listed = run("workers")
    assert "ended" in listed.out
    assert "No worker is running" in listed.err
