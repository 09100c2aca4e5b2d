"""Audio in an object store, over HTTP: whole, in parts, and when somebody deletes or replaces it."""

from __future__ import annotations

import anyio
import obstore
import pytest
from obstore.store import from_url

from dgx_music.web import WebOptions, create_app
from tests.factories import SQLITE, on
from tests.object_store import s3_fixture, s3_port_fixture  # noqa: F401 - fixtures
from tests.web.test_audio import DATA, SIZE, complete_fixture  # noqa: F401 - a fixture

pytestmark = on(SQLITE)


@pytest.fixture
def output(s3, monkeypatch):
    """The place of the audio, in chunks of a thousand bytes."""
    monkeypatch.setenv("DGX_MUSIC_OUTPUT", s3)
    monkeypatch.setattr("dgx_music.artifacts.objects.CHUNK_BYTES", 1_000)
    return s3


@pytest.fixture
def change(output):
    """Deletes all objects, or puts this in their place."""

    def work(data=None):
        store = from_url(output)
        for page in obstore.list(store):
            for each in page:
                if data is None:
                    obstore.delete(store, each["path"])
                else:
                    obstore.put(store, each["path"], data)

    return work


@pytest.mark.parametrize(
    ("asked", "status", "part"),
    [
        (None, 200, slice(None)),
        ("bytes=0-1", 206, slice(0, 2)),
        ("bytes=1500-", 206, slice(1_500, None)),
        ("bytes=-7", 206, slice(SIZE - 7, None)),
    ],
)
async def test_a_part_is_sent(client, complete, asked, status, part):
    path = f"{await complete()}/audio"
    headers = {} if asked is None else {"Range": asked}
    answer, head = await client.get(path, headers=headers), await client.head(path, headers=headers)

    assert (answer.status_code, answer.content) == (status, DATA[part])
    assert (head.status_code, head.content) == (status, b"")
    for name in ("content-length", "etag", "content-range"):
        assert head.headers.get(name) == answer.headers.get(name)


@pytest.mark.parametrize("query", ["", "?format=mp3"])
async def test_what_was_deleted_is_gone(client, complete, change, query):
    path = f"{await complete()}/audio{query}"
    change()

    for answer in (await client.get(path), await client.get(path, headers={"Range": "bytes=0-1"})):
        assert (answer.status_code, answer.json()["type"]) == (410, "urn:dgx-music:gone")
    assert (await client.head(path)).status_code == 410


async def test_what_was_converted_is_kept_for_parts(client, complete, change):
    path = f"{await complete()}/audio?format=flac"
    whole = (await client.get(path)).content
    change()

    assert (await client.get(path, headers={"Range": "bytes=0-1"})).content == whole[:2]


async def test_a_part_that_a_shorter_file_does_not_have_is_gone(client, complete, change):
    path = f"{await complete()}/audio"
    change(DATA[:500])

    assert (await client.get(path, headers={"Range": "bytes=500-"})).status_code == 410


@pytest.mark.parametrize("left", [None, DATA[:1_500]])
async def test_an_answer_that_cannot_be_finished_is_broken_off(complete, change, left, caplog):
    path, sent = f"{await complete()}/audio", []
    app = create_app(options=WebOptions(is_open=True))
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "headers": [(b"host", b"localhost")]}

    async def send(message):
        sent.append(message)
        if len(sent) == 2:
            change(left)

    await app(scope, anyio.sleep_forever, send)

    body = b"".join(message["body"] for message in sent[1:])
    assert DATA.startswith(body)
    assert len(body) == (1_000 if left is None else 1_500)
    assert all(message["more_body"] for message in sent[1:])
    assert "broken off in the middle" in caplog.text
