"""Generations made again, and music that goes on from another one's, on every database."""

import io
import json
from hashlib import sha256
from pathlib import Path

import pytest
import soundfile
from sqlalchemy import delete, select, update

from dgx_music import (
    GenerationNotFoundError,
    IdempotencyConflictError,
    InvalidRequestError,
    NoAudioError,
    again_generation,
    cancel_generation,
    continue_generation,
    enqueue,
    get_batch,
    get_family,
)
from dgx_music.audio.endings import end_of
from dgx_music.errors import ArtifactError
from dgx_music.inference.engine import seed_of
from dgx_music.storage import delete_generation, families, queue
from dgx_music.storage.clips import hold_clips, prune_clips
from dgx_music.storage.models import Clip, Generation
from dgx_music.storage.schema import now_plus
from tests.factories import (
    SQLITE,
    add_generation,
    audio_file,
    claim_one,
    completion_of,
    on,
    read,
    read_all,
)

pytestmark = [pytest.mark.usefixtures("default_database"), pytest.mark.any_driver]

REQUEST = {
    "duration": 20.0,
    "model": "musicgen-stereo-small",
    "channels": 1,
    "sample_rate": 48_000,
    "guidance_scale": 4.0,
    "top_p": 0.9,
    "negative_prompt": "drums",
    "tenant": "label-7",
    "metadata": {"order": 4711},
}
REPEATED = (
    *("prompt", "model_name", "duration_seconds", "sample_rate", "channels", "tenant"),
    *("metadata_", "continuation_sha256", "melody_sha256", "audio_format"),
)


@pytest.fixture
def database(default_database):
    return default_database


@pytest.fixture
async def finished(database, tmp_path):
    """Returns a function that completes a request with this audio, and returns its row."""

    async def finish(content=b"", **options):
        row = await enqueue("lofi rain", **options)
        path = tmp_path / f"{row.id}-1.wav"
        path.write_bytes(content)
        async with database.session() as session:
            lease = await claim_one(session, model_name=row.model_name)
            audio = {"seed": 2**62, "peak": 0.5}
            file = {"file_path": str(path), "sha256": sha256(content).hexdigest()}
            await queue.complete(session, [completion_of(lease, audio=audio, **file)])
        return await read(database, row.id)

    return finish


def repeated(row):
    return {name: getattr(row, name) for name in REPEATED}


# again


async def test_a_generation_is_made_again_with_all_that_was_asked_for(database):
    old = await enqueue("lofi rain", seed=7, priority=5, **REQUEST)

    (new,) = await again_generation(old.id)

    assert (await read(database, new.id)).to_dict() == new.to_dict()
    assert (repeated(new), new.parent_id) == (repeated(old), old.id)
    assert new.sampling == old.sampling | {"seed": None}
    assert (new.priority, new.batch_id, new.take) == (0, None, None)


async def test_what_completion_and_people_wrote_is_not_repeated(finished):
    old = await finished(metadata={"order": 1}, audio_format="flac", title="Rain", tags=["x"])

    (new,) = await again_generation(old.id)
    (titled,) = await again_generation(old.id, title="Rain, again", audio_format="ogg")

    assert (new.get_metadata(), new.audio_format, new.title) == ({"order": 1}, "flac", None)
    assert (new.tags, new.is_starred) == (None, False)
    assert (titled.title, titled.audio_format) == ("Rain, again", "ogg")


async def test_several_are_a_batch_of_takes_with_seeds_that_follow_each_other(database):
    old = await enqueue("lofi rain")

    rows = await again_generation(old.id, seed=7, count=3)

    assert [(row.take, row.sampling["seed"]) for row in rows] == [(1, 7), (2, 8), (3, 9)]
    assert {row.parent_id for row in rows} == {old.id}
    assert (await get_batch(rows[0].batch_id)).total == 3


async def test_the_same_seed_is_the_one_that_was_asked_for(finished):
    old = await finished(seed=2**60)

    (new,) = await again_generation(old.id, seed="same")

    assert new.sampling["seed"] == 2**60


async def test_the_same_seed_is_the_one_that_the_engine_noted(finished):
    old = await finished()

    (new,) = await again_generation(old.id, seed="same")

    assert new.sampling["seed"] == 2**62


async def test_the_same_seed_of_a_row_that_has_none_yet_is_the_one_it_will_get():
    old = await enqueue("lofi rain")

    (new,) = await again_generation(old.id, seed="same")

    assert new.sampling["seed"] == seed_of(old.id) < 2**53


async def test_changes_are_made_and_the_rest_stays():
    old = await enqueue("lofi rain", seed=7, **REQUEST)

    (new,) = await again_generation(old.id, prompt="trap", duration=60, top_p=None, metadata=None)

    changed = {"prompt": "trap", "duration_seconds": 60.0, "metadata_": None}
    assert repeated(new) == repeated(old) | changed
    assert new.sampling["top_p"] is None
    assert new.sampling["negative_prompt"] == "drums"


async def test_another_model_has_its_own_form_unless_one_was_chosen():
    plain = await enqueue("a", model="musicgen-small")
    chosen = await enqueue("a", model="musicgen-small", channels=2, sample_rate=48_000)

    forms = []
    for old in (plain, chosen):
        (new,) = await again_generation(old.id, model="musicgen-stereo-small")
        forms.append((new.model_name, new.channels, new.sample_rate))
    assert forms == [
        ("musicgen-stereo-small", 2, 32_000),
        ("musicgen-stereo-small", 2, 48_000),
    ]


@pytest.mark.parametrize("count", [1, 3])
async def test_one_key_makes_it_again_once(database, count):
    old = await enqueue("lofi rain")
    first = await again_generation(old.id, count=count, idempotency_key="k")

    again = await again_generation(old.id, count=count, idempotency_key="k")

    assert [row.id for row in again] == [row.id for row in first]
    assert len(await read_all(database, select(Generation.id))) == 1 + count


@pytest.mark.parametrize("other", [{"duration": 9}, {"seed": 3}, {"count": 2}])
async def test_one_key_makes_nothing_else_again(other):
    old, equal = await enqueue("lofi rain"), await enqueue("lofi rain")
    await again_generation(old.id, idempotency_key="k")

    with pytest.raises(IdempotencyConflictError):
        await again_generation(old.id, idempotency_key="k", **other)
    with pytest.raises(IdempotencyConflictError):
        await again_generation(equal.id, idempotency_key="k")


async def test_it_is_made_in_the_callers_transaction(database):
    async with database.session() as session:
        old = await enqueue("lofi rain", session=session)
        rows = await again_generation(old.id, count=2, session=session)
        assert len(rows) == 2
        await session.rollback()

    assert await read_all(database, select(Generation.id)) == []


@on(SQLITE)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "old"}, "seed is 'old'; use new, same, or a whole number"),
        ({"seed": -1}, "seed is -1; "),
        ({"seed": None}, "seed is missing; "),
        ({"seed": 1.5}, "seed is 1.5; "),
        ({"count": 0}, "count is 0; use a whole number from 1 to 16."),
        ({"count": 17}, "count is 17; "),
        ({"variations": 2}, "variations is called count here; use count."),
        ({"durations": 3}, "durations is not an option; "),
        ({"duration": 301}, "duration is 301 s; "),
        ({"prompt": " "}, "prompt is only white space; "),
        ({"model": "musicgen-huge"}, "model 'musicgen-huge' is not known; "),
        ({"count": 2, "temperature": 0}, "variations would all be the same"),
    ],
)
async def test_changes_are_checked_as_every_request(database, changes, message):
    old = await enqueue("lofi rain")

    with pytest.raises(InvalidRequestError) as caught:
        await again_generation(old.id, **changes)

    assert str(caught.value).startswith(message)
    assert len(await read_all(database, select(Generation.id))) == 1


async def test_what_is_not_there_is_not_made_again():
    with pytest.raises(GenerationNotFoundError):
        await again_generation("unknown")
    with pytest.raises(GenerationNotFoundError):
        await continue_generation("unknown", duration=60)


# clips


async def test_clips_are_used_again_without_being_read(database, monkeypatch):
    old = await enqueue(
        "x", model="musicgen-melody", melody=audio_file(), continuation=audio_file()
    )
    monkeypatch.setattr("dgx_music.audio.clips.Reader", lambda: pytest.fail("a clip was read"))

    (new,) = await again_generation(old.id, duration=20)

    assert repeated(new) == repeated(old) | {"duration_seconds": 20.0}


async def test_a_clip_may_be_left_out_or_be_another_one():
    old = await enqueue(
        "x", model="musicgen-melody", melody=audio_file(), continuation=audio_file()
    )

    (without,) = await again_generation(old.id, melody=None)
    (other,) = await again_generation(old.id, continuation=audio_file(2.0))

    assert (without.melody_sha256, without.continuation_sha256) == (None, old.continuation_sha256)
    assert other.melody_sha256 == old.melody_sha256
    assert other.continuation_sha256 not in (None, old.continuation_sha256)


async def test_how_a_melody_is_read_goes_with_the_melody():
    old = await enqueue(
        "x", model="musicgen-melody", melody=audio_file(), melody_kind="mix", temperature=0.5
    )

    (same,) = await again_generation(old.id)
    (without,) = await again_generation(old.id, melody=None)

    assert same.sampling["melody_kind"] == "mix"
    assert "melody_kind" not in without.sampling
    assert without.sampling["temperature"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"duration": 2},
            "continuation is 2 s long, and the duration of 2 s counts from its start",
        ),
        ({"model": "musicgen-small"}, "melody is given for musicgen-small, which hears none"),
    ],
)
async def test_a_clip_that_does_not_go_with_a_change_is_refused(database, changes, message):
    clips = {"melody": audio_file(), "continuation": audio_file(2.0)}
    old = await enqueue("x", model="musicgen-melody", **clips)

    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        await again_generation(old.id, **changes)
    assert len(await read_all(database, select(Generation.id))) == 1


async def test_a_clip_that_is_gone_by_now_is_refused(database, monkeypatch):
    old = await enqueue("x", continuation=audio_file())
    (row,) = [await read(database, old.id)]
    async with database.session() as session:
        await delete_generation(session, old.id)
        await session.execute(delete(Clip))

    async def read_before(_id, _session):
        return row

    monkeypatch.setattr("dgx_music.client.again._read", read_before)
    with pytest.raises(InvalidRequestError, match=r"^clip \w+ is no longer stored"):
        await again_generation(old.id)


@on("asyncpg", "psycopg")
async def test_a_clip_that_is_used_again_is_not_pruned_before_the_row_is_there(
    database, monkeypatch
):
    old = await enqueue("x", continuation=audio_file())
    pruned = []

    async def hold_then_prune(session, sha256s):
        await hold_clips(session, sha256s)
        async with database.session() as other:
            await delete_generation(other, old.id)
            await other.execute(update(Clip).values(last_used_at=now_plus(-1e6)))
        pruned.append(await database.transact(lambda current: prune_clips(current, limit=10)))

    monkeypatch.setattr("dgx_music.storage.insertion.hold_clips", hold_then_prune)
    (new,) = await again_generation(old.id)

    assert pruned == [0]
    assert (await read(database, new.id)).continuation_sha256 == old.continuation_sha256


# continue


async def seconds_of_clip(database):
    return await read_all(database, select(Clip.duration_seconds))


async def test_music_goes_on_from_all_of_a_short_audio(database, finished):
    old = await finished(audio_file(2.0), seed=7)

    made = await continue_generation(old.id, duration=60)

    (new,) = made.generations
    assert (made.clip_seconds, made.parent_seconds, made.is_cut) == (2.0, 2.0, False)
    assert await seconds_of_clip(database) == [2.0]
    assert (new.parent_id, new.duration_seconds, new.prompt) == (old.id, 60.0, "lofi rain")
    assert new.sampling["seed"] is None


async def test_music_goes_on_from_the_end_of_a_long_audio(database, finished):
    old = await finished(audio_file(31.5, rate=48_000, channels=2, kind="FLAC"))

    made = await continue_generation(old.id, duration=40, count=2, seed=5)

    assert (made.clip_seconds, made.parent_seconds, made.is_cut) == (30.0, 31.5, True)
    assert await seconds_of_clip(database) == [30.0]
    assert [row.sampling["seed"] for row in made.generations] == [5, 6]
    assert json.loads(json.dumps(made.to_dict()))["parent_seconds"] == 31.5


async def test_one_key_continues_once(finished):
    old = await finished(audio_file(2.0))
    call = {"duration": 60, "idempotency_key": "k"}

    first = await continue_generation(old.id, **call)

    again = await continue_generation(old.id, **call)
    assert again.generations[0].id == first.generations[0].id


async def test_a_duration_within_what_is_there_is_refused(finished):
    old = await finished(audio_file(2.0))

    with pytest.raises(InvalidRequestError, match=r"^duration is 2 s, and counts from the start"):
        await continue_generation(old.id, duration=2)


@on(SQLITE)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"continuation": b""}, "continuation is given twice"),
        ({"melodie": b""}, "melodie is not an"),
    ],
)
async def test_changes_of_a_continuation_are_checked(finished, changes, message):
    old = await finished(audio_file(2.0))

    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        await continue_generation(old.id, duration=60, **changes)


async def test_what_has_no_audio_is_not_continued():
    old = await enqueue("lofi rain")
    await cancel_generation(old.id)

    with pytest.raises(NoAudioError, match=r"is cancelled and has no audio\.$"):
        await continue_generation(old.id, duration=60)


async def test_audio_is_read_before_the_callers_transaction_begins(database, finished, monkeypatch):
    old = await finished(audio_file(2.0))
    began = []

    async def read_end(row):
        began.append(session.in_transaction())
        return end_of(Path(row.file_path).read_bytes(), row.file_path)

    monkeypatch.setattr("dgx_music.client.again._end_of_audio", read_end)
    async with database.session() as session:
        made = await continue_generation(old.id, duration=60, session=session)
        await session.rollback()

    assert began == [False]
    assert len(made.generations) == 1
    assert len(await read_all(database, select(Generation.id))) == 1


@on(SQLITE)
@pytest.mark.parametrize("content", [None, b"", b"noise", audio_file(2.0, kind="FLAC")[:600]])
async def test_audio_that_is_lost_or_damaged_is_named(finished, content):
    old = await finished(content or b"")
    if content is None:
        Path(old.file_path).unlink()

    with pytest.raises(ArtifactError, match=old.id):
        await continue_generation(old.id, duration=60)


@on(SQLITE)
@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("seconds", [0.5, 29.9, 30.0, 65.0])
async def test_the_end_of_each_format_is_its_end(kind, seconds):
    start, end = audio_file(seconds - 0.25, kind="WAV"), audio_file(0.25, hertz=1_000)
    pieces = [soundfile.read(io.BytesIO(piece))[0] for piece in (start, end)]
    buffer = io.BytesIO()
    soundfile.write(buffer, [*pieces[0], *pieces[1]], 32_000, format=kind)

    ending = end_of(buffer.getvalue(), "a file")

    samples, rate = soundfile.read(io.BytesIO(ending.data))
    assert (rate, ending.seconds) == (32_000, pytest.approx(min(seconds, 30.0), abs=0.1))
    assert ending.whole_seconds == pytest.approx(seconds, abs=0.1)
    assert samples[-4_000:] == pytest.approx(pieces[1][-4_000:], abs=0.1)


# families


async def test_a_family_is_a_parent_and_its_children(database):
    old = await enqueue("lofi rain")
    children = await again_generation(old.id, count=2)
    (grandchild,) = await again_generation(children[0].id)

    async with database.session(read_only=True) as session:
        above, between = [await get_family(session, row.id) for row in (old, children[0])]

    assert (above.parent_id, above.parent) == (None, None)
    assert [row.id for row in above.children] == [row.id for row in children]
    assert (between.parent.id, [row.id for row in between.children]) == (old.id, [grandchild.id])
    assert json.loads(json.dumps(between.to_dict()))["parent"]["status"] == "pending"


async def test_a_deleted_parent_is_said_to_be_deleted(database):
    old = await enqueue("lofi rain")
    (new,) = await again_generation(old.id)
    async with database.session() as session:
        await delete_generation(session, old.id)

    async with database.session(read_only=True) as session:
        family = await get_family(session, new.id)
    assert (family.parent_id, family.parent, family.is_parent_deleted) == (old.id, None, True)


async def test_of_many_children_the_newest_are_shown(database, monkeypatch):
    monkeypatch.setattr(families, "MOST_CHILDREN", 2)
    async with database.session() as session:
        old = await add_generation(session)
        children = [await add_generation(session, parent_id=old.id) for _ in range(3)]
        family = await get_family(session, old.id)

    assert [row.id for row in family.children] == [row.id for row in children[1:]]


async def test_nobody_has_no_family(database):
    async with database.session() as session:
        with pytest.raises(GenerationNotFoundError):
            await get_family(session, "unknown")
