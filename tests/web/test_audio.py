"""The audio: whole, in parts, by its version, and by which name."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import get_args
from urllib.parse import quote

import pytest
from tinytag import TinyTag

from dgx_music.artifacts import open_output
from dgx_music.config import AudioFormat
from dgx_music.storage import Generation, queue
from dgx_music.web.names import MEDIA_TYPES, disposition, file_name
from tests.factories import SQLITE, add_generation, audio_file, claim_one, completion_of, on

DATA = audio_file(0.1)
SIZE = len(DATA)
FACTS = {
    "duration_seconds": 0.1,
    "sample_rate": 32_000,
    "channels": 1,
    "format": "wav",
    "peak": 0.5,
    "loudness_lufs": None,
    "waveform": [0.1, 0.4, 0.2, 0.3],
}


@pytest.fixture(name="complete")
def complete_fixture(default_database, output):
    """Returns a generation's path, once its audio is stored as a worker does it."""

    async def make(data=DATA, extension="wav", **values):
        async with default_database.session() as session:
            await add_generation(session, **values)
            lease = await claim_one(session)
        place = open_output(output)
        stored = await place.publish(lease.generation_id, lease.attempt, extension, data)
        done = completion_of(
            lease,
            file_path=stored.path,
            file_size_bytes=stored.size_bytes,
            sha256=stored.sha256,
            audio=FACTS,
        )
        async with default_database.session() as session:
            await queue.complete(session, [done])
        return f"/v1/generations/{lease.generation_id}"

    return make


@pytest.mark.any_driver
async def test_the_whole_file_is_sent_with_its_type_name_and_version(client, complete):
    path = await complete(prompt="Trap beat, 140 BPM")

    answer = await client.get(f"{path}/audio")

    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["content-type"] == "audio/wav"
    assert answer.headers["content-length"] == str(SIZE)
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["etag"].strip('"').isalnum()
    name = f"Trap beat, 140 BPM_{path[-8:]}.wav"
    assert answer.headers["content-disposition"] == (
        f"inline; filename=\"{name}\"; filename*=UTF-8''{quote(name)}"
    )


@on(SQLITE)
@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-1", (0, 2)),
        ("bytes=10-19", (10, 20)),
        ("bytes=10-", (10, SIZE)),
        ("bytes=-5", (SIZE - 5, SIZE)),
        (f"bytes=-{SIZE * 2}", (0, SIZE)),
        (f"bytes=10-{SIZE * 9}", (10, SIZE)),
        (f"bytes={SIZE - 1}-", (SIZE - 1, SIZE)),
    ],
)
async def test_a_part_is_sent(client, complete, asked, part):
    start, end = part

    answer = await client.get(f"{await complete()}/audio", headers={"Range": asked})

    assert (answer.status_code, answer.content) == (206, DATA[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"


@on(SQLITE)
@pytest.mark.parametrize(
    "asked", ["bytes=", "bytes=-", "bytes=5-1", "bytes=0-1,5-6", "lines=0-1", "bytes=a-b", "0-1"]
)
async def test_a_range_that_is_none_gets_the_whole(client, complete, asked):
    answer = await client.get(f"{await complete()}/audio", headers={"Range": asked})

    assert (answer.status_code, len(answer.content)) == (200, SIZE)


@on(SQLITE)
@pytest.mark.parametrize(
    "asked", [f"bytes={SIZE}-", f"bytes={10**30}-", f"bytes={SIZE + 5}-{SIZE + 9}", "bytes=-0"]
)
async def test_a_range_beyond_the_end_is_a_problem(client, complete, asked):
    answer = await client.get(f"{await complete()}/audio", headers={"Range": asked})

    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")
    assert answer.json()["type"] == "urn:dgx-music:no-such-range"


@on(SQLITE)
async def test_a_client_that_has_the_version_gets_nothing_again(client, complete):
    path = f"{await complete()}/audio"
    etag = (await client.get(path)).headers["etag"]
    for known in (etag, f'"x", W/{etag}', "*"):
        answer = await client.get(path, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert (await client.get(path, headers={"If-None-Match": '"x"'})).status_code == 200


@on(SQLITE)
async def test_a_part_of_another_version_is_not_sent(client, complete):
    path = f"{await complete()}/audio"
    etag = (await client.get(path)).headers["etag"]
    asked = {"Range": "bytes=0-1"}

    answers = [
        await client.get(path, headers={**asked, "If-Range": version})
        for version in (etag, '"x"', "Wed, 21 Oct 2015 07:28:00 GMT", f"W/{etag}")
    ]

    assert [answer.status_code for answer in answers] == [206, 200, 200, 200]


@on(SQLITE)
async def test_head_says_what_get_sends(client, complete):
    path = f"{await complete()}/audio"
    for headers in ({}, {"Range": "bytes=0-9"}):
        get, head = (
            await client.get(path, headers=headers),
            await client.head(path, headers=headers),
        )
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert {**head.headers} == {**get.headers}


@on(SQLITE)
async def test_a_download_is_an_attachment(client, complete):
    answer = await client.get(f"{await complete()}/audio?download=1")

    assert answer.headers["content-disposition"].startswith("attachment; ")


@on(SQLITE)
@pytest.mark.parametrize("query", ["format=x", "format=", "download=2", "colour=red"])
async def test_a_wrong_parameter_is_a_problem(client, complete, query):
    assert (await client.get(f"{await complete()}/audio?{query}")).status_code == 422


@pytest.mark.any_driver
async def test_a_generation_that_is_not_completed_has_none(client, default_database):
    async with default_database.session() as session:
        generation_id = (await add_generation(session)).id
    for path in ("audio", "waveform"):
        answer = await client.get(f"/v1/generations/{generation_id}/{path}")
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:dgx-music:wrong-status")


@on(SQLITE)
async def test_audio_that_was_deleted_is_gone(client, complete, output):
    path = f"{await complete()}/audio"
    for file in output.iterdir():
        file.unlink()
    for answer in (await client.get(path), await client.get(path, headers={"Range": "bytes=0-1"})):
        assert (answer.status_code, answer.json()["type"]) == (410, "urn:dgx-music:gone")


@on(SQLITE)
async def test_no_other_file_is_sent(client, complete, output, tmp_path, default_database):
    """A row may name any file; a worker of another output wrote it, or somebody by hand."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(DATA)
    (output / "x").mkdir(parents=True)
    (output / "mine.wav").write_bytes(DATA)
    for place in (secret, output / "x" / ".." / ".." / "secret.wav", output / "mine.wav"):
        async with default_database.session() as session:
            row = await add_generation(
                session, status="completed", file_path=str(place), file_size_bytes=SIZE
            )
        assert (await client.get(f"/v1/generations/{row.id}/audio")).status_code == 410
        urls = (await client.get(f"/v1/generations/{row.id}")).json()["urls"]
        assert (urls["audio"], urls["waveform"]) == (None, None)
    (output / "link-1.wav").symlink_to(secret)
    async with default_database.session() as session:
        file = {"file_path": str(output / "link-1.wav"), "sha256": "ab" * 32}
        row = await add_generation(session, status="completed", file_size_bytes=SIZE, **file)
    assert (await client.get(f"/v1/generations/{row.id}/audio")).status_code == 503


@on(SQLITE)
@pytest.mark.parametrize("wanted", ["flac", "mp3", "ogg"])
async def test_audio_is_converted_with_the_name_and_tags_of_its_row(client, complete, wanted):
    path = await complete(prompt="Lofi rain", title="Rain")

    answer = await client.get(f"{path}/audio?format={wanted}&download=1")

    assert (answer.status_code, answer.headers["content-type"]) == (200, MEDIA_TYPES[wanted])
    assert f'filename="Rain_{path[-8:]}.{wanted}"' in answer.headers["content-disposition"]
    tags = TinyTag.get(file_obj=io.BytesIO(answer.content))
    assert (tags.title, tags.duration) == ("Rain", pytest.approx(0.1, abs=0.1))
    assert "Lofi rain" in tags.comment


@on(SQLITE)
async def test_a_converted_file_is_sent_in_parts_and_by_its_version(client, complete):
    """What players ask for, Safari's two bytes first; an Ogg differs each time that it is made."""
    path = f"{await complete()}/audio?format=ogg"
    whole = await client.get(path)
    data, etag = whole.content, whole.headers["etag"]
    size = len(data)
    for asked, status, content in (
        ({"Range": "bytes=0-1"}, 206, data[:2]),
        ({"Range": "bytes=2-"}, 206, data[2:]),
        ({"Range": "bytes=-7"}, 206, data[-7:]),
        ({"Range": "bytes=0-1", "If-Range": etag}, 206, data[:2]),
        ({"Range": "bytes=0-1", "If-Range": '"x"'}, 200, data),
        ({"If-None-Match": etag}, 304, b""),
    ):
        get, head = (
            await client.get(path, headers=asked),
            await client.head(path, headers=asked),
        )
        assert (asked, get.status_code, get.content) == (asked, status, content)
        assert {**head.headers} == {**get.headers}
    beyond = await client.get(path, headers={"Range": f"bytes={size}-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{size}")


@on(SQLITE)
async def test_the_stored_format_is_sent_as_it_is_stored(client, complete):
    assert (await client.get(f"{await complete()}/audio?format=wav")).content == DATA


@on(SQLITE)
async def test_a_new_title_is_in_the_tags_of_what_is_converted_later(client, complete):
    path = await complete(title="Rain")
    await client.get(f"{path}/audio?format=flac")
    await client.patch(path, json={"title": "Snow"})

    data = (await client.get(f"{path}/audio?format=flac")).content

    assert TinyTag.get(file_obj=io.BytesIO(data)).title == "Snow"


@on(SQLITE)
async def test_a_format_that_cannot_be_written_is_refused(client, complete, monkeypatch):
    monkeypatch.setattr("soundfile.available_formats", lambda: {"WAV": ""})

    answer = await client.get(f"{await complete()}/audio?format=mp3")

    assert (answer.status_code, answer.json()["field"]) == (422, "format")
    assert "'mp3' cannot be written by this machine" in answer.json()["detail"]


@on(SQLITE)
async def test_audio_that_is_gone_or_damaged_is_not_converted(client, complete, output):
    path = f"{await complete()}/audio?format=flac"
    (file,) = output.iterdir()
    file.write_bytes(DATA[:-2] + b"xx")
    assert (await client.get(path)).status_code == 503
    file.unlink()
    assert (await client.get(path)).status_code == 410


@on(SQLITE)
async def test_no_room_to_convert_is_said_so(client, complete, monkeypatch):
    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    path = await complete()
    monkeypatch.setattr("dgx_music.web.transcodes.Transcode", fail)

    answer = await client.get(f"{path}/audio?format=flac")

    assert (answer.status_code, answer.json()["type"]) == (503, "urn:dgx-music:storage-away")
    assert "retry-after" in answer.headers


@pytest.mark.any_driver
async def test_the_waveform_has_as_many_peaks_as_asked_for(client, complete):
    path = f"{await complete()}/waveform"

    assert (await client.get(path)).json() == {
        "duration_seconds": 0.1,
        "peaks": [0.1, 0.4, 0.2, 0.3],
    }
    assert (await client.get(f"{path}?points=2")).json()["peaks"] == [0.4, 0.3]
    assert (await client.get(f"{path}?points=0")).status_code == 422


@on(SQLITE)
async def test_audio_of_a_former_output_is_still_sent(client, complete, output, monkeypatch):
    path = await complete()
    monkeypatch.setenv("DGX_MUSIC_OUTPUT", str(output.parent / "new"))

    assert (await client.get(f"{path}/audio")).content == DATA


@pytest.mark.parametrize(
    "prompt",
    [
        "../../etc/passwd",
        'a"; filename="b',
        "a\r\nSet-Cookie: c",
        "\u202egnp.exe",
        "%22",
        "\\",
        "a" * 500,
    ],
)
def test_no_name_leaves_a_folder_or_ends_a_header(prompt):
    row = Generation(
        prompt=prompt, model_name="x", file_path="/x/y-1.flac", created_at=datetime.now(UTC)
    )

    header = disposition(file_name(row), is_attachment=True)

    start, name, end = header.split('"')
    assert (start, end[:18]) == ("attachment; filename=", "; filename*=UTF-8'")
    assert name.isprintable()
    assert not {*name} & {*"/\\%"}
    assert name.endswith(".flac")
    assert len(name) < 256


def test_a_name_is_sent_in_ascii_and_as_it_is():
    header = disposition("тихий-café_1.wav", is_attachment=True)

    assert header == (
        'attachment; filename="cafe_1.wav"; '
        "filename*=UTF-8''%D1%82%D0%B8%D1%85%D0%B8%D0%B9-caf%C3%A9_1.wav"
    )


def test_each_format_has_its_type():
    assert {*get_args(AudioFormat)} <= MEDIA_TYPES.keys()
