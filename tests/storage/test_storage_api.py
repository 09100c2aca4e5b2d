"""The storage API: names, signatures, behaviour. On every database."""

import asyncio
import inspect
import json
import struct
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from dgx_music import storage
from dgx_music.errors import (
    DatabaseNotInitializedError,
    IllegalTransitionError,
    InvalidRequestError,
)
from dgx_music.storage import (
    Attempt,
    Generation,
    GenerationStatus,
    Prompt,
    complete_generation,
    count_generations,
    create_generation,
    delete_generation,
    get_all_generations,
    get_database_stats,
    get_generation,
    get_most_used_prompts,
    get_pending_generations,
    get_prompt_by_text,
    get_session,
    init_db,
    queue,
    reset_database,
    track_prompt_usage,
    update_generation_status,
)
from dgx_music.storage.repository import find_generation_ids
from dgx_music.waveform import Waveform
from tests.factories import add_generation, back_date, completion_of, read, read_all, start_one
from tests.storage.plans import analyze, plan_of

pytestmark = pytest.mark.any_driver

STATUSES = ["pending", "processing", "completed", "failed", "cancelled"]
LEGAL = {
    ("pending", "processing"),
    ("pending", "cancelled"),
    ("processing", "pending"),
    ("processing", "completed"),
    ("processing", "failed"),
    ("processing", "cancelled"),
    ("failed", "pending"),
    ("cancelled", "pending"),
}
WISH = {
    "prompt": "trap beat 140 BPM",
    "model_name": "musicgen-small",
    "duration_seconds": 16.0,
    "sample_rate": 32_000,
    "channels": 2,
    "file_path": "outputs/wish.wav",
}


async def add_with(database, **overrides):
    async with database.session() as session:
        return await add_generation(session, **overrides)


async def create_and_raise(error):
    async with get_session() as session:
        await create_generation(session, **WISH)
        raise error


# names and signatures


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("init_db", ["database_url"]),
        ("reset_database", []),
        ("get_database_stats", ["session"]),
        (
            "create_generation",
            ["session", *WISH, "model_version", "metadata"],
        ),
        ("get_generation", ["session", "generation_id"]),
        ("get_all_generations", ["session", "limit", "offset", "status"]),
        ("get_pending_generations", ["session", "limit"]),
        ("count_generations", ["session", "status"]),
        ("update_generation_status", ["session", "generation_id", "status", "error_message"]),
        (
            "complete_generation",
            ["session", "generation_id", "generation_time", "file_size_bytes", "metadata"],
        ),
        ("delete_generation", ["session", "generation_id"]),
        ("track_prompt_usage", ["session", "prompt_text"]),
        ("get_prompt_by_text", ["session", "text"]),
        ("get_most_used_prompts", ["session", "limit"]),
    ],
)
def test_every_coroutine_keeps_its_name_and_parameters(name, parameters):
    function = getattr(storage, name)

    assert inspect.iscoroutinefunction(function)
    assert list(inspect.signature(function).parameters) == parameters


@pytest.mark.parametrize(
    ("name", "parameter", "default"),
    [
        ("init_db", "database_url", None),
        ("create_generation", "model_version", None),
        ("create_generation", "metadata", None),
        ("get_all_generations", "limit", 100),
        ("get_all_generations", "offset", 0),
        ("get_all_generations", "status", None),
        ("get_pending_generations", "limit", 100),
        ("count_generations", "status", None),
        ("update_generation_status", "error_message", None),
        ("complete_generation", "metadata", None),
        ("get_most_used_prompts", "limit", 10),
    ],
)
def test_every_default_is_kept(name, parameter, default):
    assert inspect.signature(getattr(storage, name)).parameters[parameter].default == default


def test_all_public_names_exist():
    assert all(hasattr(storage, name) for name in storage.__all__)


@pytest.mark.parametrize(("name", "value"), [(status.upper(), status) for status in STATUSES])
def test_there_are_these_statuses_and_no_others(name, value):
    assert GenerationStatus[name] == value
    assert len(GenerationStatus) == len(STATUSES)


def test_tables_and_columns_keep_their_names():
    columns = "id prompt model_name model_version duration_seconds sample_rate channels file_path file_size_bytes status"
    columns += " created_at completed_at generation_time_seconds error_message metadata"

    assert Generation.__tablename__ == "generations"
    assert Prompt.__tablename__ == "prompts"
    assert set(columns.split()) <= set(Generation.__table__.columns.keys())
    assert {"id", "text", "used_count", "first_used_at", "last_used_at"} <= set(
        Prompt.__table__.columns.keys()
    )


SHAPE = {"prompt": "lofi", "duration_seconds": 8.0, "sample_rate": 32_000, "channels": 1}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


async def fill(database, count):
    """Add completed generations, one a second, and a failed one of another model before them."""
    times = [NOON + timedelta(seconds=number) for number in range(count)]
    done = [
        SHAPE | {"model_name": "small", "status": "completed", "created_at": at, "completed_at": at}
        for at in times
    ]
    done[0] |= {"model_name": "large", "status": "failed"}
    async with database.session() as session:
        await session.execute(insert(Generation), done)
    await analyze(database)


@pytest.mark.parametrize(
    ("column", "value"),
    [("status", "failed"), ("created_at", NOON), ("model_name", "large"), ("completed_at", NOON)],
)
async def test_a_query_of_one_column_is_served_by_an_index(database, column, value):
    await fill(database, 2_000)

    one = select(Generation).where(getattr(Generation, column) == value)
    before = (
        select(Generation)
        .where(getattr(Generation, column) <= value)
        .order_by(getattr(Generation, column))
    )

    for query in (one, before):
        plan = await plan_of(database, lambda session, given=query: session.execute(given))
        assert f"ix_generations_{column}" in plan, plan


# sessions and the database


async def test_the_worked_example_runs(database_url, default_database):
    async with get_session() as session:
        generation = await create_generation(session, **WISH)
        generation_id = generation.id
    async with get_session() as session:
        generation = await get_generation(session, generation_id)
        generation.mark_processing()
    async with get_session() as session:
        await complete_generation(
            session, generation_id, 18.5, 5_242_880, {"bpm": 140, "key": "Cm"}
        )
    async with get_session() as session:
        generation = await get_generation(session, generation_id)

    assert (generation.status, generation.generation_time_seconds, generation.file_size_bytes) == (
        "completed",
        18.5,
        5_242_880,
    )
    assert generation.get_metadata() == {"bpm": 140, "key": "Cm"}
    assert generation.is_complete


async def test_a_session_commits_on_success(default_database):
    async with get_session() as session:
        await create_generation(session, **WISH)

    async with get_session() as session:
        assert await count_generations(session) == 1


async def test_a_session_rolls_back_on_any_exception(default_database):
    with pytest.raises(asyncio.CancelledError):
        await create_and_raise(asyncio.CancelledError())

    async with get_session() as session:
        assert await count_generations(session) == 0
        assert await get_prompt_by_text(session, WISH["prompt"]) is None


async def test_a_session_always_closes(default_database):
    with pytest.raises(ValueError, match="mine"):
        await create_and_raise(ValueError("mine"))

    assert all(engine.pool.checkedout() == 0 for engine in default_database.engines)


async def test_a_session_before_init_db_is_refused_in_one_sentence():
    with pytest.raises(
        DatabaseNotInitializedError,
        match=r"^The database is not initialized; call `await init_db\(\)`",
    ):
        async with get_session():
            pass


async def test_init_db_returns_the_database_that_sessions_use(database_url, default_database):
    assert (await init_db(database_url)) is storage.get_database()


async def test_reset_database_loses_everything(default_database):
    async with get_session() as session:
        await create_generation(session, **WISH)

    await reset_database()

    async with get_session() as session:
        assert set((await get_database_stats(session)).values()) == {0}
    await default_database.check_migrated()


async def test_statistics_count_by_status_and_prompts(database):
    for number, status in enumerate(STATUSES):
        for _ in range(number + 1):
            await add_with(database, status=status)
    async with database.session() as session:
        await track_prompt_usage(session, "lofi")
        stats = await get_database_stats(session)

    assert stats == {
        "total_generations": 15,
        "pending_generations": 1,
        "processing_generations": 2,
        "completed_generations": 3,
        "failed_generations": 4,
        "cancelled_generations": 5,
        "total_prompts": 1,
    }


# generations


async def test_create_generation_makes_a_pending_row_with_a_uuid(database):
    async with database.session() as session:
        made = await create_generation(session, **WISH, model_version="v2", metadata={"bpm": 140})

    row = (await read(database, made.id)).to_dict()
    assert row == made.to_dict()
    assert (
        row
        | WISH
        | {"status": "pending", "model_version": "v2", "metadata": {"bpm": 140}, "attempt": 0}
        == row
    )
    assert str(uuid.UUID(made.id)) == made.id


async def test_create_generation_counts_the_prompts_use(database):
    async with database.session() as session:
        first = await create_generation(session, **WISH)
        second = await create_generation(session, **WISH | {"file_path": None})
        prompt = await get_prompt_by_text(session, WISH["prompt"])

    assert (prompt.used_count, first.prompt_id, second.prompt_id) == (2, prompt.id, prompt.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", " \n"),
        ("prompt", "a\x00b"),
        ("model_name", "m" * 201),
        ("duration_seconds", float("nan")),
        ("duration_seconds", 0),
        ("sample_rate", 0),
        ("sample_rate", 44_100.0),
        ("channels", 65),
        ("file_path", "a\nb\x00"),
        ("model_version", ""),
        ("metadata", {"x": float("inf")}),
    ],
)
async def test_create_generation_refuses_what_no_database_could_keep(database, field, value):
    async with database.session() as session:
        with pytest.raises(InvalidRequestError) as caught:
            await create_generation(session, **WISH | {field: value})

    assert caught.value.field == field
    async with database.session() as session:
        assert set((await get_database_stats(session)).values()) == {0}


async def test_get_generation_gives_the_row_or_none(database):
    added = await add_with(database)

    async with database.session() as session:
        assert (await get_generation(session, added.id)).id == added.id
        assert await get_generation(session, "unknown") is None


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("ab", ["xyab", "abc", "abd", "zabz"]),
        ("abc", ["abc"]),
        ("y", ["xyab"]),
        ("q", []),
        ("%", []),
        ("a_", []),
    ],
)
async def test_ids_are_found_by_their_end_then_their_start_then_any_part(database, part, found):
    for generation_id in ("zabz", "abd", "abc", "xyab"):
        await add_with(database, id=generation_id)

    async with database.session() as session:
        assert await find_generation_ids(session, part) == found


async def test_all_generations_come_newest_first_in_pages(database):
    ids = [(await add_with(database)).id for _ in range(4)]
    async with database.session() as session:
        for age, generation_id in enumerate(ids):
            await back_date(session, generation_id, created_at=age)
        pages = [await get_all_generations(session, limit=2, offset=offset) for offset in (0, 2, 4)]

    assert [[row.id for row in page] for page in pages] == [ids[:2], ids[2:], []]


@pytest.mark.parametrize("status", [*STATUSES, *GenerationStatus])
async def test_generations_are_listed_and_counted_by_status(database, status):
    ids = {each: (await add_with(database, status=each)).id for each in STATUSES}

    async with database.session() as session:
        assert [row.id for row in await get_all_generations(session, status=status)] == [
            ids[status]
        ]
        assert await count_generations(session, status) == 1
        assert await count_generations(session) == 5


async def test_pending_generations_come_oldest_first(database):
    ids = [(await add_with(database)).id for _ in range(3)]
    await add_with(database, status="processing")
    async with database.session() as session:
        for age, generation_id in enumerate(ids):
            await back_date(session, generation_id, created_at=age)

        assert [row.id for row in await get_pending_generations(session)] == ids[::-1]
        assert [row.id for row in await get_pending_generations(session, limit=1)] == ids[:1:-1]


@pytest.mark.parametrize(
    ("function", "arguments", "field"),
    [
        (get_all_generations, {"limit": -1}, "limit"),
        (get_all_generations, {"offset": -1}, "offset"),
        (get_all_generations, {"status": "done"}, "status"),
        (get_pending_generations, {"limit": "ten"}, "limit"),
        (count_generations, {"status": "PENDING"}, "status"),
        (get_most_used_prompts, {"limit": 2**40}, "limit"),
    ],
)
async def test_reads_refuse_a_bad_argument_by_its_name(database, function, arguments, field):
    async with database.session() as session:
        with pytest.raises(InvalidRequestError) as caught:
            await function(session, **arguments)

    assert caught.value.field == field


@pytest.mark.parametrize(("current", "wanted"), [*product(STATUSES, STATUSES)])
async def test_a_status_is_updated_by_legal_transitions_only(database, current, wanted):
    added = await add_with(database, status=current)

    async with database.session() as session:
        if (current, wanted) in LEGAL:
            moved = await update_generation_status(session, added.id, wanted)
            assert moved.status is GenerationStatus(wanted)
            assert moved.is_finished == (moved.completed_at is not None)
        else:
            with pytest.raises(IllegalTransitionError) as caught:
                await update_generation_status(session, added.id, GenerationStatus(wanted))
            assert caught.value.current is GenerationStatus(current)
            assert caught.value.wanted is GenerationStatus(wanted)
    assert (await read(database, added.id)).status == (
        wanted if (current, wanted) in LEGAL else current
    )


@pytest.mark.parametrize("wanted", STATUSES)
async def test_a_row_that_a_worker_holds_is_not_updated_by_hand(database, wanted):
    held = await add_with(database, worker_id="worker-1")

    async with database.session() as session:
        with pytest.raises(IllegalTransitionError, match="worker worker-1 holds it"):
            await update_generation_status(session, held.id, wanted)

    assert (await read(database, held.id)).to_dict() == held.to_dict()


async def test_an_unknown_id_is_updated_to_none(database):
    async with database.session() as session:
        assert await update_generation_status(session, "unknown", "processing") is None
        assert await complete_generation(session, "unknown", 1.0, 1) is None


async def test_an_unknown_status_is_refused(database):
    added = await add_with(database)

    async with database.session() as session:
        with pytest.raises(
            InvalidRequestError, match=r"^status 'done' is not one; use pending, processing"
        ):
            await update_generation_status(session, added.id, "done")


async def test_an_error_message_is_kept_in_a_form_that_every_database_keeps(database):
    added = await add_with(database, status="processing")

    async with database.session() as session:
        await update_generation_status(session, added.id, "failed", "CUDA\x00 died \ud800")

    assert (await read(database, added.id)).error_message == "CUDA\ufffd died \ufffd"


async def test_taking_a_row_by_hand_counts_an_attempt(database):
    added = await add_with(database, progress=0.5)

    async with database.session() as session:
        moved = await update_generation_status(session, added.id, "processing")

    assert (moved.attempt, moved.progress, moved.worker_id) == (1, 0.0, None)
    assert moved.started_at is not None


@pytest.mark.parametrize(
    ("current", "failures"), [("processing", 2), ("failed", 0), ("cancelled", 0)]
)
async def test_only_a_finished_row_gets_a_fresh_budget_by_hand(database, current, failures):
    added = await add_with(database, status=current, failures=2, attempt=2)

    async with database.session() as session:
        moved = await update_generation_status(session, added.id, "pending")

    assert (moved.failures, moved.attempt, moved.cancel_requested) == (failures, 2, False)


async def test_a_row_whose_cancel_was_requested_is_not_put_back_by_hand(database):
    added = await add_with(database, status="processing", cancel_requested=True)

    async with database.session() as session:
        with pytest.raises(IllegalTransitionError, match="its cancellation was requested"):
            await update_generation_status(session, added.id, "pending")


async def test_complete_generation_merges_metadata_and_sets_the_time(database):
    added = await add_with(
        database, status="processing", metadata={"bpm": 90, "mood": "calm"}, error_message="old"
    )

    async with database.session() as session:
        await complete_generation(session, added.id, 18.5, 5_242_880, {"bpm": 140, "key": "Cm"})

    row = await read(database, added.id)
    assert row.get_metadata() == {"bpm": 140, "mood": "calm", "key": "Cm"}
    assert (row.status, row.progress, row.error_message) == ("completed", 1.0, None)
    assert abs(row.completed_at - datetime.now(UTC)) < timedelta(minutes=1)


async def test_complete_generation_without_metadata_keeps_what_is_there(database):
    added = await add_with(database, status="processing", metadata={"bpm": 90})

    async with database.session() as session:
        completed = await complete_generation(session, added.id, 0, 0)

    assert completed.get_metadata() == {"bpm": 90}


@pytest.mark.parametrize("current", ["pending", "completed", "failed", "cancelled"])
async def test_only_a_processing_row_is_completed(database, current):
    added = await add_with(database, status=current)

    async with database.session() as session:
        with pytest.raises(
            IllegalTransitionError, match=f"is {current} and cannot become completed"
        ):
            await complete_generation(session, added.id, 1.0, 1)


async def test_a_row_that_a_worker_holds_is_not_completed_by_hand(database):
    lease = await start_one(database)

    async with database.session() as session:
        with pytest.raises(IllegalTransitionError, match="holds it"):
            await complete_generation(session, lease.generation_id, 1.0, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("generation_time", -1),
        ("generation_time", float("nan")),
        ("file_size_bytes", -1),
        ("metadata", {"x": {1}}),
    ],
)
async def test_complete_generation_refuses_a_bad_value_and_leaves_the_row(database, field, value):
    added = await add_with(database, status="processing")

    async with database.session() as session:
        with pytest.raises(InvalidRequestError) as caught:
            await complete_generation(
                session, added.id, **{"generation_time": 1.0, "file_size_bytes": 1} | {field: value}
            )

    assert caught.value.field == field
    assert (await read(database, added.id)).to_dict() == added.to_dict()


async def test_delete_generation_takes_its_attempts_along(database):
    lease = await start_one(database)

    async with database.session() as session:
        assert await delete_generation(session, lease.generation_id) is True
        assert await delete_generation(session, lease.generation_id) is False
        assert (await session.scalars(select(Attempt))).all() == []


# prompts


async def test_track_prompt_usage_creates_and_then_counts(database):
    async with database.session() as session:
        first = await track_prompt_usage(session, " lofi rain ")
        assert (first.text, first.used_count) == ("lofi rain", 1)
    async with database.session() as session:
        second = await track_prompt_usage(session, "lofi rain")

    assert (second.id, second.used_count) == (first.id, 2)
    assert second.first_used_at == first.first_used_at <= second.last_used_at


async def test_a_prompt_in_hand_sees_its_new_count(database):
    async with database.session() as session:
        prompt = await track_prompt_usage(session, "lofi")
        await track_prompt_usage(session, "lofi")

        assert prompt.used_count == 2


async def test_track_prompt_usage_refuses_a_bad_prompt(database):
    async with database.session() as session:
        with pytest.raises(InvalidRequestError, match=r"^prompt is only white space"):
            await track_prompt_usage(session, "  ")


@pytest.mark.parametrize("text", ["lofi", " lofi\n"])
async def test_a_prompt_is_found_by_its_text(database, text):
    async with database.session() as session:
        tracked = await track_prompt_usage(session, "lofi")

        assert (await get_prompt_by_text(session, text)).id == tracked.id


@pytest.mark.parametrize("text", ["", "LOFI", "a\x00", "\ud800"])
async def test_an_unused_prompt_is_none(database, text):
    async with database.session() as session:
        await track_prompt_usage(session, "lofi")

        assert await get_prompt_by_text(session, text) is None


async def test_most_used_prompts_come_first(database):
    async with database.session() as session:
        for text in ["once", "thrice", "twice", "thrice", "twice", "thrice"]:
            await track_prompt_usage(session, text)

        assert [prompt.text for prompt in await get_most_used_prompts(session)] == [
            "thrice",
            "twice",
            "once",
        ]
        assert [prompt.used_count for prompt in await get_most_used_prompts(session, limit=1)] == [
            3
        ]


async def test_a_deleted_prompt_leaves_its_generations(database):
    async with database.session() as session:
        generation = await create_generation(session, **WISH)
        await session.delete(await get_prompt_by_text(session, WISH["prompt"]))

    assert (await read(database, generation.id)).prompt_id is None


async def test_the_database_refuses_an_assigned_status_that_nobody_knows(database):
    added = await add_with(database)

    with pytest.raises(IntegrityError):
        async with database.session() as session:
            (await get_generation(session, added.id)).status = "done"
    assert (await read(database, added.id)).is_pending


async def test_a_status_may_be_assigned_as_an_expression(database):
    added = await add_with(database)

    async with database.session() as session:
        (await get_generation(session, added.id)).status = text("'processing'")
    assert (await read(database, added.id)).status is GenerationStatus.PROCESSING


# models without a database


@pytest.mark.parametrize("status", STATUSES)
def test_properties_say_where_a_generation_is(status):
    generation = Generation(**WISH, status=status)

    assert [
        generation.is_pending,
        generation.is_processing,
        generation.is_complete,
        generation.is_failed,
        generation.is_cancelled,
    ] == [status == each for each in STATUSES]
    assert generation.is_finished == (status in ("completed", "failed", "cancelled"))


@pytest.mark.parametrize("status", STATUSES)
def test_a_status_that_is_given_as_text_is_one_of_the_statuses(status):
    given, assigned = Generation(**WISH, status=status), Generation(**WISH)
    assigned.status = status

    assert given.status is assigned.status is GenerationStatus(status)


def test_a_new_generation_is_pending_and_has_an_id():
    generation = Generation(**WISH)

    assert generation.is_pending
    assert uuid.UUID(generation.id).version == 7
    assert repr(generation) == f"<Generation {generation.id} pending attempt 0>"


def test_metadata_is_read_and_replaced_as_a_copy():
    given = {"bpm": 140}
    generation = Generation(**WISH, metadata=given)
    generation.get_metadata()["bpm"] = 90
    given["bpm"] = 100

    assert generation.get_metadata() == {"bpm": 140}
    generation.set_metadata({"key": "Cm"})
    assert generation.get_metadata() == generation.to_dict()["metadata"] == {"key": "Cm"}


def test_a_generation_without_metadata_has_an_empty_one():
    assert Generation(**WISH).get_metadata() == {}
    assert Generation(**WISH).to_dict()["metadata"] is None


@pytest.mark.parametrize("stored", [[0.0, 0.5], Waveform.of_steps(struct.pack("<2H", 0, 5_000))])
async def test_a_waveform_is_read_as_a_list_in_whichever_form_it_was_stored(database, stored):
    lease = await start_one(database)
    async with database.session() as session:
        await queue.complete(session, [completion_of(lease, audio={"waveform": stored})])

    row = await read(database, lease.generation_id)
    assert row.to_dict(with_waveform=True)["metadata"] == {"audio": {"waveform": [0.0, 0.5]}}


async def test_a_text_of_somebody_else_is_no_waveform(database):
    async with database.session() as session:
        row = await add_generation(session, metadata_={"audio": {"waveform": "AAAA"}})

    assert (await read(database, row.id)).get_metadata() == {"audio": {"waveform": "AAAA"}}


def test_a_row_as_json_has_the_waveform_only_if_asked():
    facts = {"audio": {"peak": 0.5, "waveform": [0.5] * 1_000}, "order": 7}
    generation = Generation(**WISH, metadata=facts)

    assert generation.to_dict()["metadata"] == {"audio": {"peak": 0.5}, "order": 7}
    assert generation.to_dict(with_waveform=True)["metadata"] == facts == generation.get_metadata()


def test_an_unstored_generation_may_take_any_mark():
    generation = Generation(**WISH)
    generation.mark_failed("no GPU")
    assert (generation.status, generation.error_message) == ("failed", "no GPU")
    generation.mark_processing()
    assert (generation.attempt, generation.progress) == (1, 0.0)
    generation.mark_completed(18.5)
    assert (generation.status, generation.generation_time_seconds, generation.error_message) == (
        "completed",
        18.5,
        None,
    )
    assert generation.completed_at.tzinfo is not None


MARKS = {
    "processing": ("mark_processing",),
    "completed": ("mark_completed", 1.0),
    "failed": ("mark_failed", "no GPU"),
}


@pytest.mark.parametrize(("current", "wanted"), [*product(STATUSES, MARKS)])
async def test_a_stored_generation_is_marked_by_legal_transitions_only(database, current, wanted):
    added = await add_with(database, status=current)
    name, *arguments = MARKS[wanted]

    async with database.session() as session:
        generation = await get_generation(session, added.id)
        if (current, wanted) in LEGAL:
            getattr(generation, name)(*arguments)
        else:
            with pytest.raises(
                IllegalTransitionError, match=f"is {current} and cannot become {wanted}"
            ):
                getattr(generation, name)(*arguments)

    assert (await read(database, added.id)).status == (
        wanted if (current, wanted) in LEGAL else current
    )


async def test_a_generation_that_a_worker_holds_takes_no_mark(database):
    lease = await start_one(database)

    async with database.session() as session:
        generation = await get_generation(session, lease.generation_id)
        with pytest.raises(IllegalTransitionError, match="worker worker-1 holds it"):
            generation.mark_completed(1.0)


async def test_to_dict_has_a_key_for_each_column_that_is_not_internal_and_is_plain_json(database):
    lease = await start_one(database)
    row = await read(database, lease.generation_id)
    (attempt,) = await _attempts_of(database, lease)

    internal = {"search_text", "prompt_id", "request_hash"}
    columns = {*Generation.__table__.columns.keys()} - internal
    assert {*row.to_dict()} == columns - {"is_starred"} | {"starred"}
    assert row.to_dict()["created_at"].endswith("+00:00")
    assert json.loads(json.dumps([row.to_dict(), attempt.to_dict()], allow_nan=False)) == [
        row.to_dict(),
        attempt.to_dict(),
    ]


def test_a_summary_has_what_lists_need_and_the_values_of_to_dict():
    audio = {"duration_seconds": 8.0, "format": "wav", "peak": 0.5, "waveform": [0.5]}
    row = Generation(**WISH, metadata={"audio": audio, "order": 7}, tags=["a"], is_starred=True)

    summary = row.to_summary()
    facts = {"duration_seconds": 8.0, "format": "wav"}
    assert summary.pop("metadata") == {"audio": facts, "order": 7}
    assert {"id", "prompt", "status", "sampling", "title", "bpm", "file_path"} <= {*summary}
    assert {"sha256", "run_at", "lease_expires_at"} & {*summary} == set()
    told = row.to_dict()
    assert summary == {name: told[name] for name in summary}


async def _attempts_of(database, lease):
    async with database.session(read_only=True) as session:
        return list(
            await session.scalars(
                select(Attempt).where(Attempt.generation_id == lease.generation_id)
            )
        )


def test_to_dict_has_no_number_that_json_lacks():
    generation = Generation(
        **WISH | {"duration_seconds": float("nan")}, status=GenerationStatus.PENDING
    )

    assert generation.to_dict()["duration_seconds"] is None
    assert type(generation.to_dict()["status"]) is str


def test_a_prompt_counts_its_uses():
    prompt = Prompt(text="lofi")
    prompt.increment_usage()

    assert prompt.used_count == 2
    assert abs(prompt.last_used_at - datetime.now(UTC)) < timedelta(minutes=1)
    assert {"id", "text", "used_count", "first_used_at", "last_used_at"} <= set(prompt.to_dict())


async def test_a_row_worked_on_by_hand_is_not_completed_after_its_cancel_was_requested(database):
    async with database.session() as session:
        generation = await add_generation(session, status="processing", attempt=1)
        await queue.cancel(session, generation.id)
        with pytest.raises(IllegalTransitionError, match="cancellation was requested"):
            await complete_generation(session, generation.id, 1.0, 1)
        ended = await update_generation_status(session, generation.id, "cancelled")
    assert ended.status == "cancelled"


# a row worked on by hand, whose cancel was acknowledged


async def cancelled_meanwhile(database):
    """Take a row by hand, have its cancel acknowledged, and return its id."""
    added = await add_with(database, status="processing", attempt=1)
    async with database.session() as session:
        assert await queue.cancel(session, added.id) == "processing"
    return added.id


async def test_a_row_whose_cancel_was_acknowledged_ends_cancelled_where_it_fails_by_hand(database):
    generation_id = await cancelled_meanwhile(database)

    async with database.session() as session:
        moved = await update_generation_status(session, generation_id, "failed", "no GPU")

    row = await read(database, generation_id)
    assert (moved.status, row.status, row.error_message) == ("cancelled", "cancelled", "no GPU")
    assert row.completed_at is not None


async def test_a_row_whose_cancel_was_acknowledged_is_marked_cancelled_where_it_fails(database):
    generation_id = await cancelled_meanwhile(database)

    async with database.session() as session:
        (await get_generation(session, generation_id)).mark_failed("no GPU")

    row = await read(database, generation_id)
    assert (row.status, row.error_message, row.completed_at is not None) == (
        "cancelled",
        "no GPU",
        True,
    )


@asynccontextmanager
async def read_before_the_cancel(database):
    """Give an object that was read before the cancel of its row was acknowledged by another session."""
    added = await add_with(database, status="processing", attempt=1)
    async with database.session(read_only=True) as session:
        generation = await get_generation(session, added.id)
    async with database.session() as session:
        assert await queue.cancel(session, added.id) == "processing"
    async with database.session() as session:
        session.add(generation)
        yield generation


async def test_a_failure_of_who_has_not_heard_of_the_cancel_ends_cancelled(database):
    async with read_before_the_cancel(database) as generation:
        generation.mark_failed("no GPU")

    assert ((await read(database, generation.id)).status, generation.status) == (
        "cancelled",
        "cancelled",
    )


DEEDS = {
    "a completion": lambda generation: generation.mark_completed(1.0),
    "a status written over": lambda generation: vars_of(
        generation, status="completed", completed_at=datetime.now(UTC)
    ),
    "a release": lambda generation: vars_of(generation, status="pending"),
}


def vars_of(generation, **values):
    for name, value in values.items():
        setattr(generation, name, value)


@pytest.mark.parametrize("deed", DEEDS)
async def test_who_has_not_heard_of_the_cancel_cannot_undo_it(database, deed):
    with pytest.raises(IllegalTransitionError, match="its cancellation was requested"):
        async with read_before_the_cancel(database) as generation:
            DEEDS[deed](generation)

    (row,) = await read_all(database, select(Generation))
    assert (row.status, row.cancel_requested) == ("processing", True)


async def test_an_acknowledged_cancel_is_not_taken_back(database):
    generation_id = await cancelled_meanwhile(database)

    with pytest.raises(IllegalTransitionError, match="its cancellation was requested"):
        async with database.session() as session:
            (await get_generation(session, generation_id)).cancel_requested = False

    assert (await read(database, generation_id)).cancel_requested


async def test_a_cancelled_row_may_be_told_more_of_while_it_runs(database):
    async with read_before_the_cancel(database) as generation:
        generation.set_metadata({"bpm": 140})
        generation.progress = 0.5

    row = await read(database, generation.id)
    assert (row.get_metadata(), row.progress, row.cancel_requested) == ({"bpm": 140}, 0.5, True)
