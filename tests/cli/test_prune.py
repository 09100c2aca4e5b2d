from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import update

from dgx_music.storage import Clip
from dgx_music.storage.clips import keep_clips
from dgx_music.storage.schema import now_plus
from tests.cli.conftest import Run, Spawn, add, count_rows, opened_default

pytestmark = pytest.mark.usefixtures("migrated")


def test_prune_needs_to_be_told_how_long_to_keep(run: Run) -> None:
    result = run("prune")

    assert (result.code, "--failed-days 7" in result.err) == (2, True)


@pytest.mark.parametrize("days", ["-1", "nan", "1e9"])
def test_days_that_are_no_length_of_time_end_2(run: Run, days: str) -> None:
    add("lofi rain", status="failed")

    assert (run("prune", "--failed-days", days).code, count_rows()) == (2, 1)


def test_a_dry_run_only_counts(run: Run) -> None:
    add("a", "b", status="failed")

    assert run("prune", "--failed-days", 0, "--dry-run", "--json").json == {
        "failed": 2,
        "uploads": 0,
        "clips": 0,
        "batches": 0,
    }
    assert "Would delete 2 failed" in run("prune", "--failed-days", 0, "--dry-run").err
    assert count_rows() == 2


def test_what_is_older_goes_with_its_audio_and_the_rest_stays(run: Run) -> None:
    (gone,) = add("a", status="completed", attempt=1)
    add("b", status="cancelled")
    Path("audio").mkdir()
    file = Path(f"audio/{gone}-1.wav")
    file.write_text("music")

    result = run(
        "prune", "--completed-days", 0, "--failed-days", 0, "--output", "audio", "--yes", "--json"
    )

    assert result.json == {"completed": 1, "failed": 0, "uploads": 0, "clips": 0, "batches": 0}
    assert (file.exists(), count_rows()) == (False, 1)


def test_on_a_terminal_a_no_deletes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    add("a", status="failed")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda question, err: False)

    result = run("prune", "--failed-days", 0)

    assert (result.code, result.err, count_rows()) == (1, "Nothing was changed.\n", 1)


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("prune --completed-days 0", "y\n"),
        ("prune --orphans --output audio", "n\n"),
        ("prune --orphans --output audio", "y\n"),
        ("db reset", ""),
        ("db reset", "y\n"),
    ],
)
def test_what_a_pipe_says_is_nobodys_answer(spawn: Spawn, command: str, answer: str) -> None:
    (kept,) = add("a", status="completed", attempt=1)
    files = [put_old_file(f"{owner}-1.wav") for owner in (kept, uuid4())]

    process = spawn(*command.split(), stdin=subprocess.PIPE)
    talk = process.communicate(answer)[1]

    assert (
        talk == "Error: --yes is missing and there is no terminal to ask on; add it to go ahead.\n"
    )
    assert (process.returncode, all(file.exists() for file in files), count_rows()) == (2, True, 1)


def put_old_file(name: str) -> Path:
    file = Path("audio", name)
    file.parent.mkdir(exist_ok=True)
    file.write_text("music")
    os.utime(file, (0, 0))
    return file


def test_orphans_go_where_that_is_agreed(run: Run) -> None:
    (kept,) = add("a", status="completed", attempt=1)
    files = [put_old_file(f"{owner}-1.wav") for owner in (kept, uuid4())]
    options = ("prune", "--orphans", "--output", "audio")

    assert run(*options).code == 2
    assert run(*options, "--dry-run", "--json").json == {
        "orphans": 1,
        "uploads": 0,
        "clips": 0,
        "batches": 0,
    }
    assert "Deleted 1 orphans." in run(*options, "--yes").err
    assert [file.exists() for file in files] == [True, False]


def test_where_nothing_is_an_orphan_nobody_has_to_agree(run: Run) -> None:
    assert run("prune", "--orphans", "--json").json == {
        "orphans": 0,
        "uploads": 0,
        "clips": 0,
        "batches": 0,
    }


def test_clips_that_nobody_has_used_for_a_day_go_too(run: Run) -> None:
    keep_old_clip()

    assert run("prune", "--failed-days", 1, "--dry-run", "--json").json == {
        "failed": 0,
        "uploads": 0,
        "clips": 1,
        "batches": 0,
    }
    assert "Deleted 0 failed, 1 clips." in run("prune", "--failed-days", 1, "--yes").err
    assert "clips" not in run("prune", "--failed-days", 1).err


def keep_old_clip() -> None:
    async def keep() -> None:
        async with opened_default() as database, database.session() as session:
            await keep_clips(session, {"a" * 64: (b"fLaC", 1.0)})
            await session.execute(update(Clip).values(last_used_at=now_plus(-1e6)))

    asyncio.run(keep())


def test_a_batch_goes_with_its_last_generation(run: Run) -> None:
    Path("prompts.txt").write_text("a\nb\n")
    for generation_id in run("enqueue", "--file", "prompts.txt").out.split():
        run("cancel", generation_id)

    result = run("prune", "--cancelled-days", 0, "--yes", "--json")

    assert result.json == {"cancelled": 2, "uploads": 0, "clips": 0, "batches": 1}
    assert run("batches", "--json").json == []
