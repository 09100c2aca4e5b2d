"""What producers call, on every database."""

import asyncio
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from threading import get_ident

import anyio
import numpy as np
import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from dgx_music import (
    DgxMusicError,
    GenerationStatus,
    cancel_generation,
    configure_sqlite,
    enqueue,
    enqueue_many,
    enqueue_sync,
    estimate_generation,
    queue_position,
    retry_generation,
    wait_for_generation,
    watch_generation,
)
from dgx_music.audio import clips
from dgx_music.client import generations, requests
from dgx_music.errors import (
    GenerationNotFoundError,
    IdempotencyConflictError,
    IllegalTransitionError,
    InvalidRequestError,
    WaitTimeoutError,
)
from dgx_music.storage import delete_generation, insertion, queue
from dgx_music.storage.connection.sqlite_changes import FileChanges
from dgx_music.storage.models import Clip, Generation, Prompt
from dgx_music.storage.prompts import count_overlooked_prompts
from tests.factories import (
    SQLITE,
    Program,
    add_generation,
    audio_file,
    claim_one,
    completion_of,
    on,
    read,
    read_all,
)
from tests.patience import PATIENCE

pytestmark = [pytest.mark.usefixtures("default_database"), pytest.mark.any_driver]

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


@pytest.fixture
def database(default_database):
    return default_database


async def count(database, model=Generation):
    return (await read_all(database, select(func.count()).select_from(model)))[0]


async def uses(database, *, with_overlooked=True):
    """Return how often each prompt was asked for, those included that a stricter isolation left to the workers."""
    if with_overlooked:
        await database.transact(count_overlooked_prompts)
    async with database.session(read_only=True) as session:
        return dict((await session.execute(select(Prompt.text, Prompt.used_count))).all())


async def add(database, **overrides):
    async with database.session() as session:
        return await add_generation(session, **overrides)


async def complete(database, generation_id):
    """Claim the one pending generation and complete it."""
    async with database.session() as session:
        lease = await claim_one(session)
        assert lease.generation_id == generation_id
        await queue.complete(session, [completion_of(lease)])


# one generation


async def test_enqueue_returns_the_row_that_is_stored(database):
    generation = await enqueue("  lofi rain ")

    assert (await read(database, generation.id)).to_dict() == generation.to_dict()
    assert (generation.prompt, generation.status, generation.attempt) == ("lofi rain", "pending", 0)
    assert uuid.UUID(generation.id).version == 7


async def test_a_status_is_typed_wherever_it_comes_from(database):
    generation = await enqueue("lofi rain")

    assert (
        generation.status
        is (await read(database, generation.id)).status
        is GenerationStatus.PENDING
    )
    assert (
        (await estimate_generation(generation.id)).status
        is Generation().status
        is GenerationStatus.PENDING
    )
    assert await cancel_generation(generation.id) is GenerationStatus.CANCELLED


async def test_what_is_not_said_has_its_default(database):
    row = (await enqueue("lofi rain")).to_dict()

    audio = {
        "model_name": "musicgen-small",
        "duration_seconds": 10.0,
        "sample_rate": 32_000,
        "channels": 1,
    }
    sampling = {
        "guidance_scale": 3.0,
        "temperature": 1.0,
        "top_k": 250,
        "top_p": None,
        "seed": None,
    }
    assert (
        row | audio | {"sampling": sampling, "priority": 0, "max_attempts": 10, "metadata": None}
        == row
    )
    assert abs(datetime.fromisoformat(row["run_at"]) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_what_is_said_is_stored(database):
    sampling = {
        "guidance_scale": 4.5,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "seed": 2**63 - 1,
    }
    generation = await enqueue(
        "lofi rain",
        duration=16,
        model="musicgen-stereo-small",
        channels=1,
        sample_rate=44_100,
        priority=-7,
        max_attempts=1,
        run_at=NOON,
        idempotency_key="order-7",
        metadata={"bpm": 140, "tags": ["a", None]},
        **sampling,
    )

    row = (await read(database, generation.id)).to_dict()
    assert row["sampling"] == sampling
    assert (
        row | {"duration_seconds": 16.0, "model_name": "musicgen-stereo-small", "channels": 1}
        == row
    )
    assert (
        row
        | {"sample_rate": 44_100, "priority": -7, "max_attempts": 1, "idempotency_key": "order-7"}
        == row
    )
    assert row | {"metadata": {"bpm": 140, "tags": ["a", None]}, "run_at": NOON.isoformat()} == row


@on(SQLITE)
@pytest.mark.parametrize(("priority", "max_attempts"), [(-1_000, 1), (1_000, 25)])
async def test_the_limits_are_accepted(priority, max_attempts):
    row = await enqueue("lofi rain", priority=priority, max_attempts=max_attempts)

    assert (row.priority, row.max_attempts) == (priority, max_attempts)


@pytest.mark.parametrize(
    "run_at",
    [
        "2026-01-31T13:00:00+01:00",
        datetime(2026, 1, 31, 7, tzinfo=timezone(timedelta(hours=-5))),
        NOON,
    ],
)
async def test_a_wish_for_later_is_kept_in_utc(database, run_at):
    generation = await enqueue("lofi rain", run_at=run_at)

    assert (await read(database, generation.id)).run_at == NOON


@pytest.mark.parametrize(
    ("model", "channels"), [("musicgen-large", 1), ("musicgen-stereo-large", 2), ("/models/own", 1)]
)
async def test_a_model_brings_its_own_channels(model, channels):
    generation = await enqueue("lofi rain", model=model)

    assert (generation.model_name, generation.channels) == (model, channels)


async def test_the_default_model_is_the_one_of_the_settings(monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_MODEL", "musicgen-tiny-untrained")

    assert (await enqueue("lofi rain")).model_name == "musicgen-tiny-untrained"


async def test_an_option_of_none_is_as_good_as_none_given():
    options = (
        "model",
        "channels",
        "sample_rate",
        "guidance_scale",
        "temperature",
        "top_k",
        "top_p",
        "seed",
        "run_at",
    )
    generation = await enqueue(
        "lofi rain", **dict.fromkeys(options), idempotency_key=None, metadata=None
    )

    assert (generation.model_name, generation.sampling["top_k"]) == ("musicgen-small", 250)


async def test_generations_enqueued_later_have_greater_ids():
    ids = [(await enqueue(f"rain {number}")).id for number in range(5)]

    assert ids == sorted(ids)


async def test_every_enqueue_counts_the_prompts_use(database):
    for prompt in ("rain", "sun", " rain "):
        await enqueue(prompt)

    assert await uses(database) == {"rain": 2, "sun": 1}


# bad input

BAD = [
    ("prompt", " "),
    ("prompt", " \n"),
    ("prompt", "x" * 2001),
    ("prompt", "a\x00b"),
    ("prompt", "a\x1bb"),
    ("prompt", "\ud800"),
    ("prompt", None),
    ("prompt", b"rain"),
    ("duration", 0),
    ("duration", -1.0),
    ("duration", 300.1),
    ("duration", float("nan")),
    ("duration", float("inf")),
    ("duration", "16"),
    ("duration", None),
    ("duration", True),
    ("model", "musicgen-huge"),
    ("model", ""),
    ("model", "../models/own"),
    ("model", 7),
    ("channels", 0),
    ("channels", 3),
    ("sample_rate", 7_999),
    ("sample_rate", 44_100.0),
    ("guidance_scale", 0.5),
    ("guidance_scale", float("nan")),
    ("temperature", -0.1),
    ("temperature", 5.1),
    ("top_k", -1),
    ("top_k", 2_049),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", 1.1),
    ("seed", -1),
    ("seed", 2**63),
    ("seed", "7"),
    ("negative_prompt", ""),
    ("negative_prompt", 7),
    ("melody_kind", "drums"),
    ("melody_kind", "mix"),  # without a melody
    ("priority", 1_001),
    ("priority", -1_001),
    ("priority", None),
    ("priority", True),
    ("max_attempts", 0),
    ("max_attempts", 26),
    ("run_at", "tomorrow"),
    ("run_at", datetime(2026, 1, 31)),  # noqa: DTZ001
    ("run_at", 1_800_000_000),
    ("idempotency_key", ""),
    ("idempotency_key", "k" * 201),
    ("idempotency_key", "a\nb"),
    ("idempotency_key", 7),
    ("metadata", [1]),
    ("metadata", "{}"),
    ("metadata", {"x": float("nan")}),
    ("metadata", {"x": "\x00"}),
    ("metadata", {"x": "\ud800"}),
    ("metadata", {1: "x"}),
    ("metadata", {"x": "y" * 20_000}),
    ("metadata", {"x": [[[[[[[[[1]]]]]]]]]}),
    ("metadata", {"x": {1, 2}}),
    ("metadata", {"x": 2**64}),
    *(
        (name, value)
        for name in ("prompt", "tenant", "negative_prompt")
        for value in ("\u200b\u202e", Decimal(1), ["x"])
    ),
    *(
        (name, value)
        for name in ("duration", "temperature", "top_p")
        for value in (Decimal(1), "1", 1j, True, [1])
    ),
    *(
        (name, value)
        for name in ("channels", "top_k", "seed", "priority")
        for value in (Decimal(1), "1", 1.0, True, b"1")
    ),
    *(
        (name, value)
        for name in ("run_at", "continuation", "melody")
        for value in (7, date(2026, 1, 31), timedelta(1))
    ),
    pytest.param("seed", 10**5000, id="an endless seed"),
    pytest.param("duration", 10**5000, id="an endless duration"),
]


@on(SQLITE)
@pytest.mark.parametrize(
    "value", [np.int64(1), np.float32(1), np.bool_(True), np.array([1, 2])], ids=repr
)
async def test_numbers_that_are_not_pythons_are_refused_where_they_are_not_exact(database, value):
    for name in ("prompt", "duration", "seed", "priority", "tenant", "metadata", "run_at"):
        prompt, options = request_with(name, value)
        with pytest.raises(InvalidRequestError, match=f"^{name} is "):
            await enqueue(prompt, **options)
    await assert_unchanged(database)


@on(SQLITE)
@pytest.mark.parametrize(
    "session",
    ["x", 7, True, object(), Session(), AsyncSession],
    ids=lambda session: type(session).__name__,
)
async def test_what_is_no_session_is_refused(database, session):
    calls = (cancel_generation, retry_generation, queue_position, estimate_generation, enqueue)
    for call in (*calls, lambda prompt, session: enqueue_many([prompt], session=session)):
        with pytest.raises(
            InvalidRequestError, match=r"^session is of the type .*; use an AsyncSession"
        ):
            await call("x", session=session)
    await assert_unchanged(database)


async def test_a_scoped_session_is_the_one_of_the_callers_task(database):
    """The work runs in another task, where the same object would be another session."""
    scoped = async_scoped_session(async_sessionmaker(database.engine), asyncio.current_task)

    one = (await enqueue("one", session=scoped)).id
    many = [row.id for row in await enqueue_many(["two", "three"], session=scoped)]
    await cancel_generation(one, session=scoped)
    await scoped.commit()
    await scoped.remove()

    found = await read_all(database, select(Generation.prompt).order_by(Generation.prompt))
    assert found == ["one", "three", "two"]
    assert (await read(database, one)).status == "cancelled"
    assert (await read(database, many[0])).status == "pending"


@on(SQLITE)
@pytest.mark.parametrize(
    "value", [7, None, b"x", True, 1.5, ["x"], "", "\u200b", "x" * 5000, uuid.uuid4()], ids=type
)
async def test_what_is_no_id_is_refused(value):
    for call in (
        cancel_generation,
        retry_generation,
        queue_position,
        estimate_generation,
        wait_for_generation,
    ):
        with pytest.raises(InvalidRequestError, match=r"^generation_id "):
            await call(value)
    with pytest.raises(InvalidRequestError, match=r"^generation_id "):
        await anext(watch_generation(value))


@on(SQLITE)
@pytest.mark.parametrize(
    "value", ["5", True, b"5", -1, float("nan"), timedelta(seconds=5), Decimal(5)], ids=repr
)
async def test_what_is_no_timeout_is_refused(value):
    with pytest.raises(InvalidRequestError, match=r"^timeout is .*; use a number from 0 to 1e\+09"):
        await wait_for_generation("x", timeout=value)


@on(SQLITE)
@pytest.mark.parametrize("value", [7, None, b"xy", "xy", {"prompt": "x"}], ids=repr)
async def test_what_is_no_list_of_requests_is_refused(database, value):
    with pytest.raises(
        InvalidRequestError, match=r"^requests are not a list; send a list of prompts"
    ):
        await enqueue_many(value)
    await assert_unchanged(database)


def request_with(field, value):
    options = {"prompt": "lofi rain", "idempotency_key": "order-7"} | {field: value}
    return options.pop("prompt"), options


async def assert_unchanged(database):
    assert (await count(database), await count(database, Prompt)) == (0, 0)


@on(SQLITE)
@pytest.mark.parametrize(("field", "value"), BAD)
async def test_bad_input_is_refused_by_its_field_and_the_database_unchanged(database, field, value):
    prompt, options = request_with(field, value)

    with pytest.raises(InvalidRequestError) as caught:
        await enqueue(prompt, **options)

    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} ")
    assert "\n" not in str(caught.value)
    await assert_unchanged(database)


@on(SQLITE)
@pytest.mark.parametrize(("field", "value"), BAD)
async def test_bad_input_in_a_batch_is_refused_by_its_place_and_nothing_stored(
    database, field, value
):
    prompt, options = request_with(field, value)

    with pytest.raises(InvalidRequestError) as caught:
        await enqueue_many(["fine", {"prompt": prompt, **options}, "fine too"])

    assert caught.value.field == f"request 2: {field}"
    await assert_unchanged(database)


async def test_an_unknown_option_is_refused_by_its_name(database):
    with pytest.raises(
        InvalidRequestError,
        match=r"^lenght is not an option; use audio_format, .*channels, continuation, ",
    ):
        await enqueue("lofi rain", lenght=16)

    await assert_unchanged(database)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (7, "request 1: request is not an object"),
        (None, "request 1: request is not an object"),
        ({"duration": 16}, "request 1: prompt is missing"),
        ({"prompt": "x", 7: 7}, "request 1: 7 is not an option"),
    ],
)
async def test_a_request_of_no_known_form_is_refused(database, request_, sentence):
    with pytest.raises(InvalidRequestError) as caught:
        await enqueue_many([request_])

    assert str(caught.value).startswith(sentence)
    await assert_unchanged(database)


async def test_a_batch_too_large_is_refused(database, monkeypatch):
    monkeypatch.setattr(requests, "MAX_BATCH", 2)

    with pytest.raises(InvalidRequestError, match=r"^requests are 3; send at most 2 at a time"):
        await enqueue_many(["a", "b", "c"])
    await assert_unchanged(database)


@on(SQLITE)
async def test_the_largest_batch_is_accepted(database, monkeypatch):
    monkeypatch.setattr(requests, "MAX_BATCH", 2)

    assert len(await enqueue_many(["a", "b"])) == 2


@on(SQLITE)
@pytest.mark.parametrize(
    ("field", "value"), [("prompt", " "), ("duration", 301), ("metadata", {"x": float("nan")})]
)
async def test_a_script_is_refused_in_the_same_words_before_any_database_is_made(
    tmp_path, monkeypatch, field, value
):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", f"sqlite:///{tmp_path / 'none' / 'new.db'}")
    prompt, options = request_with(field, value)

    with pytest.raises(InvalidRequestError) as caught:
        await asyncio.to_thread(enqueue_sync, prompt, **options)

    assert caught.value.field == field
    assert not (tmp_path / "none").exists()


# idempotency


async def test_the_same_request_under_the_same_key_gets_the_existing_row(database):
    first = await enqueue("lofi rain", idempotency_key="order-7", duration=16)
    await complete(database, first.id)
    again = await enqueue(" lofi rain", idempotency_key="order-7", duration=16.0)

    assert (again.id, again.status) == (first.id, "completed")
    assert (await count(database), await uses(database)) == (1, {"lofi rain": 1})


@pytest.mark.parametrize("urgency", [{"priority": 5}, {"run_at": NOON}, {"max_attempts": 1}])
async def test_when_and_how_urgently_are_no_part_of_the_request(urgency):
    first = await enqueue("lofi rain", idempotency_key="order-7")

    assert (await enqueue("lofi rain", idempotency_key="order-7", **urgency)).id == first.id


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": "sun"},
        {"duration": 9},
        {"model": "musicgen-large"},
        {"seed": 1},
        {"channels": 2},
        {"metadata": {"x": 1}},
    ],
)
async def test_another_request_under_the_same_key_is_refused(database, other):
    first = await enqueue("lofi rain", idempotency_key="order-7")
    request = {"prompt": "lofi rain", "idempotency_key": "order-7"} | other

    with pytest.raises(IdempotencyConflictError) as caught:
        await enqueue(**request)

    assert (caught.value.key, caught.value.generation_id) == ("order-7", first.id)
    assert (await count(database), await uses(database)) == (1, {"lofi rain": 1})


@on(SQLITE)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate", 44_100),
        ("guidance_scale", 4),
        ("temperature", 0.9),
        ("top_k", 9),
        ("top_p", 0.5),
        ("negative_prompt", "drums"),
    ],
)
async def test_how_it_is_to_sound_is_a_part_of_the_request(name, value):
    await enqueue("lofi rain", idempotency_key="order-7")

    with pytest.raises(IdempotencyConflictError):
        await enqueue("lofi rain", idempotency_key="order-7", **{name: value})


async def test_a_key_repeated_inside_a_batch_is_one_row(database):
    request = {"prompt": "lofi rain", "idempotency_key": "order-7"}
    rows = await enqueue_many([request, "sun", request])

    assert [row.prompt for row in rows] == ["lofi rain", "sun", "lofi rain"]
    assert rows[0].id == rows[2].id
    assert (await count(database), await uses(database)) == (2, {"lofi rain": 1, "sun": 1})


async def test_two_requests_under_one_key_inside_a_batch_are_refused_with_all_the_rest(database):
    with pytest.raises(IdempotencyConflictError):
        await enqueue_many(["sun", "rain", "sun"], idempotency_key="order-7")

    await assert_unchanged(database)


async def test_producers_that_race_with_one_key_share_one_row(database_url, database):
    programs = [
        await Program.start("produce", database_url, "order-7", "lofi rain") for _ in range(2)
    ]
    for program in programs:
        program.begin()
    ids = [await program.rest() for program in programs]

    assert ids[0] == ids[1]
    # On PostgreSQL the one that is stored may leave its count to the workers: the other one held it.
    assert (await count(database), await uses(database)) == (1, {"lofi rain": 1})


@pytest.fixture
def quicker_rival(monkeypatch, database):
    """Return a function that lets a rival enqueue between our look for a key and our insert.

    On SQLite nobody else can write then, so the rival uses our transaction.
    """

    def arrange(rival):
        look = insertion.find_by_key

        async def look_too_early(session, rows):
            found = await look(session, rows)
            monkeypatch.setattr(insertion, "find_by_key", look)
            if database.is_embedded:
                await rival(session)
                return found
            async with database.session() as other:
                await rival(other)
            return found

        monkeypatch.setattr(insertion, "find_by_key", look_too_early)

    return arrange


async def test_a_producer_whose_rival_was_quicker_gets_the_rivals_row(database, quicker_rival):
    rivals = []

    async def rival(session):
        rivals.append(await enqueue("lofi rain", session=session, idempotency_key="order-7"))

    quicker_rival(rival)
    rows = await enqueue_many(["sun", {"prompt": "lofi rain", "idempotency_key": "order-7"}])

    assert rows[1].id == rivals[0].id
    assert await uses(database) == {"lofi rain": 1, "sun": 1}


async def test_a_producer_whose_rival_asked_for_something_else_is_refused(database, quicker_rival):
    async def rival(session):
        await enqueue("sun", session=session, idempotency_key="order-7")

    quicker_rival(rival)
    with pytest.raises(IdempotencyConflictError):
        await enqueue("lofi rain", idempotency_key="order-7")

    assert await uses(database) == ({} if database.is_embedded else {"sun": 1})


# the caller's own session


@pytest.fixture(params=["configured", "plain"])
async def own(request, database):
    """A session of the caller's own, on an engine of its own."""
    is_ours, is_sqlite = request.param == "configured", database.is_embedded
    options = {"isolation_level": "REPEATABLE READ"} if is_ours and not is_sqlite else {}
    engine = create_async_engine(database.url, **options)
    if is_ours and is_sqlite:
        configure_sqlite(engine)
    async with AsyncSession(engine, expire_on_commit=False) as session:
        yield session
    await engine.dispose()


def calls_of(session):
    """Return a list that grows with every commit and rollback of the session."""
    calls = []
    event.listen(session.sync_session, "after_commit", lambda _: calls.append("commit"))
    event.listen(session.sync_session, "after_rollback", lambda _: calls.append("rollback"))
    return calls


async def everything(session, pending, failed):
    await enqueue("lofi rain", session=session)
    await enqueue("lofi rain", session=session, idempotency_key="order-7")
    await enqueue_many(["sun", "rain"], session=session)
    await cancel_generation(pending, session=session)
    await retry_generation(failed, session=session)
    await queue_position(failed, session=session)


async def test_nothing_is_committed_rolled_back_or_closed_for_the_caller(database, own):
    pending, failed = (await add(database)).id, (await add(database, status="failed")).id
    calls = calls_of(own)

    await everything(own, pending, failed)

    assert calls == []
    assert own.in_transaction()
    await own.rollback()


async def test_a_row_in_the_callers_transaction_is_invisible_until_the_commit(database, own):
    generation = await enqueue("lofi rain", session=own)
    assert await count(database) == 0
    async with database.session(read_only=True) as session:
        assert await session.get(Generation, generation.id) is None

    await own.commit()

    assert (await read(database, generation.id)).is_pending


async def test_a_row_is_gone_when_the_caller_rolls_back(database, own):
    await enqueue("lofi rain", session=own)
    await own.rollback()

    await assert_unchanged(database)


async def test_an_idempotent_duplicate_leaves_the_callers_transaction_usable(database, own):
    first = await enqueue("lofi rain", idempotency_key="order-7")

    again = await enqueue("lofi rain", session=own, idempotency_key="order-7")
    other = await enqueue("sun", session=own)
    await own.commit()

    assert again.id == first.id
    assert await uses(database) == {"lofi rain": 1, "sun": 1}
    assert (await read(database, other.id)).is_pending


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ({"prompt": " "}, InvalidRequestError),
        ({"prompt": "sun", "idempotency_key": "order-7"}, IdempotencyConflictError),
    ],
)
async def test_a_refusal_leaves_the_callers_transaction_usable(database, own, request_, error):
    await enqueue("lofi rain", idempotency_key="order-7")
    with pytest.raises(error):
        await enqueue(**request_, session=own)

    await enqueue("rain", session=own)
    await own.commit()

    assert await uses(database) == {"lofi rain": 1, "rain": 1}


async def test_the_callers_session_has_the_new_objects(database, own):
    alone = await enqueue("lofi rain", session=own)
    alike = await enqueue_many(["a", "b"], session=own)
    (with_key,) = await enqueue_many([{"prompt": "c", "idempotency_key": "k"}], session=own)
    (again,) = await enqueue_many([{"prompt": "c", "idempotency_key": "k"}], session=own)

    assert all(row in own for row in (alone, *alike, with_key))
    assert again is with_key
    alike[1].title = "mine"
    await own.commit()
    assert (await read(database, alike[1].id)).title == "mine"


async def test_a_generation_of_the_callers_session_counts_from_its_view(database, own):
    generation = await enqueue("lofi rain", session=own)

    assert await queue_position(generation.id, session=own) == 1
    assert await queue_position(generation.id) is None
    await own.rollback()


# batches


async def test_a_batch_gives_its_rows_in_order_with_its_defaults(database):
    rows = await enqueue_many(
        ["a", {"prompt": "b", "duration": 5, "seed": 1}, "c"], duration=7, priority=3
    )

    assert [(row.prompt, row.duration_seconds, row.priority) for row in rows] == [
        ("a", 7, 3),
        ("b", 5, 3),
        ("c", 7, 3),
    ]
    assert [row.id for row in rows] == sorted(row.id for row in rows)


async def test_a_batch_is_inserted_in_the_order_of_its_keys(database):
    """Two batches of PostgreSQL would else wait for each other in a circle."""
    keys = [f"{number:04}" for number in range(1_000)]
    await enqueue_many([{"prompt": key[::-1], "idempotency_key": key} for key in reversed(keys)])

    place = text("rowid" if database.is_embedded else "ctid")
    assert await read_all(database, select(Generation.idempotency_key).order_by(place)) == keys


async def test_a_batch_may_come_from_any_iterable(database):
    assert len(await enqueue_many(f"rain {number}" for number in range(3))) == 3
    assert await enqueue_many([]) == []


async def test_a_long_batch_keeps_its_order_and_counts_every_prompt(database):
    prompts = [f"rain {number % 700}" for number in range(1200)]
    rows = await enqueue_many(
        {"prompt": prompt, "idempotency_key": f"k{n}"} for n, prompt in enumerate(prompts)
    )

    assert [row.prompt for row in rows] == prompts
    assert await uses(database) == {
        f"rain {number}": 2 if number < 500 else 1 for number in range(700)
    }


async def test_a_batch_is_stored_as_it_is_returned(database):
    """SQLite inserts 50 rows with one statement, then 8, then one."""
    prompts = [f"rain {number % 55}" for number in range(59)]
    rows = await enqueue_many(prompts, seed=7, metadata={"from": ["a", "test"]})
    stored = await read_all(database, select(Generation).order_by(Generation.id))

    assert [row.prompt for row in rows] == prompts
    assert [row.to_dict() for row in stored] == [row.to_dict() for row in rows]


async def test_a_prompt_of_a_batch_is_the_request_that_it_is_alone(database):
    prompts = ["lofi rain", 'a "quoted" \\ one', "Müller\nvoilà", {"prompt": ""}]
    options = {"seed": 3, "tenant": "ada", "negative_prompt": "drums"}
    rows = await enqueue_many(prompts, **options)
    alone = [await enqueue(row.prompt, **options) for row in rows]

    assert [row.prompt for row in rows] == ["lofi rain", 'a "quoted" \\ one', "Müller\nvoilà", ""]
    for one, other in zip(rows, alone, strict=True):
        own, same = one.to_dict(), other.to_dict()
        for name in ("id", "batch_id", "created_at", "run_at"):
            del own[name], same[name]
        assert own == same
        assert one.prompt_id == other.prompt_id


async def test_generations_of_a_batch_share_no_object(database):
    """Who changes the options of one must not change those of the others."""
    first, second = await enqueue_many(["a", "b"], metadata={"list": []}, tags=["x"])
    third, fourth = await enqueue_many(["a", "b"])

    assert first.metadata_ is not second.metadata_
    assert first.metadata_["list"] is not second.metadata_["list"]
    assert first.tags is not second.tags
    assert third.sampling is not fourth.sampling


async def test_keys_of_all_kinds_are_known_again(database):
    keys = ["a", 'an "odd" \\ one', "ключ", "[1]", "null", "'", "%_"]
    requests = [{"prompt": "rain", "idempotency_key": key} for key in keys]
    made, again = await enqueue_many(requests), await enqueue_many(requests)

    assert [row.id for row in again] == [row.id for row in made]
    assert [(await enqueue(**each)).id for each in requests] == [row.id for row in made]


async def test_a_long_batch_said_again_gives_the_same_rows(database):
    requests = [{"prompt": "rain", "idempotency_key": f"key {number}"} for number in range(600)]
    first = await enqueue_many(requests)
    again = await enqueue_many([*requests[:300], "new", *requests[300:]])

    assert [row.id for row in again if row.prompt == "rain"] == [row.id for row in first]
    assert await uses(database) == {"rain": 600, "new": 1}


# scripts


async def test_a_script_without_an_event_loop_enqueues(database, database_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)

    generation = await asyncio.to_thread(enqueue_sync, "lofi rain", duration=16)

    assert (await read(database, generation.id)).to_dict() == generation.to_dict()


async def test_a_script_makes_the_database_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path / 'folder' / 'new.db'}")

    await asyncio.to_thread(enqueue_sync, "lofi rain")

    assert (tmp_path / "folder" / "new.db").exists()


# waiting and watching


async def test_waiting_returns_the_row_once_it_is_finished(database):
    generation = await enqueue("lofi rain")
    waiting = asyncio.create_task(wait_for_generation(generation.id, timeout=PATIENCE))
    await asyncio.sleep(0)
    await complete(database, generation.id)

    with anyio.fail_after(PATIENCE):
        assert (await waiting).file_path == f"{generation.id}-1.wav"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("timeout", [None, 0, 30])
async def test_waiting_for_a_finished_generation_returns_at_once(database, status, timeout):
    generation = await add(database, status=status)

    with anyio.fail_after(PATIENCE):
        assert (await wait_for_generation(generation.id, timeout=timeout)).status == status


@on(SQLITE)
async def test_what_has_finished_when_the_time_is_up_is_returned_though_nobody_told(
    database, monkeypatch
):
    async def hear_nothing(_generation_id):
        await anyio.sleep_forever()
        yield

    generation = await add(database, status="completed")
    monkeypatch.setattr(generations, "watch_generation", hear_nothing)

    assert (await wait_for_generation(generation.id, timeout=0.01)).status == "completed"


@pytest.mark.parametrize("timeout", [0, 0.02])
async def test_waiting_too_long_raises_and_the_generation_goes_on(database, timeout):
    generation = await enqueue("lofi rain")

    with pytest.raises(
        WaitTimeoutError, match=f"is still pending after {timeout:g} s; it goes on"
    ) as caught:
        await wait_for_generation(generation.id, timeout=timeout)

    assert isinstance(caught.value, TimeoutError)
    assert caught.value.status is GenerationStatus.PENDING
    assert (await read(database, generation.id)).is_pending


def test_a_wait_that_had_no_time_to_read_the_status_says_unfinished():
    assert (
        str(WaitTimeoutError("x", None, 0.0))
        == "Generation x is still unfinished after 0 s; it goes on."
    )


async def test_waiting_for_what_is_not_there_says_so():
    with pytest.raises(GenerationNotFoundError):
        await wait_for_generation("unknown", timeout=5)


async def test_waiting_for_what_is_deleted_meanwhile_says_so(database):
    generation = await enqueue("lofi rain")
    waiting = asyncio.create_task(wait_for_generation(generation.id))
    await asyncio.sleep(0)
    async with database.session() as session:
        await delete_generation(session, generation.id)

    with anyio.fail_after(PATIENCE), pytest.raises(GenerationNotFoundError):
        await waiting


async def test_nothing_watches_the_database_once_the_waiting_is_over(database):
    generation = await enqueue("lofi rain")
    with pytest.raises(WaitTimeoutError):
        await wait_for_generation(generation.id, timeout=0)
    await cancel_generation(generation.id)
    await wait_for_generation(generation.id)

    assert database.changes._subscriptions == set()


async def test_a_waiter_can_be_cancelled(database):
    generation = await enqueue("lofi rain")
    with anyio.move_on_after(0.02) as scope:
        await wait_for_generation(generation.id)

    assert scope.cancelled_caught
    assert database.changes._subscriptions == set()


async def test_watching_yields_every_change_up_to_the_end(database):
    generation = await enqueue("lofi rain")
    rows = watch_generation(generation.id)
    seen = [await anext(rows)]
    async with database.session() as session:
        lease = await claim_one(session)
    seen.append(await anext(rows))
    async with database.session() as session:
        await queue.renew(session, {lease: 0.5}, lease_seconds=30)
    seen.append(await anext(rows))
    async with database.session() as session:
        await queue.cancel(session, generation.id)
        await queue.release(session, [lease])
    seen += [row async for row in rows]

    assert [(row.status, row.progress) for row in seen] == [
        ("pending", 0.0),
        ("processing", 0.0),
        ("processing", 0.5),
        ("cancelled", 0.5),
    ]


async def test_a_change_that_nobody_watches_for_is_not_yielded(database):
    generation = await enqueue("lofi rain")
    rows = watch_generation(generation.id)
    await anext(rows)
    watching = asyncio.create_task(anext(rows))
    await enqueue("sun")
    await asyncio.wait([watching], timeout=0.1)
    assert not watching.done()

    await cancel_generation(generation.id)
    with anyio.fail_after(PATIENCE):
        assert (await watching).status == "cancelled"
    await rows.aclose()


async def test_watching_goes_on_without_a_hint_by_its_slow_poll(database, monkeypatch):
    monkeypatch.setattr(database._connections.here(), "changes", FileChanges(None))
    monkeypatch.setattr(generations, "_POLL_SECONDS", 0.01)
    generation = await enqueue("lofi rain")
    waiting = asyncio.create_task(wait_for_generation(generation.id))
    await asyncio.sleep(0)
    await cancel_generation(generation.id)

    with anyio.fail_after(PATIENCE):
        assert (await waiting).status == "cancelled"


# cancel, retry, position


async def test_cancelling_a_pending_generation_ends_it(database):
    generation = await enqueue("lofi rain")

    assert await cancel_generation(generation.id) == "cancelled"
    assert await cancel_generation(generation.id) == "cancelled"
    assert (await read(database, generation.id)).status == "cancelled"


async def test_cancelling_a_running_generation_asks_its_worker(database):
    generation = await enqueue("lofi rain")
    async with database.session() as session:
        lease = await claim_one(session)

    assert await cancel_generation(generation.id) == "processing"
    async with database.session() as session:
        assert await queue.find_cancel_requests(session, "worker-1") == [lease]


@pytest.mark.parametrize("status", ["failed", "cancelled"])
async def test_a_retried_generation_waits_again(database, status):
    generation = await add(database, status=status, failures=3)

    assert await retry_generation(generation.id) is None
    assert (await read(database, generation.id)).is_pending


@pytest.mark.parametrize(
    ("call", "statuses"),
    [
        (cancel_generation, ["completed", "failed"]),
        (retry_generation, ["pending", "processing", "completed"]),
    ],
)
async def test_what_the_status_does_not_allow_is_refused(database, call, statuses):
    for status in statuses:
        generation = await add(database, status=status)
        with pytest.raises(IllegalTransitionError, match=f"is {status} and cannot become"):
            await call(generation.id)
        assert (await read(database, generation.id)).to_dict() == generation.to_dict()


@pytest.mark.parametrize("call", [cancel_generation, retry_generation])
async def test_what_is_not_there_is_refused(call):
    with pytest.raises(GenerationNotFoundError, match="There is no generation 'unknown'"):
        await call("unknown")


async def test_the_position_counts_those_that_go_first():
    later, first = await enqueue("later"), await enqueue("first", priority=1)

    assert [await queue_position(row.id) for row in (first, later)] == [1, 2]
    assert await queue_position("unknown") is None


def test_every_refusal_is_one_family_of_errors():
    assert issubclass(InvalidRequestError, ValueError)
    assert all(
        issubclass(error, DgxMusicError)
        for error in (InvalidRequestError, IdempotencyConflictError)
    )


async def test_the_synchronous_helper_is_refused_inside_an_event_loop():
    with pytest.raises(RuntimeError, match="await enqueue"):
        enqueue_sync("lofi rain")


async def test_the_key_that_completion_writes_is_refused_in_metadata(default_database):
    with pytest.raises(InvalidRequestError, match="metadata has the key 'audio'"):
        await enqueue("lofi rain", metadata={"audio": 1})
    assert await read_all(default_database, select(Generation)) == []


# what a request may bring


async def clips_of(database):
    return sorted(await read_all(database, select(Clip.sha256)))


async def test_an_empty_prompt_is_enqueued_as_it_is(database):
    generation = await enqueue("")

    assert (await read(database, generation.id)).prompt == ""
    assert await uses(database) == {"": 1}


async def test_a_negative_prompt_is_kept_with_the_sampling(database):
    generation = await enqueue("lofi rain", negative_prompt=" drums ")

    assert (await read(database, generation.id)).sampling["negative_prompt"] == "drums"


async def test_a_request_without_news_has_the_hash_that_it_always_had(database):
    options = {"model": "musicgen-small", "duration": 16, "seed": 7}
    row = await enqueue("lofi rain", idempotency_key="k", **options)

    assert row.request_hash == "f8ae04fb4fa169055e20d5c4d246a69b22e94e4e8b1be7938d336f964fa50717"
    assert (await read(database, row.id)).request_hash == row.request_hash


async def test_only_a_request_with_a_key_has_a_hash(database):
    alone, (one, other) = await enqueue("rain"), await enqueue_many(["rain", "sun"], variations=1)

    assert [row.request_hash for row in (alone, one, other)] == [None] * 3
    assert await read_all(database, select(Generation.request_hash).distinct()) == [None]


async def test_a_format_is_stored_and_makes_it_another_request(database):
    plain = await enqueue("lofi rain", idempotency_key="k")
    flac = await enqueue("lofi rain", audio_format="flac")

    assert (plain.audio_format, flac.audio_format) == (None, "flac")
    with pytest.raises(IdempotencyConflictError):
        await enqueue("lofi rain", audio_format="flac", idempotency_key="k")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"audio_format": "aac"}, "audio_format is 'aac'; use wav, flac, mp3 or ogg."),
        ({"audio_format": 3}, "audio_format is 3; use wav, flac, mp3 or ogg."),
        ({"audio_format": ""}, "audio_format is ''; use wav, flac, mp3 or ogg."),
        (
            {"audio_format": "mp3", "sample_rate": 96_000},
            "audio_format 'mp3' cannot hold 96,000 Hz; use one of 8,000, 11,025, 12,000, 16,000, "
            "22,050, 24,000, 32,000, 44,100, 48,000 Hz, or another audio format.",
        ),
    ],
)
@on(SQLITE)
async def test_a_format_that_no_worker_can_write_is_refused(options, message):
    with pytest.raises(InvalidRequestError) as caught:
        await enqueue("lofi rain", **options)

    assert str(caught.value) == message


async def test_clips_are_stored_with_the_row_and_shown_by_their_hashes(database, tmp_path):
    path = tmp_path / "tune.mp3"
    path.write_bytes(audio_file(kind="MP3"))

    row = await enqueue(
        "x", continuation=audio_file(), melody=path, model="musicgen-melody", duration=300
    )

    assert (await read(database, row.id)).to_dict() == row.to_dict()
    assert await clips_of(database) == sorted([row.continuation_sha256, row.melody_sha256])


async def test_generations_that_share_a_clip_share_its_row(database):
    data = audio_file()
    rows = await enqueue_many(["a", {"prompt": "b", "seed": 7}, "c"], continuation=data)
    rows += [await enqueue("d", continuation=data)]

    assert await clips_of(database) == [rows[0].continuation_sha256]
    assert len({row.continuation_sha256 for row in rows}) == 1


async def test_a_clip_is_gone_when_the_caller_rolls_back(database, own):
    await enqueue("x", session=own, continuation=audio_file())
    await own.rollback()

    assert await clips_of(database) == []


async def test_the_same_clip_under_the_same_key_gets_the_existing_row(database):
    first = await enqueue("x", continuation=audio_file(), idempotency_key="order-7")

    assert (await enqueue("x", continuation=audio_file(), idempotency_key="order-7")).id == first.id
    for other in ({}, {"continuation": audio_file(hertz=441)}):
        with pytest.raises(IdempotencyConflictError):
            await enqueue("x", idempotency_key="order-7", **other)
    assert await clips_of(database) == [first.continuation_sha256]


@on(SQLITE)
@pytest.mark.parametrize(
    "other", [{"melody": audio_file(kind="FLAC")}, {"continuation": audio_file()}], ids=[*"ab"]
)
async def test_the_same_sound_from_another_file_or_for_another_use_is_another_request(other):
    options = {"model": "musicgen-melody", "idempotency_key": "order-7"}
    first = await enqueue("x", melody=audio_file(), **options)

    with pytest.raises(IdempotencyConflictError):
        await enqueue("x", **options, **other)
    again = await enqueue("x", model="musicgen-melody", **other)
    assert first.melody_sha256 in (again.melody_sha256, again.continuation_sha256)


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        ({"continuation": b"noise"}, "continuation is not audio that can be read"),
        (
            {"continuation": audio_file(2.0), "duration": 2},
            "continuation is 2 s long, and the duration of 2 s counts",
        ),
        (
            {"melody": audio_file()},
            "melody is given for musicgen-small, which hears none; use musicgen-melody.",
        ),
        ({"melody": b"", "model": "musicgen-melody"}, "melody is not audio that can be read"),
    ],
)
async def test_a_bad_clip_is_refused_by_its_place_and_nothing_stored(database, request_, sentence):
    with pytest.raises(InvalidRequestError, match=f"^request 2: {sentence}"):
        await enqueue_many(
            [{"prompt": "a", "continuation": audio_file()}, {"prompt": "b", **request_}]
        )
    with pytest.raises(InvalidRequestError, match=f"^{sentence}"):
        await enqueue("b", **request_)

    await assert_unchanged(database)
    assert await clips_of(database) == []


@on(SQLITE)
@pytest.mark.parametrize("name", ["continuation", "melody"])
@pytest.mark.parametrize("model", ["musicgen-melody", "musicgen-small"])
async def test_a_clip_given_as_text_is_refused_before_any_file_is_touched(
    database, tmp_path, monkeypatch, name, model
):
    path = tmp_path / "tune.wav"
    path.write_bytes(audio_file())
    monkeypatch.setattr(
        "dgx_music.audio.clips.Reader.read", lambda *_: pytest.fail("a file was read")
    )
    sentence = f"{name} is text; use pathlib.Path\\(...\\) for a file of this machine, or the bytes of one."

    for given in (str(path), "nowhere.wav", ""):
        with pytest.raises(InvalidRequestError, match=f"^{sentence}$"):
            await enqueue("x", model=model, **{name: given})
        with pytest.raises(InvalidRequestError, match=f"^request 2: {sentence}$"):
            await enqueue_many(
                [{"prompt": "a", "continuation": path}, {"prompt": "b", name: given}], model=model
            )
    await assert_unchanged(database)


async def test_clips_are_read_beside_the_event_loop(database, monkeypatch):
    threads = []
    monkeypatch.setattr(
        "dgx_music.audio.clips._make",
        lambda *given, make=clips._make: threads.append(get_ident()) or make(*given),
    )

    await enqueue("x", continuation=audio_file())

    assert threads
    assert get_ident() not in threads


def test_a_script_brings_clips_too(database, database_url, monkeypatch):
    monkeypatch.setenv("DGX_MUSIC_DATABASE_URL", database_url)

    assert enqueue_sync("x", continuation=audio_file()).continuation_sha256 is not None
