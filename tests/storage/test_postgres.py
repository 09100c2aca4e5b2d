"""What only a server does, by either driver: locks of rows, deadlocks, plans, heap-only updates, and the ways it goes away."""

import asyncio
import time
from collections import Counter
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain

import anyio
import pytest
from psycopg import sql
from sqlalchemy import event, func, literal_column, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

from dgx_music import close_db, enqueue, enqueue_many, init_db
from dgx_music.errors import DatabaseUnavailableError, IdempotencyConflictError
from dgx_music.storage import count_generations, create_generation, due, queue
from dgx_music.storage.connection.postgres_drivers import Limits
from dgx_music.storage.database import Database
from dgx_music.storage.estimates import estimate
from dgx_music.storage.insertion import _ARE_STORED, _HAVE_KEYS
from dgx_music.storage.models import Base, Batch, Generation, Prompt
from dgx_music.storage.prompts import count_overlooked_prompts
from dgx_music.storage.workers import get_workers, heartbeat_worker
from dgx_music.worker.completions import Completions
from dgx_music.worker.turns import Turns
from tests.factories import (
    MODEL,
    POSTGRES,
    add_generation,
    back_date,
    claim_one,
    claim_up_to,
    completion_of,
    find_lapsed,
    read,
    read_all,
    start_one,
    with_driver,
)
from tests.patience import PATIENCE
from tests.proxy import Proxy
from tests.storage.plans import plan_of

WISH = ("lofi rain", MODEL, 8.0, 32_000, 1)


@pytest.fixture(params=POSTGRES)
def database_url(request, postgres_url):
    return with_driver(postgres_url, request.param)


async def add_many(database, count, **overrides):
    async with database.session() as session:
        return [(await add_generation(session, **overrides)).id for _ in range(count)]


# claimers beside each other


async def test_two_claimers_never_wait_for_each_other(database):
    ids = await add_many(database, 6)
    with anyio.fail_after(PATIENCE):
        async with database.session() as first, database.session() as second:
            claims = [await claim_up_to(session, 3) for session in (first, second)]

    assert [[claimed.lease.generation_id for claimed in each] for each in claims] == [
        ids[:3],
        ids[3:],
    ]


async def test_two_rescuers_never_wait_for_each_other(database):
    for generation_id in await add_many(database, 4, worker_id="dead"):
        async with database.session() as session:
            await back_date(session, generation_id, lease_expires_at=1)
    with anyio.fail_after(PATIENCE):
        async with database.session() as first, database.session() as second:
            lapsed = await find_lapsed(first)
            rescued = [await queue.rescue(first, dict(list(lapsed.items())[:2]))]
            rescued.append(await queue.rescue(second, lapsed))

    assert list(map(len, rescued)) == [2, 2]
    assert len({item.lease for item in chain(*rescued)}) == 4


async def test_a_claim_does_not_wait_for_who_only_refers_to_the_row(database):
    """An attempt that is being added holds a KEY SHARE lock on its generation."""
    await add_many(database, 1)
    with anyio.fail_after(PATIENCE):
        async with database.session() as reader, database.session() as claimer:
            await reader.execute(text("SELECT 1 FROM generations FOR KEY SHARE"))
            assert len(await claim_up_to(claimer, 1)) == 1


async def test_claimers_at_once_take_no_more_than_their_limits_and_no_row_twice(
    database_url, database
):
    ids = await add_many(database, 100)
    others = [Database(database_url, limits=Limits(pool_size=8)) for _ in range(2)]

    async def claim(number):
        return await others[number % 2].transact(
            lambda session: claim_up_to(session, 7, f"worker-{number}")
        )

    claims = await asyncio.gather(*[claim(number) for number in range(16)])
    for other in others:
        await other.dispose()

    taken = [claimed.lease.generation_id for claimed in chain(*claims)]
    assert Counter(map(len, claims)).keys() <= {7, 2} | set(range(8))
    assert sorted(taken) == sorted(set(taken) & set(ids))
    assert max(map(len, claims)) == 7


async def test_a_lease_is_of_the_statements_time_and_not_of_the_transactions(database):
    await add_many(database, 1)
    async with database.session() as session:
        began = await session.scalar(select(literal_column("now()")))
        await claim_one(session, lease_seconds=30)
        row = (await session.scalars(select(Generation))).one()

    assert row.started_at > began
    assert row.lease_expires_at - began > timedelta(seconds=30)


# deadlocks and keys


@pytest.fixture
async def quick_to_see_deadlocks(postgres, database):
    name = sql.Identifier(database.url.database)
    postgres.execute(sql.SQL("ALTER DATABASE {} SET deadlock_timeout = '20ms'").format(name))


@pytest.mark.usefixtures("quick_to_see_deadlocks")
async def test_who_is_a_deadlocks_victim_is_done_again(database):
    ids = await add_many(database, 2)
    both_hold_one, tries = asyncio.Barrier(2), []

    def lock_in_order(first, second):
        async def work(session):
            tries.append(first)
            await raise_priority(session, first)
            if len(tries) <= 2:
                await both_hold_one.wait()
            await raise_priority(session, second)

        return work

    with anyio.fail_after(PATIENCE):
        await asyncio.gather(
            database.transact(lock_in_order(*ids)), database.transact(lock_in_order(*ids[::-1]))
        )

    assert len(tries) == 3
    assert await read_all(database, select(Generation.priority)) == [2, 2]


async def raise_priority(session, generation_id):
    raised = (
        update(Generation)
        .where(Generation.id == generation_id)
        .values(priority=Generation.priority + 1)
    )
    await session.execute(raised)


async def test_what_fails_for_a_reason_of_its_own_is_not_done_again(database):
    tries = []

    async def work(session):
        tries.append(1)
        await add_generation(session, status="pending", attempt=-1)

    with pytest.raises(IntegrityError):
        await database.transact(work)

    assert len(tries) == 1


@pytest.mark.parametrize("is_committed", [True, False])
async def test_a_key_that_another_transaction_is_using_is_waited_for(database, is_committed):
    async with database.session() as session:
        first_id = (await enqueue("lofi rain", session=session, idempotency_key="order-7")).id
        waiting = asyncio.create_task(enqueue_in(database, idempotency_key="order-7"))
        await until_blocked(database)
        if not is_committed:
            await session.rollback()
    second = await waiting

    assert (second.id == first_id) is is_committed
    assert await read_all(database, select(Generation.id)) == [second.id]


@pytest.mark.parametrize("others", [["x1"], []])
async def test_a_conflict_that_shows_late_leaves_nothing_of_its_call_in_the_callers_transaction(
    database, others
):
    async def enqueue_beside():
        async with database.session() as session:
            requests = [*others, {"prompt": "theirs", "idempotency_key": "r"}]
            with pytest.raises(IdempotencyConflictError):
                await enqueue_many(requests, session=session)
            assert [row for row in session.identity_map.values() if row.prompt == "x1"] == []
            await enqueue("after", session=session)

    async with database.session() as session:
        await enqueue("mine", idempotency_key="r", session=session)
        beside = asyncio.create_task(enqueue_beside())
        await until_blocked(database)
    await beside

    assert sorted(await read_all(database, select(Generation.prompt))) == ["after", "mine"]
    assert sorted(await read_all(database, select(Prompt.text))) == ["after", "mine"]
    assert await read_all(database, select(func.count(Batch.id))) == [0]


async def test_a_prompt_whose_count_is_taken_back_is_counted_once_in_the_end(database):
    """Its first use was overlooked, and the second one turned out to be the same generation."""
    async with database.session() as first:
        async with database.session() as counting:
            await enqueue("lofi rain", session=counting)
            await enqueue("lofi rain", idempotency_key="k", session=first)
            await counting.rollback()
        repeating = asyncio.create_task(enqueue_in(database, idempotency_key="k"))
        await until_blocked(database)
    await repeating
    assert await read_all(database, select(Prompt.used_count)) == []

    await database.transact(count_overlooked_prompts)

    assert await read_all(database, select(Prompt.used_count)) == [1]
    assert await read_all(database, select(func.count(Generation.prompt_id))) == [1]


@pytest.mark.parametrize("has_session", [False, True])
async def test_a_shutdown_that_cancels_all_tasks_does_not_break_off_an_insert_of_many(
    database_url, has_session
):
    database = await init_db(database_url)
    async with database.session() as other:
        await other.execute(text("LOCK TABLE generations IN EXCLUSIVE MODE"))
        add = partial(enqueue_many, ["a", "b", "c"])
        inserting = asyncio.create_task(add_in(database, add) if has_session else add())
        await until_blocked(database)
        for each in asyncio.all_tasks() - {asyncio.current_task()}:
            each.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await inserting

    # In the caller's session it is undone, but only after the statement has ended.
    assert await read_all(database, select(func.count(Generation.id))) == [0 if has_session else 3]
    await close_db()


async def add_in(database, add):
    async with database.session() as session:
        return await add(session=session)


async def enqueue_in(database, **options):
    async with database.session() as session:
        return await enqueue("lofi rain", session=session, **options)


async def until_blocked(database, count=1):
    """Return once so many statements wait for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with anyio.fail_after(PATIENCE):
        while (await read_all(database, text(query)))[0] < count:
            await anyio.sleep(0.01)


# plans, with 100,000 finished generations and one tenant that has 20,000 waiting


MANY = """
SET session_replication_role = replica;
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, status, tenant, run_at, completed_at)
SELECT 'done-' || n, 'lofi', 'musicgen-small', 8, 32000, 1, 'completed', 'whale', moment, moment
FROM generate_series(1, 100000) AS n, LATERAL (SELECT now() - n * interval '1 second' AS moment) AS times;
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, tenant, run_at)
SELECT 'whale-' || n, 'lofi', 'musicgen-small', 8, 32000, 1, 'whale', now() - interval '1 hour' - n * interval '1 ms'
FROM generate_series(1, 20000) AS n;
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, tenant)
SELECT 'minnow-' || n, 'lofi', 'musicgen-small', 8, 32000, 1, 'minnow' FROM generate_series(1, 5) AS n;
INSERT INTO generations (id, prompt, model_name, duration_seconds, sample_rate, channels, run_at)
SELECT 'later-' || n, 'lofi', 'musicgen-medium', 8, 32000, 1, now() + interval '1 hour' FROM generate_series(1, 5000) AS n;
"""


@pytest.fixture(scope="module")
def crowded_url(postgres, migrated_template):
    url = postgres.create_database("crowded", template=migrated_template)
    postgres.execute(MANY, database="crowded")
    postgres.execute("VACUUM ANALYZE generations", database="crowded")
    yield url
    postgres.drop_database("crowded")


@pytest.fixture(scope="module")
def surprised_url(postgres, migrated_template):
    """The same, but whose statistics were made while nothing waited."""
    url = postgres.create_database("surprised", template=migrated_template)
    done, *waiting = MANY.split(";\n")[:2], MANY.split(";\n")[2]
    postgres.execute("ALTER TABLE generations SET (autovacuum_enabled = off)", database="surprised")
    postgres.execute(";\n".join(done), database="surprised")
    postgres.execute("VACUUM ANALYZE generations", database="surprised")
    postgres.execute(";\n".join([MANY.split(";\n")[0], *waiting]), database="surprised")
    yield url
    postgres.drop_database("surprised")


@pytest.fixture
async def surprised(surprised_url):
    database = Database(surprised_url)
    yield database
    await database.dispose()


@pytest.fixture
async def crowded(crowded_url):
    database = Database(crowded_url)
    yield database
    await database.dispose()


async def statement_of(database, work):
    """Return the longest statement of the work, with its values; nothing of it is kept."""
    statements = []
    event.listen(
        database.engine.sync_engine,
        "before_cursor_execute",
        lambda *call: statements.append(call[2:4]),
    )
    async with database.session() as session:
        await work(session)
        await session.rollback()
    return max(statements, key=lambda statement: len(statement[0]))


async def run_plan_of(database, work):
    """Return the nodes of the plan by which the work's longest statement was carried out."""
    statement, values = await statement_of(database, work)
    async with database.engine.connect() as connection:
        rows = await connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", values
        )
        nodes = list(nodes_of(rows.scalar_one()[0]["Plan"]))
        await connection.rollback()
    return nodes


def nodes_of(plan):
    yield plan
    for part in plan.get("Plans", []):
        yield from nodes_of(part)


def rows_read(nodes):
    """Return how many rows came from tables and indexes, those that were read in vain included."""
    scans = [node for node in nodes if "Scan" in node["Node Type"] and "Relation Name" in node]
    return sum(
        (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
        for node in scans
    )


def runs_of_choice(nodes):
    """Return how often the rows to claim were chosen: not MATERIALIZED the LIMIT could be applied again and again."""
    return [node["Actual Loops"] for node in nodes if node.get("Subplan Name") == "CTE chosen"]


SLOW = {"Sort", "Incremental Sort", "Seq Scan", "Bitmap Heap Scan"}


def kinds(nodes):
    """Return what is done to the generations."""
    return {
        node["Node Type"]
        for node in nodes
        if node.get("Relation Name", "generations") == "generations"
    }


async def claim_three(session):
    assert len(await claim_up_to(session, 3)) == 3


async def claim_three_of_at_most_two_each(session):
    claims = await claim_up_to(session, 3, tenant_limit=2)
    assert [claimed.lease.generation_id.split("-")[0] for claimed in claims] == [
        "whale",
        "whale",
        "minnow",
    ]


@pytest.mark.parametrize(
    ("statement", "name", "index"),
    [
        (_HAVE_KEYS, "keys", "uq_generations_idempotency_key"),
        (_ARE_STORED, "ids", "pk_generations"),
    ],
)
async def test_keys_and_ids_of_any_number_are_found_by_their_index(crowded, statement, name, index):
    plan = await plan_of(crowded, lambda session: statement.rows(session, {name: '["a", "b"]'}))

    assert index in plan
    assert "Seq Scan on generations" not in plan


async def test_a_claim_reads_its_index_in_order_and_sorts_nothing(crowded):
    nodes = await run_plan_of(crowded, claim_three)

    (most_urgent,) = [node for node in nodes if node.get("Index Name") == "ix_generations_claim"]
    assert most_urgent["Actual Rows"] == 3
    assert not kinds(nodes) & SLOW
    assert rows_read(nodes) < 10
    assert runs_of_choice(nodes) == [1]


@pytest.mark.parametrize("options", [{}, {"tenant_limit": 2}])
async def test_a_claim_of_nothing_does_not_walk_what_is_scheduled_for_later(crowded, options):
    async def claim_nothing(session):
        assert await claim_up_to(session, 3, model_name="musicgen-medium", **options) == []

    assert rows_read(await run_plan_of(crowded, claim_nothing)) < 10


async def test_a_claims_prepared_plan_reads_its_index_as_well(crowded, postgres):
    statement, _ = await statement_of(crowded, claim_three)
    ((explained,),) = postgres.execute(
        f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {statement}", database="crowded"
    )

    nodes = list(nodes_of(explained[0]["Plan"]))
    assert "ix_generations_claim" in {node.get("Index Name") for node in nodes}
    assert not kinds(nodes) & {"Sort", "Incremental Sort"}


async def test_the_plan_of_a_claim_of_one_row_is_kept(crowded):
    query = (
        "SELECT max(generic_plans) FROM pg_prepared_statements WHERE statement LIKE 'WITH chosen%'"
    )
    async with crowded.session() as session:
        for _ in range(14):  # psycopg prepares after 5, and PostgreSQL keeps a plan after 5 more
            assert len(await claim_up_to(session, 1)) == 1
        kept = await session.scalar(text(query))
        await session.rollback()

    assert kept > 0


async def test_a_burst_that_the_statistics_do_not_know_makes_no_claim_walk_it(surprised):
    nodes = await run_plan_of(surprised, claim_three)

    assert "ix_generations_claim" in {node.get("Index Name") for node in nodes}
    assert rows_read(nodes) < 10


async def test_running_rows_that_the_statistics_do_not_know_make_no_completion_walk_them(surprised):
    async def complete_three(session):
        claims = await claim_up_to(session, 500)
        done = [completion_of(claimed.lease) for claimed in claims[:3]]
        assert len(await queue.complete(session, done)) == 3

    assert rows_read(await run_plan_of(surprised, complete_three)) < 30


async def test_a_completion_finds_its_rows_by_their_ids_in_a_table_without_statistics(database):
    async def complete_one(session):
        (claimed,) = await claim_up_to(session, 1)
        assert len(await queue.complete(session, [completion_of(claimed.lease)])) == 1

    await add_many(database, 1)
    nodes = await run_plan_of(database, complete_one)

    assert "Seq Scan" not in kinds(nodes)
    assert "pk_generations" in {node.get("Index Name") for node in nodes}


async def test_a_tenant_with_20000_waiting_is_not_walked_through_for_anothers_claim(crowded):
    nodes = await run_plan_of(crowded, claim_three_of_at_most_two_each)

    assert rows_read(nodes) < 50
    assert runs_of_choice(nodes) == [1]


@pytest.mark.parametrize(
    "look",
    [
        lambda session: due.find_waits(session, [MODEL]),
        lambda session: due.has_work(session, [MODEL]),
        lambda session: due.fair_share(session, MODEL, 4, 5),
        lambda session: queue.rescue(session, {queue.Lease("lost", 1): datetime.now(UTC)}),
        lambda session: queue.find_cancel_requests(session, "worker-1"),
    ],
)
async def test_what_is_asked_again_and_again_reads_hardly_anything(crowded, look):
    assert rows_read(await run_plan_of(crowded, look)) <= 25


@pytest.mark.parametrize(
    "look",
    [
        lambda session: get_workers(session),
        lambda session: count_generations(session, "pending"),
        lambda session: count_generations(session, "processing"),
        lambda session: estimate(session, "later-5000"),
    ],
)
async def test_a_prepared_plan_of_what_is_live_reads_no_finished_row(crowded, postgres, look):
    statement, _ = await statement_of(crowded, look)
    ((explained,),) = postgres.execute(
        f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {statement}", database="crowded"
    )

    nodes = list(nodes_of(explained[0]["Plan"]))
    assert "Seq Scan" not in kinds(nodes)
    assert any("Index Name" in node for node in nodes)


# heap-only updates


def updates_of(postgres, database, table):
    """Return how many updates of the table were not heap-only, and how many were."""
    query = "SELECT n_tup_upd - n_tup_hot_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = {}"
    return postgres.execute(sql.SQL(query).format(table), database=database.url.database)[0]


async def test_renewing_leases_touches_no_index(postgres, database):
    await add_many(database, 4)
    async with database.session() as session:
        leases = [claimed.lease for claimed in await claim_up_to(session, 4)]
    await database.dispose()  # a server process tells what it did when it ends, if not before
    plain, heap_only = await counted(postgres, database, "generations", at_least=4)
    for number in range(30):
        async with database.session() as session:
            await queue.renew(session, dict.fromkeys(leases, number / 30), lease_seconds=30)
    await database.dispose()

    assert await counted(postgres, database, "generations", at_least=plain + heap_only + 120) == (
        plain,
        heap_only + 120,
    )


async def test_a_workers_heartbeat_touches_no_index(postgres, database):
    values = {
        "id": "w",
        "host": "dgx",
        "pid": 1,
        "model_name": MODEL,
        "models": [MODEL],
        "device": "cpu",
    }
    for number in range(31):
        async with database.session() as session:
            await heartbeat_worker(
                session, **values, slots=4, lease_seconds=30.0, running_count=number
            )
    await database.dispose()

    assert await counted(postgres, database, "workers", at_least=30) == (0, 30)


async def counted(postgres, database, table, *, at_least):
    with anyio.fail_after(PATIENCE):
        while sum(updates := updates_of(postgres, database, table)) < at_least:
            await anyio.sleep(0.02)
        return updates


# the schema, to the letter

CONSTRAINTS = """
SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND conrelid <> 'dgx_music_alembic_version'::regclass
"""
COLUMNS = """
SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default
FROM information_schema.columns WHERE table_schema = 'public' AND column_name <> 'text_search'
AND table_name <> 'dgx_music_alembic_version'
"""
INDEXES = """
SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
AND indexname NOT LIKE '%_text_search' AND indexname <> 'dgx_music_alembic_version_pkc'
"""
OPTIONS = """
SELECT relname, (SELECT array_agg(o ORDER BY o) FROM unnest(reloptions) AS o WHERE o LIKE 'fillfactor%')
FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname <> 'dgx_music_alembic_version'
"""


@pytest.fixture
async def modelled(postgres):
    """The name of a database with the tables that the models say."""
    name = "modelled"
    engine = create_async_engine(Database(postgres.create_database(name)).url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(text("CREATE TABLE dgx_music_alembic_version ()"))
    await engine.dispose()
    yield name
    postgres.drop_database(name)


async def test_migrated_tables_are_the_models_to_the_letter(postgres, migrated_template, modelled):
    for query in (COLUMNS, CONSTRAINTS, INDEXES, OPTIONS):
        migrated, expected = [
            sorted(postgres.execute(query, database=name)) for name in (migrated_template, modelled)
        ]
        assert migrated == expected


# a server that goes away


@pytest.fixture
def proxy(database_url):
    with Proxy(database_url) as proxy:
        yield proxy


QUICK = Limits(connect_seconds=1.5, statement_seconds=0.4, command_seconds=0.5, idle_seconds=2.0)


@pytest.fixture
async def distant(database_url, proxy):
    """The database by way of the proxy, given up quickly."""
    database = Database(proxy.url(database_url), limits=QUICK)
    yield database
    with anyio.fail_after(PATIENCE):
        await database.dispose()


async def add_one(session):
    return await create_generation(session, *WISH)


async def works(database):
    """Return True if a transaction succeeds at its first try."""
    with anyio.fail_after(PATIENCE):
        return (await database.transact(add_one)).is_pending


@asynccontextmanager
async def unavailable():
    """Expect the one error there is for a server that is away, and within a few of the limits."""
    with (
        in_seconds(8),
        pytest.raises(
            DatabaseUnavailableError, match=r"^The database postgresql://.*cannot be used: "
        ),
    ):
        yield


@contextmanager
def in_seconds(limit):
    """Fail if it took longer, but afterwards: a scope cannot end the shielded calls."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_is_lost_in_a_transaction_is_told_and_the_next_call_works(
    distant, proxy, reset
):
    async with unavailable(), distant.session() as session:
        await add_one(session)
        proxy.cut(reset=reset)
        await add_one(session)

    assert await works(distant)
    assert len(await read_all(distant, select(Generation))) == 1


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_that_is_lost_at_rest_is_not_noticed(distant, proxy, reset):
    assert await works(distant)
    proxy.cut(reset=reset)
    await asyncio.to_thread(lambda: None)  # the loop looks round once

    assert await works(distant)


async def test_a_server_that_refuses_is_told_and_comes_back(distant, proxy):
    assert await works(distant)
    proxy.refuse()
    for work in (lambda: distant.transact(add_one), distant.revision, distant.migrate):
        async with unavailable():
            await work()
    proxy.heal()

    assert await works(distant)


async def test_a_black_hole_is_given_up_within_the_limits_and_heals(distant, proxy):
    assert await works(distant)
    proxy.black_hole()
    for work in (
        lambda: distant.transact(add_one),
        lambda: read_all(distant, select(Prompt)),
        distant.revision,
    ):
        async with unavailable():
            await work()
    proxy.heal()

    assert await works(distant)


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_black_hole_in_a_session_is_given_up_within_the_limits(distant, proxy, read_only):
    async with unavailable(), distant.session(read_only=read_only) as session:
        await session.scalar(select(func.count()).select_from(Generation))
        proxy.black_hole()
        await session.scalar(select(func.count()).select_from(Generation))
    proxy.heal()

    assert await works(distant)


async def test_a_black_hole_at_the_commit_is_given_up_within_the_limits(distant, proxy):
    async with unavailable(), distant.session() as session:
        await add_one(session)
        proxy.black_hole()
    proxy.heal()

    assert await works(distant)


async def test_a_black_hole_does_not_keep_a_caller_with_an_error_of_his_own(distant, proxy):
    async def fail_in_the_dark():
        async with distant.session() as session:
            await add_one(session)
            proxy.black_hole()
            raise ZeroDivisionError

    with in_seconds(8), pytest.raises(ZeroDivisionError):
        await fail_in_the_dark()
    proxy.heal()

    assert await works(distant)


async def until_answered(database, work):
    """Say it again and again, as a worker does: a row stays locked until the server takes its client for dead."""
    with anyio.fail_after(PATIENCE):
        while True:
            with suppress(DatabaseUnavailableError):
                return await database.transact(work)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("is_done", [True, False])
async def test_a_completion_whose_commit_was_not_answered_is_said_again(
    database, distant, proxy, cut, is_done
):
    lease = await start_one(database)
    loss = proxy.lose_reply(cut=cut) if is_done else proxy.lose_request(cut=cut)
    async with unavailable():
        await distant.transact(
            lambda session: queue.complete(session, [completion_of(lease, file_path="first.wav")])
        )
    await loss.wait()

    with anyio.fail_after(PATIENCE):
        assert await Completions(distant, Turns()).write(
            completion_of(lease, file_path="again.wav")
        )
    assert (await read(database, lease.generation_id)).file_path == (
        "first.wav" if is_done else "again.wav"
    )


async def test_a_statement_that_takes_too_long_is_told_and_the_connection_kept(distant):
    async with unavailable(), distant.session() as session:
        await session.execute(select(func.pg_sleep(30)))

    assert await works(distant)


@pytest.mark.parametrize("has_more", [True, False])
async def test_a_transaction_that_is_idle_for_too_long_is_told_in_words_of_ours(
    database_url, has_more
):
    database = Database(database_url, limits=Limits(idle_seconds=0.5))

    async def dawdle(session):
        await add_one(session)
        await until_ended(database)
        if has_more:
            await add_one(session)

    with pytest.raises(
        DatabaseUnavailableError, match=r"idle .* 0.5 s.*DGX_MUSIC_IDLE_TRANSACTION_TIMEOUT_SECONDS"
    ):
        await database.transact(dawdle)
    await database.dispose()


async def until_ended(database):
    """Return once the server has ended every other session of this database."""
    others = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    other = Database(str(database.url))
    with anyio.fail_after(PATIENCE):
        while (await read_all(other, others))[0]:
            await anyio.sleep(0.02)
    await other.dispose()


async def test_a_migration_may_take_as_long_as_it_takes(distant):
    async with distant.migrating() as engine, engine.begin() as connection:
        assert await connection.scalar(text("SELECT 1 FROM pg_sleep(0.6)")) == 1


async def test_a_session_inside_another_is_one_sentence(database_url):
    database = Database(database_url, limits=Limits(pool_size=1, command_seconds=0.2))
    async with database.session() as session:
        await add_one(session)
        with pytest.raises(DatabaseUnavailableError, match="all its connections are in use"):
            await works(database)
    await database.dispose()


async def test_a_mistake_is_the_callers_own_and_leaves_the_connection_usable(database):
    with pytest.raises(IntegrityError):
        async with database.session() as session:
            await add_generation(session, progress=2.0)

    assert await works(database)
