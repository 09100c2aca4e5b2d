"""``POST uploads``, and the requests that name what was uploaded."""

from __future__ import annotations

import asyncio
import gc
import io
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sqlalchemy import select, update

from dgx_music import enqueue
from dgx_music.audio import clips
from dgx_music.audio.containers.interface import READABLE
from dgx_music.catalog import MODELS, SAMPLE_RATE
from dgx_music.client.prune import prune_clips, prune_uploads
from dgx_music.storage import count_generations
from dgx_music.storage.models import Clip, Upload
from dgx_music.storage.schema import now_plus
from dgx_music.web import WebOptions, create_app
from tests.factories import SQLITE, audio_file, on, read, read_all
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver

WAV = {"Content-Type": "audio/wav"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
FIELDS = ["continuation", "melody"]
DAY = 86_400.0
FILES = Path("/proc/self/fd")
UNKNOWN = "up_" + "x" * 32
MELODY = "musicgen-melody"
UNREADABLE = f"file is not audio that can be read; {READABLE}."


async def send(client, data, **headers):
    return await client.post("/v1/uploads", content=data, headers=WAV | headers)


async def upload(client, data=None):
    answer = await send(client, audio_file(2.0) if data is None else data)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


async def age_all(database, seconds):
    async with database.session() as session:
        await session.execute(update(Upload).values(expires_at=now_plus(DAY - seconds)))
        await session.execute(update(Clip).values(last_used_at=now_plus(-seconds)))


async def clips_of(database):
    return {clip.sha256 for clip in await read_all(database, select(Clip))}


def silence(seconds):
    """Return a small FLAC of much silence."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 48_000, 2, "PCM_16", format="FLAC") as target:
        for _ in range(seconds // 10):
            target.write(np.zeros((480_000, 2), np.int16))
    return file.getvalue()


async def test_an_upload_has_an_id_a_length_and_an_end(client, default_database):
    answer = await send(client, audio_file(2.0))

    told, (row,) = answer.json(), await read_all(default_database, select(Upload))
    assert answer.status_code == 201
    assert told == {
        "id": row.id,
        "duration_seconds": 2.0,
        "expires_at": row.expires_at.isoformat(),
    }
    assert (row.expires_at - row.created_at).total_seconds() == pytest.approx(DAY, abs=1)
    assert row.id.startswith("up_")
    assert len(row.id) == 35


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "MP3", "OGG"])
@pytest.mark.parametrize(
    ("field", "model"),
    [
        ("continuation", "musicgen-small"),
        ("continuation", "musicgen-stereo-small"),
        ("continuation", "/models/own"),
        ("melody", MELODY),
    ],
)
async def test_a_request_with_an_upload_is_what_the_library_makes_of_the_file(
    client, default_database, kind, field, model
):
    data = audio_file(2.0, 44_100, 2, kind=kind)
    fields = {"prompt": "a", "model": model, "duration": 8, "idempotency_key": "k"}
    ours = await enqueue(**fields, **{field: data})

    body = fields | {field: await upload(client, data)}
    answer = await client.post("/v1/generations", json=body)

    row = await read(default_database, answer.json()["id"])
    assert (answer.status_code, row.id) == (200, ours.id)  # the same request under the same key
    column = f"{field}_sha256"
    body["idempotency_key"] = "other"
    other = await client.post("/v1/generations", json=body)
    made = await read(default_database, other.json()["id"])
    assert getattr(made, column) == getattr(ours, column) is not None


@on(SQLITE)
@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("channels", [1, 2, 3])
async def test_the_channels_are_the_models(client, default_database, field, channels):
    data = audio_file(1.0, 48_000, channels)
    for model in ("musicgen-melody", "musicgen-stereo-melody", "/models/own"):
        ours = await enqueue("a", model=model, **{field: data})
        body = {"prompt": "a", "model": model, field: await upload(client, data)}
        row = (await client.post("/v1/generations", json=body)).json()
        made = await read(default_database, row["id"])

        assert (made.continuation_sha256, made.melody_sha256) == (
            ours.continuation_sha256,
            ours.melody_sha256,
        )


def test_an_upload_has_the_forms_of_all_models():
    assert {(model.sample_rate, model.channels) for model in MODELS.values()} == {
        (SAMPLE_RATE, 1),
        (SAMPLE_RATE, 2),
    }


async def test_two_uploads_of_the_same_audio_share_their_clips(client, default_database):
    first, second = await upload(client), await upload(client, audio_file(2.0, kind="FLAC"))

    uploads = await read_all(default_database, select(Upload))
    assert {each.id for each in uploads} == {first, second}
    assert len({(each.mono_sha256, each.stereo_sha256) for each in uploads}) == 1
    assert len(await clips_of(default_database)) == 2


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..\\x", "a\x01b", "x.wav"])
async def test_a_form_has_the_audio_as_its_file_whatever_its_name(client, output, name):
    answer = await client.post("/v1/uploads", files={"file": (name, audio_file(2.0))})

    assert answer.status_code == 201
    assert answer.json()["duration_seconds"] == 2.0
    assert not output.exists()


@on(SQLITE)
@pytest.mark.parametrize(
    ("form", "status"),
    [
        ({"data": {"file": "no file"}, "files": {"other": b"x"}}, 422),
        ({"files": {"other": ("x.wav", b"x")}}, 422),
        ({"files": [("file", ("a", b"x")), ("file", ("b", b"x"))]}, 400),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": FORM}, 400),
        ({"content": b"--b\r\nX: " + b"x" * 1_000_000, "headers": FORM}, 400),
        ({"content": b"--b\r\n" + b"x: y\r\n" * 1_000, "headers": FORM}, 400),
        ({"content": b"x", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"json": {"url": "http://127.0.0.1/x.wav"}}, 415),
        ({"content": b"x"}, 415),
    ],
)
async def test_a_body_that_is_no_upload_is_a_problem(client, form, status):
    answer = await client.post("/v1/uploads", **form)

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"].endswith(".")


@on(SQLITE)
@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", UNREADABLE),
        (
            b"<svg onload=alert(1)>",
            UNREADABLE,
        ),
        (b"file:///etc/passwd\n", UNREADABLE),
        (b"\xff\xfb" * 500, UNREADABLE),
        (audio_file(2.0)[:44], "file ends in the middle; use a file that is whole."),
        (audio_file(2.0, kind="FLAC")[:-500], None),
    ],
)
async def test_what_is_no_audio_is_refused(client, default_database, data, sentence):
    answer = await send(client, data)

    problem = answer.json()
    assert (answer.status_code, problem["field"]) == (415, "file")
    assert problem["type"] == "urn:dgx-music:not-audio"
    assert problem["detail"] == (sentence or problem["detail"])
    assert await read_all(default_database, select(Upload)) == []


@on(SQLITE)
async def test_too_short_audio_is_refused(client):
    problem = (await send(client, audio_file(0.05))).json()

    assert problem["status"] == 422
    assert problem["detail"] == "file is 0.05 s long; use a clip of 0.08 to 30 seconds."


@on(SQLITE)
async def test_a_small_file_of_hours_of_silence_takes_little_memory(client):
    data = silence(7_200)
    assert len(data) < 2_000_000

    tracemalloc.start()
    answer = await send(client, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert answer.status_code == 422
    assert answer.json()["detail"] == "file is longer than 600 s; use a part of it."
    assert peak < 150_000_000  # 300 s of it are 115 MB


@pytest.mark.parametrize("kind", ["WAV", "MP3"])
async def test_long_audio_is_a_melody_and_no_continuation(client, default_database, kind):
    data = audio_file(40.0, kind=kind, channels=2)
    answer = await send(client, data)
    given = answer.json()
    body = {"prompt": "a", "model": MELODY, "duration": 60}

    melody = await client.post("/v1/generations", json={**body, "melody": given["id"]})
    refused = await client.post("/v1/generations", json={**body, "continuation": given["id"]})

    ours = await enqueue("a", model=MELODY, melody=data)
    assert given["duration_seconds"] == pytest.approx(40.0, abs=0.1)
    made = await read(default_database, melody.json()["id"])
    assert made.melody_sha256 == ours.melody_sha256
    lengths = {
        each.sha256: each.duration_seconds
        for each in await read_all(default_database, select(Clip))
    }
    assert lengths[made.melody_sha256] == given["duration_seconds"]
    assert min(lengths.values()) == 30  # of its two channels
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("continuation is 40")


@pytest.mark.parametrize(
    ("fields", "field", "sentence"),
    [
        (
            {"continuation": True, "duration": 2},
            "continuation",
            "continuation is 2 s long, and the duration of 2 s counts from its start; use a longer "
            "duration, or a shorter clip.",
        ),
        (
            {"melody": True},
            "melody",
            "melody is given for musicgen-small, which hears none; use musicgen-melody.",
        ),
    ],
)
@on(SQLITE)
async def test_an_upload_is_checked_as_the_library_checks_clips(client, fields, field, sentence):
    body = {"prompt": "a", "model": "musicgen-small", **fields, field: await upload(client)}

    problem = (await client.post("/v1/generations", json=body)).json()

    assert (problem["status"], problem["field"], problem["detail"]) == (422, field, sentence)


@on(SQLITE)
@pytest.mark.parametrize(
    "value", ["/etc/passwd", "http://127.0.0.1/x.wav", "data:audio/wav;base64,", "up_../x", 7, {}]
)
async def test_no_text_but_an_id_leads_to_audio(client, value):
    problem = (await client.post("/v1/generations", json={"prompt": "a", "melody": value})).json()

    assert (problem["status"], problem["field"]) == (422, "melody")
    assert problem["detail"] == (
        "melody is not the id of an upload; send the audio to `POST uploads`, and give the id that "
        "it answers."
    )


async def test_the_hash_of_a_clip_is_no_id(client, default_database):
    await upload(client)
    (sha256, *_) = await clips_of(default_database)
    body = {"prompt": "a", "continuation": sha256}

    assert (await client.post("/v1/generations", json=body)).status_code == 422


async def test_an_upload_of_another_tenant_is_not_found(holding, default_database):
    owner, other, everybody = (
        await holding("enqueue", "a"),
        await holding("enqueue", "b"),
        await holding("enqueue"),
    )
    own = await upload(owner)
    body = {"prompt": "a", "continuation": own}

    answers = [await each.post("/v1/generations", json=body) for each in (owner, other, everybody)]
    unknown = await other.post("/v1/generations", json={"prompt": "a", "continuation": UNKNOWN})
    theirs = await upload(everybody)
    foreign = await owner.post("/v1/generations", json={"prompt": "a", "melody": theirs})

    assert [answer.status_code for answer in answers] == [202, 404, 202]
    assert answers[1].json() == unknown.json()
    assert answers[1].json()["detail"] == (
        "continuation is no upload that is here, or it has expired; send the audio again."
    )
    assert foreign.status_code == 404


async def test_an_upload_can_be_used_for_a_day(client, default_database):
    body = {"prompt": "a", "continuation": await upload(client)}

    await age_all(default_database, DAY - 60)
    assert (await client.post("/v1/generations", json=body)).status_code == 202
    await age_all(default_database, DAY)
    assert (await client.post("/v1/generations", json=body)).status_code == 404


async def test_what_has_expired_is_deleted_but_for_clips_that_are_used(client, default_database):
    used, _ = await upload(client), await upload(client, audio_file(3.0))
    row = (await client.post("/v1/generations", json={"prompt": "a", "continuation": used})).json()
    await age_all(default_database, DAY + 1)

    assert await prune_uploads(default_database, dry_run=True) == 2
    assert await prune_uploads(default_database) == 2

    made = await read(default_database, row["id"])
    assert await clips_of(default_database) == {made.continuation_sha256}


async def test_each_upload_deletes_some_that_have_expired(client, default_database):
    await upload(client)
    await age_all(default_database, DAY + 1)
    latest = await upload(client, audio_file(3.0))

    assert [each.id for each in await read_all(default_database, select(Upload))] == [latest]
    assert len(await clips_of(default_database)) == 2


async def test_the_clips_of_an_upload_stay_while_it_can_be_used(client, default_database):
    body = {"prompt": "a", "continuation": await upload(client)}
    async with default_database.session() as session:
        await session.execute(update(Clip).values(last_used_at=now_plus(-2 * DAY)))

    assert await prune_clips(default_database) == 0
    assert (await client.post("/v1/generations", json=body)).status_code == 202


async def test_a_batch_names_uploads_for_all_and_for_each(client, default_database):
    shared, own = await upload(client), await upload(client, audio_file(3.0))
    requests = ["a", {"prompt": "b", "continuation": own}, {"prompt": "c", "continuation": None}]
    body = {"requests": requests, "continuation": shared}

    rows = (await client.post("/v1/generations/batch", json=body)).json()["generations"]
    requests[1]["continuation"] = UNKNOWN
    unknown = await client.post("/v1/generations/batch", json=body)

    made = [await read(default_database, row["id"]) for row in rows]
    assert len({row.continuation_sha256 for row in made}) == 3
    assert made[2].continuation_sha256 is None
    assert (unknown.status_code, unknown.json()["field"]) == (404, "request 2: continuation")
    assert await default_database.transact(count_generations, read_only=True) == 3


async def test_a_request_is_made_again_with_another_upload(client, default_database):
    first, second = await upload(client), await upload(client, audio_file(3.0))
    body = {"prompt": "a", "continuation": first}
    row = (await client.post("/v1/generations", json=body)).json()

    again = f"{row['urls']['self']}/again"
    kept = (await client.post(again)).json()
    changed = (await client.post(again, json={"continuation": second})).json()
    without = (await client.post(again, json={"continuation": None})).json()
    unknown = await client.post(again, json={"continuation": UNKNOWN})

    hashes = [
        (await read(default_database, each["id"])).continuation_sha256
        for each in (row, kept, changed, without)
    ]
    assert hashes[0] == hashes[1] != hashes[2] != hashes[3] is None
    assert unknown.status_code == 404


async def test_four_uploads_are_decoded_at_a_time(client, default_database, monkeypatch):
    together, lock, running, most = threading.Barrier(4), threading.Lock(), [0], [0]
    read_forms = clips.read_forms

    def read_together(name, content):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        together.wait(PATIENCE)
        with lock:
            running[0] -= 1
        return read_forms(name, content)

    monkeypatch.setattr(clips, "read_forms", read_together)
    await asyncio.gather(*(upload(client) for _ in range(8)))

    assert most == [4]
    assert len(await read_all(default_database, select(Upload))) == 8
    assert len(await clips_of(default_database)) == 2


async def chunks(data, count):
    for _ in range(count):
        yield data


@on(SQLITE)
@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("kind", ["audio/wav", "multipart/form-data; boundary=b"])
async def test_a_body_that_is_too_long_is_refused_as_it_arrives(connect, is_chunked, kind):
    client = connect(upload_bytes=50_000)
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    content = chunks(head + b"x" * 10_000, 6) if is_chunked else b"x" * 60_000

    answer = await client.post("/v1/uploads", content=content, headers={"Content-Type": kind})

    assert (answer.status_code, answer.json()["type"]) == (413, "urn:dgx-music:too-large")
    assert answer.headers["connection"] == "close"


@on(SQLITE)
async def test_only_uploads_may_be_longer_than_json(client):
    data = audio_file(30.0, 44_100, 2)
    assert len(data) > 5_000_000

    assert (await send(client, data)).status_code == 201
    body = {"prompt": "a", "notes": "x" * 2**20}
    assert (await client.post("/v1/generations", json=body)).status_code == 413


@on(SQLITE)
async def test_to_read_is_not_to_upload(holding):
    assert (await send(await holding("read"), audio_file())).status_code == 403


@on(SQLITE)
async def test_the_page_of_another_site_uploads_nothing(client, default_database):
    answer = await send(client, audio_file(), Origin="https://evil.example")

    assert answer.status_code == 403
    assert await read_all(default_database, select(Upload)) == []


def open_files(folder: Path) -> list[str]:
    links = []
    for each in FILES.iterdir():
        try:
            links.append(str(each.readlink()))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(folder))]


@on(SQLITE)
@pytest.mark.skipif(not FILES.is_dir(), reason="needs /proc")
@pytest.mark.parametrize("kind", ["audio/wav", "multipart/form-data; boundary=b"])
async def test_a_client_that_goes_away_leaves_no_file(
    default_database, output, tmp_path, monkeypatch, kind
):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    seen, sent, parts = [], [], [head + b"x" * 3_000_000, b"x" * 3_000_000]

    async def receive():
        seen.append(open_files(folder))
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": True}
        return {"type": "http.disconnect"}

    async def send_part(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", kind.encode())]
    path = "/v1/uploads"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
    }
    await create_app(options=WebOptions(is_open=True))(scope, receive, send_part)
    gc.collect()

    assert any(seen)  # it was there
    assert open_files(folder) == []
    assert [*folder.iterdir()] == []
    assert sent[0]["status"] == 400
    assert await read_all(default_database, select(Upload)) == []
