"""Finished audio on its way out: from a folder or an object store, to a reader or a file."""

import asyncio
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile
from anyio import to_thread

from dgx_music import GenerationNotFoundError, NoAudioError, get_session, save_audio, stream_audio
from dgx_music.artifacts import LocalArtifacts, open_output
from dgx_music.client import audio_out
from dgx_music.client.audio_out import Saving
from dgx_music.client.content import values_of
from dgx_music.errors import ArtifactError, InvalidRequestError
from tests.factories import ROOT, SQLITE, add_generation, audio_file, on
from tests.object_store import s3_fixture, s3_port_fixture  # noqa: F401
from tests.patience import PATIENCE

pytestmark = [pytest.mark.usefixtures("default_database"), on(SQLITE)]

NIGHT = datetime(2026, 1, 31, 23, 30, tzinfo=UTC)
FORMATS = ["wav", "flac", "mp3", "ogg"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to be in."""
    folder = tmp_path / "out"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def store(tmp_path):
    return LocalArtifacts(tmp_path / "audio")


@pytest.fixture(params=["local", "s3"])
def any_store(request, store):
    return store if request.param == "local" else open_output(request.getfixturevalue("s3"))


async def made(store, data=None, extension="wav", **columns):
    """Add a completed generation with its audio, and return its row."""
    data = audio_file(0.5) if data is None else data
    async with get_session() as session:
        values = {"status": "completed", "attempt": 1, "completed_at": NIGHT}
        row = await add_generation(session, **values | columns)
        stored = await store.publish(row.id, 1, extension, data)
        row.file_path, row.sha256, row.file_size_bytes = (
            stored.path,
            stored.sha256,
            stored.size_bytes,
        )
        await session.flush()
        return row


async def read(chunks):
    return b"".join([chunk async for chunk in chunks])


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def open_files_in(folder):
    links = [*Path("/proc/self/fd").iterdir()]
    return [each for each in links if each.is_symlink() and folder in each.readlink().parents]


# Streams


async def test_audio_streams_from_wherever_it_lives_whole_or_in_parts(any_store):
    data = audio_file(1.0)
    row = await made(any_store, data)

    assert await read(stream_audio(row.id)) == data
    assert await read(stream_audio(row.id, 44, 1_000)) == data[44:1_044]
    assert await read(stream_audio(row.id, start=len(data) - 5)) == data[-5:]


@pytest.mark.parametrize(
    ("status", "why"),
    [
        ("pending", "is pending and has no audio yet."),
        ("processing", "is processing and has no audio yet."),
        ("failed", "is failed and has no audio."),
        ("cancelled", "is cancelled and has no audio."),
    ],
)
async def test_a_generation_that_is_not_completed_has_no_audio(place, status, why):
    async with get_session() as session:
        row = await add_generation(session, status=status)

    with pytest.raises(NoAudioError) as caught:
        await read(stream_audio(row.id))
    assert str(caught.value) == f"Generation {row.id} {why}"
    assert (caught.value.generation_id, caught.value.status) == (row.id, status)
    with pytest.raises(NoAudioError):
        await save_audio(row.id, place)
    assert names_in(place) == []


async def test_a_generation_that_is_not_there_has_no_audio(place):
    with pytest.raises(GenerationNotFoundError):
        await read(stream_audio("nobody"))
    with pytest.raises(GenerationNotFoundError):
        await save_audio("nobody", place)


async def test_audio_that_is_gone_is_one_sentence_and_leaves_nothing(any_store, place):
    row = await made(any_store)
    await any_store.delete(row.id, [1])

    with pytest.raises(ArtifactError, match=rf"{row.id}-1\.wav cannot be read.*no such"):
        await save_audio(row.id, "song")
    assert names_in(place) == []


async def test_a_row_completed_by_hand_may_name_no_file(place):
    async with get_session() as session:
        row = await add_generation(session, status="completed")

    with pytest.raises(ArtifactError, match=r"is completed, but its row names no file\.$"):
        await save_audio(row.id, place)


@pytest.mark.parametrize(
    ("name", "sha256"), [("secret-1.wav", None), ("secret", "ab" * 32), ("secret-1.wav.old", "ab")]
)
async def test_a_file_that_no_worker_made_is_not_read(place, tmp_path, name, sha256):
    secret = tmp_path / name
    secret.write_bytes(b"root:x:0:0")
    async with get_session() as session:
        file = {"file_path": str(secret), "sha256": sha256}
        row = await add_generation(session, status="completed", **file)

    for call in (lambda: read(stream_audio(row.id)), lambda: save_audio(row.id, place)):
        with pytest.raises(ArtifactError) as caught:
            await call()
        assert str(caught.value).endswith(f"completed, but no worker made its file {secret}.")
    assert names_in(place) == []


# Files


async def test_a_file_has_the_stored_bytes_and_a_name_that_says_what_it_is(any_store, place):
    data = audio_file(0.5)
    row = await made(
        any_store,
        data,
        title="Rainy Night",
        take=2,
        bpm=137.6,
        musical_key="F#m",
        sampling={"seed": 7},
        model_name="musicgen-small",
    )

    path = await save_audio(row.id, "{model}/{date} {title} {key} {bpm} {seed} {take} {id}")

    name = f"musicgen-small/2026-01-31 Rainy Night F#m 138 7 2 {row.id}.wav"
    assert (path, path.read_bytes()) == (place / name, data)
    assert names_in(place) == [name]
    assert path.stat().st_mode & 0o777 == 0o600


async def test_a_folder_gets_the_default_name(store, place):
    row = await made(store, prompt="lofi rain")

    for folder in (place, str(place), Path(), "new/"):
        path = await save_audio(row.id, folder, force=True)
        assert path.name == f"lofi rain_{row.id[-8:]}.wav"
    assert len(names_in(place)) == 2


async def test_the_seed_of_the_engine_names_a_file_if_none_was_given(store):
    row = await made(store, sampling=None, metadata={"audio": {"seed": 99}})

    assert values_of(row)["seed"] == "99"


async def test_a_file_that_is_there_is_replaced_only_by_force(store, place):
    row = await made(store)
    (place / "song.wav").write_bytes(b"precious")

    with pytest.raises(InvalidRequestError) as caught:
        await save_audio(row.id, "song.wav")
    assert str(caught.value) == (
        f"path_or_pattern is {place}/song.wav, which exists already; choose another name, or force "
        "it to be replaced."
    )
    assert (place / "song.wav").read_bytes() == b"precious"
    await save_audio(row.id, "song.wav", force=True)
    assert (place / "song.wav").read_bytes() == audio_file(0.5)
    assert names_in(place) == ["song.wav"]


async def test_a_file_that_appears_meanwhile_is_not_replaced_either(store, place, monkeypatch):
    row = await made(store)
    monkeypatch.setattr(audio_out, "_check_free", lambda target: target.write_bytes(b"precious"))

    with pytest.raises(InvalidRequestError, match="exists already"):
        await save_audio(row.id, "song.wav")
    assert (place / "song.wav").read_bytes() == b"precious"
    assert names_in(place) == ["song.wav"]


async def test_a_link_that_leads_nowhere_is_there_too(store, place):
    row = await made(store)
    (place / "song.wav").symlink_to(place / "elsewhere")

    with pytest.raises(InvalidRequestError, match="exists already"):
        await save_audio(row.id, "song.wav")
    assert not (place / "elsewhere").exists()


async def test_damaged_audio_is_not_saved(store, place):
    row = await made(store)
    Path(row.file_path).write_bytes(audio_file(0.5)[:-2])

    with pytest.raises(ArtifactError, match=r"is damaged: its hash is not that of its row\.$"):
        await save_audio(row.id, "song")
    assert names_in(place) == []


@pytest.mark.parametrize("pattern", ["taken/song", "x" * 300, "/dev/null/song"])
async def test_a_file_that_cannot_be_written_is_one_sentence(store, place, pattern):
    row = await made(store)
    (place / "taken").write_bytes(b"")

    with pytest.raises(ArtifactError, match=r"^[^\n]* cannot be written: [^\n]*\.$"):
        await save_audio(row.id, pattern)
    assert names_in(place) == ["taken"]


KILLED = """
import asyncio, json, sys
from dgx_music import init_db
from dgx_music.client import audio_out, content

async def main():
    url, generation_id = json.loads(sys.argv[1])
    await init_db(url)
    async def halves(row, audio_format=None):
        async for chunk in content.content_of(row, audio_format):
            yield chunk[: len(chunk) // 2]
            print("half", flush=True)
            await asyncio.sleep(600)
    audio_out.content_of = halves
    await audio_out.save_audio(generation_id, "song.wav")

asyncio.run(main())
"""


async def test_a_kill_leaves_no_half_file_under_the_final_name(store, place, database_url):
    row = await made(store)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps([database_url, row.id])],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    ) as process:
        assert process.stdout.readline() == b"half\n"
        process.kill()
        process.wait(PATIENCE)

    assert [name for name in names_in(place) if not name.endswith(".part")] == []
    assert (await save_audio(row.id, "song.wav")).read_bytes() == audio_file(0.5)


@pytest.mark.parametrize(("place_of_step", "step"), [(Saving, "_open"), (audio_out, "flush")])
async def test_a_cancelled_call_ends_its_step_and_leaves_nothing(
    store, place, monkeypatch, place_of_step, step
):
    row = await made(store)
    begun, may_go_on, ended = threading.Event(), threading.Event(), threading.Event()
    really, answers = getattr(place_of_step, step), []

    def slowly(*args, **kwargs):
        begun.set()
        may_go_on.wait(PATIENCE)
        try:
            answers.append(really(*args, **kwargs))
            return answers[0]
        finally:
            ended.set()

    monkeypatch.setattr(place_of_step, step, slowly)
    call = asyncio.create_task(save_audio(row.id, "new/song"))
    assert await to_thread.run_sync(begun.wait, PATIENCE)
    call.cancel()
    await asyncio.wait([call], timeout=0.05)
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert await to_thread.run_sync(ended.wait, PATIENCE)
    assert len(answers) == 1
    assert (names_in(place), open_files_in(place)) == ([], [])


async def test_a_file_is_flushed_whole_before_it_gets_its_name(store, place, monkeypatch):
    row = await made(store)
    flushed = []

    def note(descriptor):
        flushed.append((os.fstat(descriptor).st_size, (place / "song.wav").exists()))

    monkeypatch.setattr(audio_out, "flush", note)
    await save_audio(row.id, "song.wav")

    assert flushed == [(len(audio_file(0.5)), False)]


# Formats


def samples_of(data):
    return soundfile.read(io.BytesIO(data), dtype="int16", always_2d=True)


@pytest.mark.parametrize("wanted", FORMATS)
@pytest.mark.parametrize("stored", FORMATS)
async def test_each_format_becomes_each_other_one_with_the_rows_tags(store, place, stored, wanted):
    kind = {"kind": stored.upper()}
    data = audio_file(1.0, channels=2, **kind)
    row = await made(store, data, stored, title="Rain", metadata={"audio": {"seed": 7}})

    path = await save_audio(row.id, "song", audio_format=wanted)

    content = path.read_bytes()
    assert path == place / f"song.{wanted}"
    assert content == data if wanted == stored else soundfile.info(path).format == wanted.upper()
    before, after = samples_of(data), samples_of(content)
    assert (before[1], before[0].shape[1]) == (after[1], after[0].shape[1])
    if {stored, wanted} <= {"wav", "flac"}:
        np.testing.assert_array_equal(before[0], after[0])
    if wanted != stored:
        found = soundfile.SoundFile(path)
        assert (found.title, "Seed: 7" in found.comment) == ("Rain", True)


@pytest.mark.parametrize(("stored", "wanted"), [("wav", "flac"), ("flac", "wav")])
async def test_no_sample_changes_between_lossless_formats(store, place, stored, wanted):
    every = np.arange(-(2**15), 2**15, dtype=np.int16)
    file = io.BytesIO()
    soundfile.write(file, every, 32_000, format=stored.upper())
    row = await made(store, file.getvalue(), stored)

    path = await save_audio(row.id, "song", audio_format=wanted)

    np.testing.assert_array_equal(soundfile.read(path, dtype="int16")[0], every)


async def test_what_a_lossy_decoder_makes_too_loud_is_clipped_and_never_wraps(store, place):
    square = np.where(np.arange(32_000) // 40 % 2, 1.0, -1.0)
    file = io.BytesIO()
    soundfile.write(file, square, 32_000, format="OGG")
    row = await made(store, file.getvalue(), "ogg")

    path = await save_audio(row.id, "song", audio_format="wav")

    decoded = soundfile.read(io.BytesIO(file.getvalue()))[0]
    assert np.abs(decoded).max() > 1
    np.testing.assert_allclose(soundfile.read(path)[0], np.clip(decoded, -1, 1), atol=2**-15)


async def test_a_format_that_this_machine_cannot_write_can_still_be_copied(
    store, place, monkeypatch
):
    monkeypatch.setattr(soundfile, "available_formats", dict)
    row = await made(store, audio_file(0.5, kind="FLAC"), "flac")

    assert (await save_audio(row.id, "a", audio_format="flac")).name == "a.flac"
    with pytest.raises(InvalidRequestError) as caught:
        await save_audio(row.id, "a", audio_format="ogg")
    assert str(caught.value) == (
        "format 'ogg' cannot be written by this machine's libsndfile; update it, or use wav."
    )


async def test_the_suffix_of_the_name_is_a_wish_too(store, place):
    row = await made(store)

    assert soundfile.info(await save_audio(row.id, "song.FLAC")).format == "FLAC"
    assert (await save_audio(row.id, "song", audio_format="ogg")).name == "song.ogg"


@pytest.mark.parametrize(
    ("pattern", "audio_format", "message"),
    [
        ("a.flac", "mp3", "path_or_pattern ends with .flac, and the format is mp3; leave one of "),
        ("a", "aac", "audio_format is 'aac'; use wav, flac, mp3 or ogg."),
        ("a.mp3", None, "format 'mp3' cannot hold 96,000 Hz; use one of 8,000, 11,025, 12,000, "),
        ("{tempo}", None, "path_or_pattern has the placeholder {tempo}, which is not known; use "),
    ],
)
async def test_a_format_or_a_pattern_that_is_refused_writes_nothing(
    store, place, pattern, audio_format, message
):
    row = await made(store, sample_rate=96_000)

    with pytest.raises(InvalidRequestError) as caught:
        await save_audio(row.id, pattern, audio_format=audio_format)
    assert str(caught.value).startswith(message)
    assert names_in(place) == []


async def test_a_stored_file_that_is_no_audio_is_said_not_to_be(store, place):
    row = await made(store, b"RIFF and so on")

    with pytest.raises(ArtifactError, match=r"^The stored WAV file cannot be decoded\.$"):
        await save_audio(row.id, "song.flac")


async def test_two_files_of_one_call_have_names_of_their_own(store, place):
    rows = [await made(store, prompt="lofi rain") for _ in range(3)]
    saving = Saving("{title}")

    saved = [await saving.save(row) for row in rows]

    assert [each.path.name for each in saved] == [
        "lofi rain.wav",
        "lofi rain-2.wav",
        "lofi rain-3.wav",
    ]
    assert saved[0].size_bytes == len(audio_file(0.5))


async def test_a_stream_that_is_left_early_closes_its_file(store):
    row = await made(store, bytes(10_000_000))

    async with aclosing(stream_audio(row.id)) as chunks:
        first = await anext(chunks)

    assert 0 < len(first) < 10_000_000
    assert hashlib.sha256(await read(stream_audio(row.id))).hexdigest() == row.sha256
