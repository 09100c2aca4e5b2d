"""What only SQLite needs: the recipe of its connections, its files, and a process that dies in mid-write."""

import asyncio
import errno
import os
import shutil
import sqlite3
import stat
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import aiosqlite
import anyio
import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.ext.asyncio import create_async_engine

from dgx_music.config import load_settings
from dgx_music.errors import ConfigurationError, DatabaseUnavailableError
from dgx_music.storage import (
    configure_sqlite,
    count_generations,
    create_generation,
    due,
    migrations,
    queue,
    retention,
)
from dgx_music.storage.connection import sqlite
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.database import Database
from dgx_music.storage.insertion import _ARE_STORED, _HAVE_KEYS
from dgx_music.storage.models import Base, Generation
from dgx_music.storage.workers import get_workers
from tests.factories import MODEL, Program, add_generation, claim_up_to, read_all
from tests.patience import PATIENCE
from tests.storage.plans import plan_of

WISH = ("lofi rain", "musicgen-small", 8.0, 32_000, 1)


@pytest.fixture
def database_url(sqlite_url):
    return sqlite_url


@pytest.fixture
def path(database):
    return database.path


@pytest.fixture
def impatient(monkeypatch):
    """Make connections give up on a lock at once."""
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_SECONDS", 0)


async def refusal(url):
    """Return the sentence with which a database is refused."""
    refused = Database(url)
    with pytest.raises(DatabaseUnavailableError) as caught:
        await refused.migrate()
    await refused.dispose()
    return str(caught.value)


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        ("journal_mode", "wal"),
        ("synchronous", 2),
        ("foreign_keys", 1),
        ("busy_timeout", 30_000),
        ("mmap_size", 0),
        ("temp_store", 2),
    ],
)
async def test_every_connection_is_set_up(database, pragma, value, read_only):
    async with database.session(read_only=read_only) as session:
        assert await session.scalar(text(f"PRAGMA {pragma}")) == value


async def test_an_engine_of_the_callers_own_is_set_up(path):
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
    configure_sqlite(engine)
    async with engine.connect() as connection:
        assert await connection.scalar(text("PRAGMA synchronous")) == 2
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            sqlite3.connect(path, timeout=0).execute("BEGIN IMMEDIATE")
    await engine.dispose()


@pytest.mark.parametrize(("read_only", "is_locked"), [(False, True), (True, False)])
async def test_only_a_writing_session_takes_the_write_lock_and_takes_it_at_once(
    database, path, read_only, is_locked
):
    raw = sqlite3.connect(path, timeout=0)
    async with database.session(read_only=read_only) as session:
        await session.scalar(select(func.count()).select_from(Generation))
        try:
            raw.execute("BEGIN IMMEDIATE")
            assert not is_locked
        except sqlite3.OperationalError:
            assert is_locked
        raw.rollback()
    raw.close()


async def test_a_foreign_key_is_enforced(database):
    async with database.session() as session:
        assert await session.scalar(text("PRAGMA foreign_key_check")) is None
        with pytest.raises(Exception, match="FOREIGN KEY constraint failed"):
            await session.execute(
                text(
                    "INSERT INTO attempts (generation_id, attempt, worker_id) VALUES ('x', 1, 'w')"
                )
            )
        await session.rollback()


async def test_a_database_in_memory_works_for_a_single_session(impatient):
    memory = Database("sqlite://")
    await memory.migrate()
    async with memory.session() as session:
        await create_generation(session, *WISH)

    assert len(await read_all(memory, select(Generation))) == 1
    assert (memory.path, len(memory.engines)) == (None, 1)
    await memory.dispose()


@pytest.fixture
def read_in_old_mode(tmp_path):
    """A connection that reads a file that is not in WAL mode yet."""
    raw = sqlite3.connect(tmp_path / "old.db", isolation_level=None)
    raw.execute("CREATE TABLE theirs (id INTEGER)")
    raw.execute("BEGIN")
    raw.execute("SELECT * FROM theirs").fetchall()
    yield raw
    raw.close()


async def test_a_switch_to_wal_waits_until_nobody_else_is_in_the_file(tmp_path, read_in_old_mode):
    old = Database(f"sqlite:///{tmp_path / 'old.db'}")
    looking = asyncio.create_task(old.revision())
    await asyncio.wait([looking], timeout=0.1)
    assert not looking.done()
    read_in_old_mode.execute("COMMIT")

    with anyio.fail_after(PATIENCE):
        assert await looking is None
    await old.dispose()


class BusyAtFirst:
    """A connection and its cursor that answer as SQLite does if two switch a new file at once."""

    def __init__(self, code):
        self.answers = [
            sqlite3.OperationalError("database is locked"),
            sqlite3.OperationalError("database is locked"),
        ]
        for error in self.answers:
            error.sqlite_errorcode = code

    def cursor(self):
        return self

    def execute(self, statement):
        if "journal_mode" in statement and self.answers:
            raise self.answers.pop()

    def close(self):
        pass

    def run_async(self, work):
        work(self).close()


def test_a_switch_to_wal_that_is_refused_without_waiting_is_tried_again():
    busy = BusyAtFirst(sqlite3.SQLITE_BUSY)
    sqlite._set_up_connection(busy, None)

    assert busy.answers == []


def test_a_switch_to_wal_that_fails_otherwise_is_not_tried_again():
    broken = BusyAtFirst(sqlite3.SQLITE_IOERR)
    with pytest.raises(sqlite3.OperationalError):
        sqlite._set_up_connection(broken, None)

    assert len(broken.answers) == 1


async def test_a_switch_to_wal_is_given_up_in_one_sentence(impatient, tmp_path, read_in_old_mode):
    assert (await refusal(f"sqlite:///{tmp_path / 'old.db'}")).endswith(
        "cannot be used: database is locked."
    )


# files


async def test_the_folders_of_a_new_database_are_created(tmp_path):
    new = Database(f"sqlite:///{tmp_path / 'a' / 'b' / 'new.db'}")
    await new.migrate()
    await new.dispose()

    assert (tmp_path / "a" / "b" / "new.db").exists()


@pytest.mark.parametrize(
    ("is_private", "folder_mode", "file_mode"), [(True, 0o700, 0o600), (False, 0o755, 0o644)]
)
async def test_a_new_database_is_its_owners_or_as_the_umask_says(
    tmp_path, is_private, folder_mode, file_mode
):
    before = os.umask(0o022)
    new = Database(f"sqlite:///{tmp_path / 'a' / 'b' / 'new.db'}", is_private=is_private)
    try:
        await new.migrate()
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").rglob("*")
        }
    finally:
        os.umask(before)
        await new.dispose()

    assert modes == {
        "b": folder_mode,
        **dict.fromkeys(["new.db", "new.db-wal", "new.db-shm"], file_mode),
    }


async def test_a_database_that_was_there_keeps_its_mode(database, path):
    path.chmod(0o640)

    await database.migrate()

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["50% off.db", "a#b.db", "naïve ♫.db", "file:x.db"])
async def test_a_file_may_have_any_name(tmp_path, name):
    odd = Database(f"sqlite:///{tmp_path / name}")
    await odd.migrate()
    await odd.dispose()

    assert (tmp_path / name).exists()


async def test_a_folder_that_cannot_be_created_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")

    assert await refusal(f"sqlite:///{tmp_path}/file/new.db") == (
        f"The database sqlite:///{tmp_path}/file/new.db cannot be used: its folder cannot be created (File exists)."
    )


async def test_a_folder_in_the_files_place_is_one_sentence(tmp_path):
    assert (await refusal(f"sqlite:///{tmp_path}")).endswith(
        "cannot be used: unable to open database file."
    )


def test_a_file_that_cannot_be_opened_leaves_no_thread_to_complain(tmp_path, monkeypatch):
    complaints = []
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    for _ in range(100):
        with asyncio.Runner() as runner:
            runner.run(refusal(f"sqlite:///{tmp_path}"))

    assert complaints == []


@pytest.mark.parametrize(
    "content",
    [b"this is a text file, and no database at all" * 50, b"SQLite format 3\0" + b"\xff" * 4080],
)
async def test_a_file_that_is_no_database_is_one_sentence(tmp_path, content):
    (tmp_path / "x.db").write_bytes(content)

    assert (await refusal(f"sqlite:///{tmp_path / 'x.db'}")).endswith(
        "cannot be used: file is not a database."
    )


async def test_a_damaged_database_is_one_sentence(path, database):
    await database.dispose()
    damaged = bytearray(path.read_bytes())
    damaged[4096:] = b"\x55" * (len(damaged) - 4096)
    path.write_bytes(damaged)

    with pytest.raises(
        DatabaseUnavailableError, match=r"cannot be used: database disk image is malformed\.$"
    ):
        await read_all(database, select(Generation))


async def test_a_database_that_cannot_be_written_is_one_sentence(database):
    async with database.engine.connect() as connection:
        await connection.execute(text("PRAGMA query_only = ON"))

    with pytest.raises(
        DatabaseUnavailableError, match=r"cannot be used: attempt to write a readonly database\.$"
    ):
        await add_one(database)


async def add_one(database):
    async with database.session() as session:
        return await create_generation(session, *WISH)


async def test_a_lock_that_is_held_too_long_is_one_sentence(impatient, database, path):
    raw = sqlite3.connect(path)
    raw.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailableError, match=r"cannot be used: database is locked\.$"):
        await add_one(database)
    raw.close()

    assert (await add_one(database)).is_pending


async def test_a_session_inside_another_is_one_sentence(monkeypatch, database):
    monkeypatch.setattr(database.engine.pool, "_timeout", 0.05)

    async with database.session() as session:
        await create_generation(session, *WISH)
        with pytest.raises(DatabaseUnavailableError, match="all its connections are in use"):
            await add_one(database)


async def test_who_waits_behind_one_that_waits_for_another_process_is_told_so(
    monkeypatch, database, path
):
    monkeypatch.setattr(database.engine.pool, "_timeout", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute("BEGIN IMMEDIATE")
        first = asyncio.create_task(add_one(database))
        await asyncio.wait([first], timeout=0.1)
        with pytest.raises(
            DatabaseUnavailableError,
            match="another process has it locked, and others of this one wait",
        ):
            await add_one(database)
        raw.rollback()

    assert (await first).is_pending


async def test_a_full_disk_is_one_sentence_and_nothing_is_acknowledged(database, path):
    async with database.engine.connect() as connection:
        pages = await connection.scalar(text("PRAGMA page_count"))
        await connection.execute(text(f"PRAGMA max_page_count = {pages}"))
    told = []

    async def add_until_it_is_full():
        while True:
            told.append((await add_one(database)).id)

    with pytest.raises(
        DatabaseUnavailableError, match=r"cannot be used: database or disk is full\.$"
    ):
        await add_until_it_is_full()
    async with database.engine.connect() as connection:
        await connection.execute(text("PRAGMA max_page_count = 1000000"))

    assert set(told) == set(await read_all(database, select(Generation.id)))
    assert (await add_one(database)).is_pending


@pytest.mark.parametrize(
    ("free", "why"), [(0, "database or disk is full"), (10**9, "disk I/O error")]
)
def test_what_cannot_be_written_on_a_full_disk_is_told_as_a_full_disk(
    tmp_path, monkeypatch, free, why
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    database = Database(f"sqlite:///{tmp_path / 'x.db'}")

    with pytest.raises(DatabaseUnavailableError, match=rf"cannot be used: {why}\.$"):
        database._explain(error)


def test_the_driver_has_the_private_parts_that_are_used_of_it(tmp_path):
    connection = aiosqlite.connect(tmp_path / "x.db")

    assert {"_tx", "_conn", "stop"} <= {*dir(connection)}
    assert hasattr(connection._tx, "put_nowait")


@pytest.mark.parametrize("cannot_link", [False, True])
def test_a_backup_never_stands_in_anothers_place(path, tmp_path, monkeypatch, cannot_link):
    if cannot_link:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "kept.db").write_text("kept")
    with pytest.raises(FileExistsError):
        sqlite.back_up(path, tmp_path / "kept.db")
    sqlite.back_up(path, tmp_path / "new.db")

    assert (tmp_path / "kept.db").read_text() == "kept"
    assert stat.S_IMODE((tmp_path / "new.db").stat().st_mode) == 0o600
    assert not [*tmp_path.glob("*.part-*")]


def test_a_backup_is_made_where_a_folder_cannot_be_flushed(path, tmp_path, monkeypatch):
    flushed = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    sqlite.back_up(path, tmp_path / "new.db")
    assert (tmp_path / "new.db").stat().st_size > 0


def refuse(*_arguments):
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("failing", ["copy", "place"])
def test_a_backup_that_fails_leaves_no_file(path, tmp_path, monkeypatch, failing):
    monkeypatch.setattr(*{"copy": (sqlite, "_copy"), "place": (Path, "replace")}[failing], refuse)
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(PermissionError):
        sqlite.back_up(path, tmp_path / "new.db")

    assert not [*tmp_path.glob("new.db*")]


@pytest.mark.parametrize(
    ("version", "is_warned"), [((3, 40, 1), True), ((3, 51, 2), True), ((3, 51, 3), False)]
)
def test_an_old_sqlite_is_warned_of(monkeypatch, version, is_warned):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)

    assert (sqlite.warn_of_old_sqlite() is not None) == is_warned


# the schema, to the letter


def schema_of(path):
    """Return what SQLite keeps of the schema: the statements that made it, white space aside."""
    connection = sqlite3.connect(path)
    rows = connection.execute(
        "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"
    ).fetchall()
    connection.close()
    return {
        name: " ".join(sql.split())
        for name, sql in rows
        if name not in (VERSION_TABLE, "sqlite_sequence")
    }


def columns_of(path, table):
    connection = sqlite3.connect(path)
    rows = connection.execute(f"PRAGMA table_xinfo({table})").fetchall()
    connection.close()
    return sorted(row[1:] for row in rows)  # a column that a migration adds is the last one


@pytest.fixture
async def from_models(tmp_path):
    """A file with the tables that the models say."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'models.db'}")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()
    return tmp_path / "models.db"


def test_migrated_indexes_are_the_models_to_the_letter(migrated_file, from_models):
    migrated, modelled = schema_of(migrated_file), schema_of(from_models)

    assert {name: sql for name, sql in migrated.items() if name.startswith("ix_")} == {
        name: sql for name, sql in modelled.items() if name.startswith("ix_")
    }
    assert migrated["ix_generations_claim"] == (
        "CREATE INDEX ix_generations_claim ON generations "
        "(model_name, (julianday(run_at) * 86400.0 - priority * 60), id) WHERE status = 'pending'"
    )


@pytest.mark.parametrize("table", Base.metadata.tables)
def test_migrated_tables_are_the_models_to_the_letter(migrated_file, from_models, table):
    migrated, modelled = schema_of(migrated_file)[table], schema_of(from_models)[table]

    assert columns_of(migrated_file, table) == columns_of(from_models, table)
    assert clauses_of(migrated) == clauses_of(modelled)
    assert foreign_keys_of(migrated_file, table) == foreign_keys_of(from_models, table)


def clauses_of(sql):
    """Return the constraints as they are written; foreign keys stand elsewhere in a table that has grown."""
    return sorted(
        whole(clause) for clause in sql.split("CONSTRAINT")[1:] if "REFERENCES" not in clause
    )


def whole(clause):
    """Return a constraint up to its closing bracket: columns of later migrations come after it."""
    depth = 0
    for at, character in enumerate(clause):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0 and character == ")":
            return clause[: at + 1].strip()
    return clause.strip(" ,)")


def foreign_keys_of(path, table):
    with closing(sqlite3.connect(path)) as connection:
        return sorted(key[2:] for key in connection.execute(f"PRAGMA foreign_key_list({table})"))


async def plan_of_claim(database, statistics, **options):
    """Return the steps of a claim's plan, with statistics or without."""
    async with database.session() as session:
        for number in range(50):
            await add_generation(
                session, tenant="ab"[number % 2], status=["pending", "completed"][number // 2 % 2]
            )
        await session.execute(text(statistics or "SELECT 1"))
    statements = []
    event.listen(
        database.engine.sync_engine,
        "before_cursor_execute",
        lambda *call: statements.append(call[2:4]),
    )
    async with database.session() as session:
        await claim_up_to(session, 5, **options)
    [(sql, values)] = [(sql, values) for sql, values in statements if "UPDATE" in sql]
    with sqlite3.connect(database.path) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    connection.close()
    return plan


@pytest.mark.parametrize("statistics", ["", "ANALYZE"])
async def test_the_claim_reads_its_index_in_order_and_sorts_nothing(database, statistics):
    assert (await plan_of_claim(database, statistics))[1:] == [
        "SEARCH generations USING INDEX ix_generations_claim (model_name=?)",
        "SCALAR SUBQUERY 1",
        "SEARCH pauses USING COVERING INDEX sqlite_autoindex_pauses_1 (model_name=?)",
        "SCAN chosen",
        "SCALAR SUBQUERY 3",
        f"SEARCH {VERSION_TABLE} USING COVERING INDEX sqlite_autoindex_{VERSION_TABLE}_1 (version_num=?)",
        "SEARCH generations USING INDEX sqlite_autoindex_generations_1 (id=?)",
    ]


@pytest.mark.parametrize("statistics", ["", "ANALYZE"])
async def test_a_claim_under_a_tenant_limit_reads_each_tenants_own_queue_and_sorts_only_what_it_found(
    database, statistics
):
    plan = await plan_of_claim(database, statistics, tenant_limit=2)

    queue = "ix_generations_tenant_claim (model_name=? AND tenant>? AND tenant<?)"
    assert [step for step in plan if step.startswith("SEARCH queue")] == [
        f"SEARCH queue USING INDEX {queue}"
    ]
    assert not [step for step in plan if step.startswith("SCAN generations")]
    assert sum("TEMP B-TREE FOR ORDER BY" in step for step in plan) == 1


@pytest.mark.parametrize(
    "look",
    [
        lambda session: due.has_work(session, [MODEL]),
        lambda session: queue.find_cancel_requests(session, "worker-1"),
        lambda session: queue.find_leases(session),
        lambda session: get_workers(session),
        lambda session: count_generations(session, "processing"),
    ],
)
async def test_what_runs_is_found_by_the_index_of_statuses(database, look):
    plan = await plan_of(database, look)

    assert "ix_generations_status_created_at (status=?)" in plan
    assert "SCAN generations" not in plan


async def steps_of(database, work):
    """Return the steps at the generations of all statements of the work; nothing of it is kept."""
    statements = []
    listen_to = database.engine.sync_engine
    event.listen(listen_to, "before_cursor_execute", lambda *call: statements.append(call[2:4]))
    async with database.session() as session:
        await work(session)
        await session.rollback()
    with closing(sqlite3.connect(database.path)) as connection:
        plans = [
            connection.execute(f"EXPLAIN QUERY PLAN {sql}", values) for sql, values in statements
        ]
        return [row[3] for plan in plans for row in plan if " generations" in row[3]]


LEASES = [queue.Lease(f"g-{number}", 1) for number in range(20)]


@pytest.mark.parametrize(
    "work",
    [
        lambda session: queue.renew(session, dict.fromkeys(LEASES, 0.5), lease_seconds=30),
        lambda session: queue.release(session, LEASES),
        lambda session: queue.fail(session, LEASES[0], "no", retry_in_seconds=1.0),
        lambda session: retention.find_files(session, LEASES),
        lambda session: retention.prune(session, LEASES),
        lambda session: retention.find_completed_files(session, after_id="", limit=10),
    ],
)
async def test_rows_that_are_known_by_id_are_found_by_id(database, work):
    steps = await steps_of(database, work)

    assert steps
    assert {step.partition(" USING ")[2].split()[1] for step in steps} == {
        "sqlite_autoindex_generations_1"
    }


@pytest.mark.parametrize(
    ("statement", "name", "condition"),
    [(_HAVE_KEYS, "keys", "idempotency_key=?"), (_ARE_STORED, "ids", "id=?")],
)
async def test_keys_and_ids_of_any_number_are_found_by_their_index(
    database, statement, name, condition
):
    plan = await plan_of(database, lambda session: statement.rows(session, {name: '["a", "b"]'}))

    assert f"({condition})" in plan.partition("SEARCH generations USING ")[2].splitlines()[0]


def test_a_source_tree_and_a_wheel_have_the_migrations_in_their_own_places(tmp_path, monkeypatch):
    assert (migrations.folder() / "versions" / "0001_first_tables.py").exists()
    (tmp_path / "_migrations").mkdir()
    monkeypatch.setattr(migrations, "__file__", str(tmp_path / "storage" / "migrations.py"))

    assert migrations.folder() == tmp_path / "_migrations"


# a process that dies


@pytest.mark.parametrize("lines", [1, 20, 57])
async def test_a_writer_killed_in_mid_write_loses_nothing_and_leaves_no_lock(
    database_url, database, path, lines
):
    program = await Program.start("write", database_url)
    program.begin()
    told = [await program.read_line() for _ in range(lines)]
    program.process.kill()
    told += await program.rest()

    raw = sqlite3.connect(path, timeout=0, isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    raw.close()
    await assert_told_is_there(database, told)


async def assert_told_is_there(database, told):
    statuses = {row.id: row.status for row in await read_all(database, select(Generation))}
    added = {generation_id for what, generation_id in told if what == "added"}
    completed = {generation_id for what, generation_id in told if what == "completed"}

    assert added <= statuses.keys()
    assert {statuses[generation_id] for generation_id in completed} <= {"completed"}


async def test_a_writer_waits_for_another_process_to_finish(database, path):
    raw = sqlite3.connect(path, isolation_level=None)
    raw.execute("BEGIN IMMEDIATE")
    adding = asyncio.create_task(add_one(database))
    await asyncio.wait([adding], timeout=0.05)
    assert not adding.done()
    raw.execute("COMMIT")
    raw.close()

    with anyio.fail_after(PATIENCE):
        assert (await adding).is_pending


async def test_a_reset_refuses_tables_that_are_not_ours(tmp_path):
    with sqlite3.connect(tmp_path / "theirs.db") as connection:
        connection.execute("CREATE TABLE workers (name TEXT)")
        connection.execute("INSERT INTO workers VALUES ('Ada')")
    theirs = Database(f"sqlite:///{tmp_path / 'theirs.db'}")
    with pytest.raises(DatabaseUnavailableError, match="its table workers is not ours"):
        await theirs.reset()
    await theirs.dispose()
    assert connection.execute("SELECT name FROM workers").fetchall() == [("Ada",)]
    connection.close()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///x.db?timeout=abc",
        "sqlite:///what?.db",
        "sqlite:///a\x00b",
        "sqlite:///" + "a" * 241,
    ],
)
def test_a_url_that_names_no_possible_file_is_refused(url):
    with pytest.raises(ConfigurationError, match="DGX_MUSIC_DATABASE_URL"):
        Database(url)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///", "sqlite:///:memory:"])
def test_settings_refuse_a_database_in_memory(url):
    with pytest.raises(ConfigurationError, match="in memory"):
        load_settings(database_url=url)
