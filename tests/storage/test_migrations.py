"""The migrations: up from nothing, down and up again with rows in place, from the library, the command line and the wheel."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, select

from dgx_music.storage import create_generation, migrations
from dgx_music.storage.models import Attempt, Base, Generation, Prompt
from dgx_music.storage.schema import SCHEMA_REVISION, VERSION_TABLE
from tests.factories import ROOT, Program, read_all, start_one


async def on(database, work):
    """Run the work on a connection, in one transaction."""
    async with database.engine.begin() as connection:
        return await connection.run_sync(work)


def tables_of(connection):
    return sorted(inspect(connection).get_table_names())


def differences(connection):
    """Return what an automatic migration would change."""

    def include(_object, name, kind, _reflected, _compared):
        return name != VERSION_TABLE and not (kind == "index" and name == "ix_generations_claim")

    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "include_object": include, "compare_type": True}
    )
    return compare_metadata(context, Base.metadata)


def test_the_schema_revision_is_the_newest_migration():
    assert migrations.head() == SCHEMA_REVISION


async def test_migrating_up_from_nothing_gives_what_the_models_say(database):
    assert await on(database, differences) == []
    assert await on(database, tables_of) == sorted([*Base.metadata.tables, VERSION_TABLE])
    assert await database.revision() == SCHEMA_REVISION


async def test_down_and_up_again_works_with_rows_in_place(database):
    await start_one(database)

    await on(database, lambda connection: migrations.downgrade(connection, "base"))
    assert await on(database, tables_of) == [VERSION_TABLE]
    assert await database.revision() is None
    await database.migrate()

    assert await on(database, differences) == []
    assert await read_all(database, select(Generation)) == []


async def test_a_migration_that_has_nothing_to_do_keeps_the_rows(database):
    lease = await start_one(database)

    await on(database, migrations.upgrade)

    assert await read_all(database, select(Attempt.generation_id)) == [lease.generation_id]


async def test_a_migration_that_fails_leaves_everything_as_it_was(database):
    async with database.session() as session:
        await create_generation(session, "lofi rain", "musicgen-small", 8.0, 32_000, 1)

    def down_and_fail(connection):
        migrations.downgrade(connection, "base")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await on(database, down_and_fail)

    await database.check_migrated()
    assert await read_all(database, select(Prompt.text)) == ["lofi rain"]


async def test_other_tables_in_the_database_are_left_alone(database):
    theirs = "CREATE TABLE theirs (id INTEGER)"
    await on(database, lambda connection: connection.exec_driver_sql(theirs))
    await on(database, lambda connection: migrations.downgrade(connection, "base"))
    await database.reset()

    assert "theirs" in await on(database, tables_of)


async def test_processes_that_migrate_at_once_all_succeed(tmp_path):
    url = f"sqlite:///{tmp_path / 'folder' / 'new.db'}"
    programs = [await Program.start("migrate", url) for _ in range(3)]
    for program in programs:
        program.begin()

    assert [await program.rest() for program in programs] == [[SCHEMA_REVISION]] * 3


# Alembic's command line


@pytest.fixture
def alembic(tmp_path):
    """Return a function that runs Alembic's command line in a copy of the repository's root."""
    shutil.copy(ROOT / "alembic.ini", tmp_path)
    shutil.copytree(ROOT / "migrations", tmp_path / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path / 'data' / 'cli.db'}"}

    def run(*commands):
        program = "import sys; from alembic.config import main\nfor line in sys.argv[1:]: main(line.split())"
        done = subprocess.run(
            [sys.executable, "-c", program, *commands], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_alembics_commands_work_from_the_repositorys_root(alembic, tmp_path):
    output = alembic("upgrade head", "current", "check", "downgrade -1", "upgrade head")

    assert f"{SCHEMA_REVISION} (head)" in output
    assert "No new upgrade operations detected" in output
    assert (tmp_path / "data" / "cli.db").exists()


def test_an_automatic_migration_of_an_unchanged_schema_is_empty(alembic, tmp_path):
    alembic("upgrade head", "revision --autogenerate -m nothing --rev-id 0002")

    (script,) = (tmp_path / "migrations" / "versions").glob("0002_nothing.py")
    assert script.read_text().count("pass") == 2


def test_migrations_on_paper_are_refused(tmp_path):
    command = [sys.executable, "-m", "alembic", "upgrade", "head", "--sql"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Migrations run on a live database only: leave out --sql."


# the wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def installed(wheel, tmp_path):
    """The Python of an environment with the wheel, and with what it depends on but not the source tree."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, "--target", str(packages), str(wheel)], check=True)
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]))
    return tmp_path / "env" / "bin" / "python"


PROGRAM = """
import asyncio, dgx_music
from dgx_music.storage import init_db, migrations
async def main():
    database = await init_db()
    await database.check_migrated()
    await database.dispose()
    print(dgx_music.__file__, migrations.folder(), sep="\\n")
asyncio.run(main())
"""


def test_the_installed_wheel_migrates_with_its_own_migrations(installed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    output = subprocess.check_output([installed, "-c", PROGRAM], cwd=tmp_path / "elsewhere", text=True)

    package, folder = map(Path, output.splitlines())
    assert folder == package.parent / "_migrations"
    assert package.is_relative_to(tmp_path / "env")
    assert (tmp_path / "elsewhere" / "data" / "generations.db").exists()


def test_the_wheel_has_the_migrations_and_says_that_it_is_typed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())

    assert {
        f"dgx_music/_migrations/{name}" for name in ("env.py", "script.py.mako", "versions/0001_first_tables.py")
    } <= names
    assert "dgx_music/py.typed" in names
    assert not any("__pycache__" in name or name.startswith(("tests", "worker")) for name in names)
