"""Engines and sessions, on every database; and ``finish``, which keeps a cancellation out of a statement."""

import asyncio
import contextlib
import random
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
from asyncpg.exceptions import InternalClientError
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import DBAPIError, ProgrammingError

from dgx_music import enqueue, retry_generation
from dgx_music.client.generations import cancel_generation
from dgx_music.config import load_settings
from dgx_music.errors import (
    ConfigurationError,
    DatabaseNotInitializedError,
    DatabaseNotMigratedError,
    DatabaseUnavailableError,
)
from dgx_music.storage import (
    close_db,
    create_generation,
    get_database,
    get_session,
    init_db,
    queue,
    reset_database,
)
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.connection.postgres_errors import (
    is_of_another_schema,
    is_unavailable,
    known_reason,
)
from dgx_music.storage.connection.revision import VERSION_TABLE
from dgx_music.storage.connection.sessions import finish
from dgx_music.storage.database import Database, ensure_database
from dgx_music.storage.models import Attempt, Base, Generation, Prompt
from dgx_music.storage.queue import Lease
from tests.factories import (
    POSTGRES,
    add_generation,
    back_date,
    claim_up_to,
    completion_of,
    on,
    read_all,
    rescue_lapsed,
)
from tests.patience import PATIENCE

WISH = ("lofi rain", "musicgen-small", 8.0, 32_000, 1)


def connections_in_use(database):
    return sum(engine.pool.checkedout() for engine in database.engines)


async def count(database):
    return (await read_all(database, select(func.count()).select_from(Generation)))[0]


# which database


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "data/generations.db"),
        ({"DATABASE_URL": "sqlite:///seed.db"}, "seed.db"),
        (
            {"DATABASE_URL": "sqlite:///seed.db", "DGX_MUSIC_DATABASE_URL": "sqlite:///ours.db"},
            "ours.db",
        ),
    ],
)
async def test_init_db_finds_its_url_in_the_environment(tmp_path, monkeypatch, environment, name):
    monkeypatch.chdir(tmp_path)
    for variable, url in environment.items():
        monkeypatch.setenv(variable, url)

    database = await init_db()
    await close_db()

    assert database.path == Path(name)
    assert (tmp_path / name).exists()


async def test_a_url_that_is_given_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'other.db'}")

    database = await init_db(f"sqlite:///{tmp_path / 'given.db'}")
    await close_db()

    assert database.path == tmp_path / "given.db"


# the default database


async def test_init_db_again_replaces_the_default_and_keeps_the_data(
    database_url, default_database
):
    async with get_session() as session:
        await create_generation(session, *WISH)

    second = await init_db(database_url)

    assert get_database() is second is not default_database
    assert await count(second) == 1


async def test_init_db_that_fails_leaves_the_default_as_it_was(default_database, tmp_path):
    with pytest.raises(ConfigurationError):
        await init_db("mysql://host/database")
    with pytest.raises(DatabaseUnavailableError):
        await init_db(f"sqlite:///{tmp_path}")

    assert get_database() is default_database


async def test_a_closed_default_database_is_gone(default_database):
    await close_db()
    await close_db()

    with pytest.raises(DatabaseNotInitializedError):
        get_database()


async def test_the_first_use_makes_the_default_database(database_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)

    assert await ensure_database() is await ensure_database() is get_database()
    await close_db()


async def test_first_uses_at_the_same_time_share_one_default_database(database_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)

    databases = await asyncio.gather(*[ensure_database() for _ in range(5)])
    rows = await asyncio.gather(*[enqueue(f"rain {number}") for number in range(5)])

    assert set(databases) == {get_database()}
    assert await count(get_database()) == len(rows)
    await close_db()


# sessions


async def test_a_session_commits_rolls_back_and_gives_its_connection_back(database):
    async with database.session() as session:
        await create_generation(session, *WISH)
    with contextlib.suppress(ZeroDivisionError):
        async with database.session() as session:
            await create_generation(session, *WISH)
            raise ZeroDivisionError

    assert (await count(database), connections_in_use(database)) == (1, 0)


async def test_a_row_can_be_read_after_its_session(database):
    async with database.session() as session:
        made = await create_generation(session, *WISH)

    assert made.to_dict()["created_at"] is not None


async def test_a_reading_session_does_not_wait_for_a_writer(database):
    with anyio.fail_after(PATIENCE):
        async with database.session() as writer:
            await create_generation(writer, *WISH)
            assert await count(database) == 0

    assert await count(database) == 1


async def test_a_reading_session_sees_one_moment(database):
    async with database.session(read_only=True) as reader:
        before = await reader.scalar(select(func.count()).select_from(Generation))
        async with database.session() as writer:
            await create_generation(writer, *WISH)
        after = await reader.scalar(select(func.count()).select_from(Generation))

    assert (before, after) == (0, 0)


async def test_a_write_in_a_reading_session_is_the_drivers_own_error(database):
    with pytest.raises(DBAPIError, match=r"read.?only"):
        async with database.session(read_only=True) as session:
            await session.execute(text("DELETE FROM prompts"))

    assert await count(database) == 0


async def test_writers_that_read_first_and_then_write_all_succeed(database_url, database):
    async with database.session() as session:
        session.add(Prompt(text="lofi"))

    async def add_one(own):
        async with own.session() as session:
            seen = await session.scalar(select(Prompt.used_count).with_for_update())
            await session.execute(update(Prompt).values(used_count=seen + 1))

    others = [Database(database_url) for _ in range(4)]
    await asyncio.gather(*[add_one(others[number % 4]) for number in range(80)])
    for other in others:
        await other.dispose()

    assert await read_all(database, select(Prompt.used_count)) == [81]


async def test_readers_more_than_connections_take_turns(database):
    async def look():
        return await count(database)

    assert await asyncio.gather(*[look() for _ in range(40)]) == [0] * 40


# the schema


async def test_an_empty_database_is_not_migrated(empty_database):
    with pytest.raises(
        DatabaseNotMigratedError, match="is at revision none and this version needs"
    ):
        await empty_database.check_migrated()


async def test_a_database_of_a_newer_version_is_refused_in_one_sentence(database):
    async with database.session() as session:
        await session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))

    for refused in (database.migrate, database.reset, database.check_migrated):
        with pytest.raises(
            DatabaseNotMigratedError,
            match=r"is at revision 9999 and this version needs .*; upgrade",
        ):
            await refused()


async def test_migrating_again_changes_nothing(database):
    async with database.session() as session:
        await create_generation(session, *WISH)

    await database.migrate()

    await database.check_migrated()
    assert await count(database) == 1


async def test_a_reset_of_the_default_database_empties_it(default_database):
    async with get_session() as session:
        await create_generation(session, *WISH)
    await reset_database()

    assert await count(default_database) == 0


# finish


class Work:
    """Work that lasts until it is released, and tells how far it came."""

    def __init__(self, error=None):
        self.started, self.released, self.is_done, self.error = (
            asyncio.Event(),
            asyncio.Event(),
            False,
            error,
        )

    async def run(self):
        self.started.set()
        await self.released.wait()
        self.is_done = True
        if self.error is not None:
            raise self.error
        return "done"

    async def begin(self):
        task = asyncio.create_task(finish(self.run()))
        await self.started.wait()
        return task


async def test_finish_gives_what_the_work_gives():
    work = Work()
    task = await work.begin()
    work.released.set()

    assert await task == "done"


async def test_finish_raises_what_the_work_raises():
    work = Work(error=ValueError("mine"))
    task = await work.begin()
    work.released.set()

    with pytest.raises(ValueError, match="mine"):
        await task


@pytest.mark.parametrize("times", [1, 3])
async def test_a_cancelled_task_finishes_its_work_first(times):
    work = Work()
    task = await work.begin()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    work.released.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.is_done


async def test_a_cancelled_scope_lets_the_work_finish_and_then_cancels():
    work = Work()
    reached = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        asyncio.get_running_loop().call_soon(work.released.set)
        reached.append(await finish(work.run()))
        await anyio.lowlevel.checkpoint()
        reached.append("never")

    assert reached == ["done"]
    assert scope.cancelled_caught


async def test_a_timeout_lets_the_work_finish_and_then_times_out():
    work = Work()
    asyncio.get_running_loop().call_later(0.01, work.released.set)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(finish(work.run()), 0.001)

    assert work.is_done


async def test_a_cancellation_is_let_through_even_where_the_work_fails():
    work = Work(error=ValueError("mine"))
    task = await work.begin()
    task.cancel()
    await asyncio.sleep(0)
    work.released.set()

    with pytest.raises(asyncio.CancelledError) as caught:
        await task
    assert caught.value.__cause__ is work.error


def test_work_is_finished_before_its_event_loop_ends():
    work = Work()

    async def leave_it():
        left.append(asyncio.create_task(finish(work.run())))
        await work.started.wait()
        asyncio.get_running_loop().call_later(0.01, work.released.set)

    left = []
    with asyncio.Runner() as runner:
        runner.run(leave_it())

    assert work.is_done


async def test_work_outlives_whoever_cancels_every_task_there_is():
    work = Work()
    task = await work.begin()
    for each in asyncio.all_tasks() - {asyncio.current_task()}:
        each.cancel()
    await asyncio.sleep(0)
    work.released.set()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.is_done


async def test_a_timeout_inside_the_work_ends_it():
    with pytest.raises(TimeoutError):
        await finish(asyncio.wait_for(Work().run(), 0.001))
    with pytest.raises(TimeoutError):
        await finish(time_out())


async def time_out():
    async with asyncio.timeout(0.001):
        await Work().run()


async def test_work_that_cancels_itself_is_cancelled():
    async def give_up():
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await finish(give_up())


@pytest.mark.parametrize(
    "error", [FileNotFoundError("mine"), TimeoutError("mine"), EOFError("mine")]
)
async def test_what_a_callers_own_function_raises_comes_as_it_is(database, error):
    def read_file(_session):
        raise error

    with pytest.raises(type(error)) as caught:
        async with database.session() as session:
            await session.run_sync(read_file)
    assert caught.value is error


@on(*POSTGRES)
async def test_a_server_that_does_not_answer_a_callers_own_function_is_told(database_url):
    hasty = Database(database_url, limits=Limits(command_seconds=0.2))
    with pytest.raises(DatabaseUnavailableError, match="cannot be used"):
        async with hasty.session() as session:
            await session.run_sync(lambda sync: sync.execute(text("SELECT pg_sleep(30)")))
    await hasty.dispose()


class ToldError(Exception):
    """What a server says in a language of its own."""

    def __init__(self, sqlstate, words, source_function=""):
        super().__init__(words)
        self.sqlstate = sqlstate
        self.diag = SimpleNamespace(source_function=source_function)


@pytest.mark.parametrize(
    ("told", "is_passing"),
    [
        (ToldError("42P01", "Relation »generations« existiert nicht"), True),
        (ToldError("42P01", "Relation »gaeste« existiert nicht"), False),
        (ToldError("42703", "Spalte »prompt« existiert nicht"), True),
        (
            ToldError(
                "0A000", "gecachter Plan darf den Ergebnistyp nicht ändern", "RevalidateCachedQuery"
            ),
            True,
        ),
        (ToldError("0A000", "das wird nicht unterstützt", "transformSetOperationStmt"), False),
    ],
)
def test_a_servers_errors_are_known_in_every_language(told, is_passing):
    error = ProgrammingError("SELECT 1", {}, told)

    assert (is_unavailable(error) or is_of_another_schema(error, Base.metadata)) == is_passing


def test_a_farewell_of_the_server_that_is_read_before_the_end_is_a_lost_connection():
    told = InternalClientError(
        "cannot switch to state 15; another operation (2) is in progress"
    )  # COMMIT

    error = DBAPIError("COMMIT", {}, told)

    assert "idle transaction" in str(known_reason(error, 0.5))
    assert is_unavailable(error)


@on(*POSTGRES)
@pytest.mark.parametrize("column", ["promt", "generations.promt"])
async def test_a_column_that_nobody_knows_is_the_callers_mistake(database, column):
    with pytest.raises(DBAPIError, match="promt"):
        async with database.session() as session:
            await session.execute(text(f"SELECT {column} FROM generations"))


@on(*POSTGRES)
@pytest.mark.parametrize("column", ["prompt", "generations.prompt"])
async def test_a_column_of_ours_that_is_away_is_of_another_schema(database, column):
    async with database.session() as session:
        await session.execute(text("ALTER TABLE generations RENAME prompt TO former"))

    with pytest.raises(DatabaseUnavailableError, match="prompt"):
        async with database.session() as session:
            await session.execute(text(f"SELECT {column} FROM generations"))


# cancelled calls


async def by_task_cancel(call, rng):
    task = asyncio.create_task(call)
    await asyncio.wait([task], timeout=rng.uniform(0, 0.006))
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        return await task


async def by_timeout(call, rng):
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0, 0.006)):
            return await call


async def by_scope(call, rng):
    with anyio.move_on_after(rng.uniform(0, 0.006)):
        return await call


class Caller:
    """Makes calls that are cancelled at random, and remembers what was acknowledged."""

    def __init__(self, database, leases, ids):
        self.database = database
        self.leases = leases
        self.ids = ids
        self.added = []
        self.statuses = {}
        self.claimed = []

    async def enqueue(self):
        self.added.append((await enqueue("lofi rain", model="musicgen-large")).id)

    async def create(self):
        async with get_session() as session:
            made = await create_generation(session, "lofi rain", "musicgen-large", 8.0, 32_000, 1)
        self.added.append(made.id)

    async def claim(self):
        async with self.database.session() as session:
            claims = await claim_up_to(session, 2, model_name="musicgen-medium")
        self.claimed += [claimed.lease for claimed in claims]

    async def renew(self):
        async with self.database.session() as session:
            await queue.renew(session, dict.fromkeys(self.leases, 0.5), lease_seconds=60)

    async def complete(self):
        async def move(session, lease):
            # a renewal has it locked
            while lease not in await queue.complete(session, [completion_of(lease)]):
                await asyncio.sleep(0.01)

        await self.end(move, "completed")

    async def fail(self):
        await self.end(
            lambda session, lease: queue.fail(session, lease, "no", retry_in_seconds=None), "failed"
        )

    async def release(self):
        await self.end(lambda session, lease: queue.release(session, [lease]), "pending")

    async def end(self, move, status):
        lease = self.leases.pop()
        async with self.database.session() as session:
            await move(session, lease)
        self.statuses[lease.generation_id] = status

    async def cancel(self):
        generation_id = self.ids["pending"].pop()
        self.statuses[generation_id] = await cancel_generation(generation_id)

    async def retry(self):
        generation_id = self.ids["failed"].pop()
        await retry_generation(generation_id)
        self.statuses[generation_id] = "pending"

    async def rescue(self):
        generation_id = self.ids["held"].pop()
        async with self.database.session() as session:
            await back_date(session, generation_id, lease_expires_at=1)
        async with self.database.session() as session:
            await rescue_lapsed(session)
        self.statuses[generation_id] = "pending"


SESSION_CALLS = {
    "get": lambda session: session.get(Prompt, 1),
    "get_one": lambda session: session.get_one(Prompt, 1),
    "scalars": lambda session: session.scalars(select(Prompt)),
    "merge": lambda session: session.merge(Prompt(id=1, text="lofi", used_count=2)),
    "run_sync": lambda session: session.run_sync(
        lambda sync: sync.execute(update(Prompt).values(used_count=3))
    ),
    "begin": lambda session: add_in_transaction(session),
    "begin_nested": lambda session: add_in_savepoints(session),
}


async def add_in_transaction(session):
    async with session.begin():
        session.add(Prompt(text=str(random.random())))


async def add_in_savepoints(session):
    for _ in range(9):
        async with session.begin_nested():
            session.add(Prompt(text=str(random.random())))


@pytest.mark.parametrize("name", SESSION_CALLS)
async def test_a_session_whose_call_is_cancelled_leaves_no_lock(database, name):
    async with database.session() as session:
        session.add(Prompt(text="lofi"))

    async def call():
        async with database.session() as session:
            await SESSION_CALLS[name](session)

    with anyio.fail_after(PATIENCE):
        for number in range(50):
            await by_task_cancel(call(), random.Random(number))
    await assert_no_lock_is_left(database)


CALLS = [
    "enqueue",
    "create",
    "claim",
    "renew",
    "complete",
    "fail",
    "release",
    "cancel",
    "retry",
    "rescue",
]
PER_CALL = 40


@pytest.fixture
async def caller(default_database):
    """A caller with enough rows for every call; claimed rows and ended rows have different models."""
    async with default_database.session() as session:
        for _ in range(PER_CALL * 2):
            await add_generation(session, model_name="musicgen-medium")
        leases = [
            Lease((await add_generation(session, worker_id="worker-1")).id, 1)
            for _ in range(PER_CALL * 3)
        ]
        ids = {
            "pending": [
                (await add_generation(session, model_name="none")).id for _ in range(PER_CALL)
            ],
            "failed": [
                (await add_generation(session, status="failed")).id for _ in range(PER_CALL)
            ],
            "held": [
                (await add_generation(session, worker_id="worker-2")).id for _ in range(PER_CALL)
            ],
        }
    return Caller(default_database, leases, ids)


async def test_400_calls_cancelled_at_random_leave_no_lock_and_lose_nothing(caller):
    rng = random.Random(2026)

    async def call_often(number):
        for index in range(PER_CALL * len(CALLS) // 4):
            name = CALLS[(index + number) % len(CALLS)]
            cancel = rng.choice([by_task_cancel, by_timeout, by_scope])
            await cancel(getattr(caller, name)(), rng)

    await asyncio.gather(*[call_often(number) for number in range(4)])

    await assert_no_lock_is_left(caller.database)
    await assert_nothing_is_lost(caller)
    await assert_rows_and_attempts_agree(caller.database)


async def assert_no_lock_is_left(database):
    assert connections_in_use(database) == 0
    other = Database(database.url.render_as_string(hide_password=False))
    with anyio.fail_after(PATIENCE):
        for each in (database, other):
            async with each.session() as session:
                await create_generation(session, *WISH)
    await other.dispose()


async def assert_nothing_is_lost(caller):
    statuses = dict(await read_rows(caller.database, select(Generation.id, Generation.status)))
    attempts = await read_rows(caller.database, select(Attempt.generation_id, Attempt.attempt))

    assert {key: statuses.get(key) for key in caller.statuses} == caller.statuses
    assert set(caller.added) <= statuses.keys()
    assert {(lease.generation_id, lease.attempt) for lease in caller.claimed} <= {
        tuple(row) for row in attempts
    }
    assert min(len(caller.added), len(caller.statuses), len(caller.claimed)) > 5


async def assert_rows_and_attempts_agree(database):
    """A transition is complete or absent: a row is held if and only if its attempt has not ended."""
    query = select(Generation.status == "processing", Attempt.outcome.is_(None)).join(Attempt)
    rows = await read_rows(database, query)

    assert {tuple(row) for row in rows} == {(True, True), (False, False)}


async def read_rows(database, query):
    async with database.session(read_only=True) as session:
        return list((await session.execute(query)).all())


def test_the_settings_say_how_long_a_transaction_may_be_idle(monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_IDLE_TRANSACTION_TIMEOUT_SECONDS", "7")

    assert Database.from_settings(load_settings()).limits.idle_seconds == 7.0
