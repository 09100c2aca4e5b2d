"""A SQLite database whose file is replaced, deleted or moved under connections that are open on it."""

import os
import shutil
import sqlite3
import stat
from contextlib import closing, suppress
from pathlib import Path

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError as DriverError

from dgx_music.errors import DatabaseError, DatabaseUnavailableError
from dgx_music.storage import create_generation
from dgx_music.storage.connection import sqlite_file
from dgx_music.storage.connection.sqlite_file import DatabaseFile
from dgx_music.storage.database import Database
from dgx_music.storage.models import Generation
from tests.factories import read_all

WISH = ("lofi rain", "musicgen-small", 8.0, 32_000, 1)


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


@pytest.fixture
def path(database):
    return database.path


@pytest.fixture
async def other(database_url):
    """The same database as another process has it open."""
    other = Database(database_url)
    yield other
    await other.dispose()


async def add_one(database):
    async with database.session() as session:
        return (await create_generation(session, *WISH)).id


async def count(database):
    return (await read_all(database, select(func.count()).select_from(Generation)))[0]


def back_up(path, to):
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)
    return to


def ids_in(path):
    """Check that the file is whole; return the rows that a new connection finds in it."""
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {row_id for (row_id,) in connection.execute("SELECT id FROM generations")}


@pytest.mark.parametrize("keeps_log", [True, False])
async def test_a_file_that_is_replaced_by_its_backup_is_opened_anew(
    database, path, tmp_path, keeps_log
):
    first = await add_one(database)
    backup = back_up(path, tmp_path / "backup.db")
    await add_one(database)
    if not keeps_log:
        for end in ("-wal", "-shm"):
            Path(f"{path}{end}").unlink()
    backup.replace(path)
    later = await add_one(database)

    assert await count(database) == 2
    assert ids_in(path) == {first, later}


async def test_a_file_that_is_renamed_away_keeps_all_that_its_log_held(database, path, tmp_path):
    first = await add_one(database)
    backup = back_up(path, tmp_path / "backup.db")
    second = await add_one(database)
    path.rename(tmp_path / "former.db")
    backup.replace(path)
    later = await add_one(database)

    assert ids_in(tmp_path / "former.db") == {first, second}
    assert ids_in(path) == {first, later}


@pytest.mark.parametrize("work", [add_one, count])
async def test_a_file_that_is_deleted_is_told_and_no_empty_one_made(database, path, work):
    await add_one(database)
    path.unlink()
    for _ in range(2):
        with pytest.raises(
            DatabaseUnavailableError, match="its file is gone; put it back, or make a new one"
        ):
            await work(database)

    assert not path.exists()


async def test_a_folder_that_is_moved_away_and_back_is_found_again(database, path, tmp_path):
    first = await add_one(database)
    tmp_path.rename(elsewhere := tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    with pytest.raises(DatabaseUnavailableError, match="its file is gone"):
        await add_one(database)
    elsewhere.rename(tmp_path)
    second = await add_one(database)

    assert ids_in(path) == {first, second}


async def test_what_is_committed_into_a_file_that_is_replaced_meanwhile_is_not_acknowledged(
    database, path, tmp_path
):
    backup = back_up(path, tmp_path / "backup.db")

    async def replace_meanwhile(session):
        await create_generation(session, *WISH)
        backup.replace(path)

    with pytest.raises(
        DatabaseUnavailableError, match="replaced or deleted meanwhile, and what was being written"
    ):
        await database.transact(replace_meanwhile)
    again = await add_one(database)

    assert ids_in(path) == {again}


async def test_a_log_that_is_deleted_loses_nothing(database, path):
    before = {await add_one(database) for _ in range(3)}
    assert await count(database) == 3
    Path(f"{path}-wal").unlink()
    after = {await add_one(database) for _ in range(3)}
    await database.dispose()

    assert ids_in(path) == before | after


async def test_a_log_that_is_deleted_beside_two_processes_loses_nothing(database, other, path):
    ids = {await add_one(each) for each in (database, other)}
    Path(f"{path}-wal").unlink()
    for _ in range(3):
        ids |= {await add_one(each) for each in (database, other)}

    assert (await count(database), await count(other)) == (8, 8)
    await database.dispose()
    await other.dispose()
    assert ids_in(path) == ids


async def test_a_working_folder_that_changes_is_not_a_move(tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = Database(f"sqlite:///{path.name}")
    await add_one(relative)
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    await add_one(relative)
    await relative.dispose()

    assert len(ids_in(path)) == 2


async def test_a_file_that_is_replaced_each_time_it_is_opened_is_told(database, path, monkeypatch):
    await add_one(database)
    monkeypatch.setattr(DatabaseFile, "_is_in_place", lambda *_: False)
    with pytest.raises(
        DatabaseUnavailableError, match="its file was replaced or deleted meanwhile"
    ):
        await count(database)
    monkeypatch.undo()

    assert await count(database) == 1


async def test_connections_that_are_to_be_closed_are_not_taken_into_use_meanwhile(
    database, monkeypatch
):
    await add_one(database)
    monkeypatch.setattr(
        sqlite_file, "_call_soon", lambda opened, _work: closed.append(opened.is_left) or Done()
    )
    closed = []
    database._file.rest()

    assert closed == [True]


class Done:
    def wait(self, _seconds):
        return True


async def test_a_child_is_refused_whose_parent_could_not_close_its_connections(
    database, monkeypatch
):
    await add_one(database)
    monkeypatch.setattr(sqlite_file, "_call_soon", lambda *_: Done())
    database._file.rest()
    database._file.after_fork()

    with pytest.raises(DatabaseUnavailableError, match="this process was forked while"):
        await count(database)


@pytest.mark.parametrize("first_use", [add_one, count, Database.check_migrated, Database.revision])
@pytest.mark.parametrize(("is_private", "mode"), [(True, 0o600), (False, 0o644)])
async def test_whoever_makes_the_file_makes_it_for_whom_the_settings_say(
    tmp_path, first_use, is_private, mode
):
    before = os.umask(0o022)
    new = Database(f"sqlite:///{tmp_path / 'new.db'}", is_private=is_private)
    with suppress(DatabaseError, DriverError):
        await first_use(new)
    os.umask(before)
    await new.dispose()

    assert stat.S_IMODE((tmp_path / "new.db").stat().st_mode) == mode


async def test_a_link_to_a_file_that_is_not_there_yet_leads_to_the_new_one(tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "new.db")
    new = Database(f"sqlite:///{tmp_path / 'link.db'}")
    await new.migrate()
    await new.dispose()

    assert stat.S_IMODE((tmp_path / "new.db").stat().st_mode) == 0o600


async def test_a_link_to_the_file_may_come_to_lead_to_another(path, tmp_path):
    shutil.copy(path, tmp_path / "second.db")
    link = tmp_path / "link.db"
    link.symlink_to(path)
    linked = Database(f"sqlite:///{link}")
    await add_one(linked)
    link.unlink()
    link.symlink_to(tmp_path / "second.db")
    later = await add_one(linked)
    await linked.dispose()

    assert ids_in(tmp_path / "second.db") == {later}
