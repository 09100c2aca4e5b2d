"""``GET generations/{id}/preview``: what is heard while it is made."""

from __future__ import annotations

import io

import anyio
import pytest
import soundfile

from dgx_music import enqueue
from dgx_music.artifacts import LocalArtifacts, open_output
from dgx_music.storage import queue
from dgx_music.web import WebOptions, create_app, preview
from dgx_music.web.site import Site
from tests.factories import MODEL, completion_of
from tests.patience import PATIENCE
from tests.web.streams import Stream
from tests.web.working import DATA, claim_soon, complete_next, fail_next

pytestmark = pytest.mark.any_driver

HEADER_BYTES = 44
PART = b"\1\0" * 1_600  # the first half


@pytest.fixture
def site():
    return Site(None, WebOptions(is_open=True))


@pytest.fixture
def app(site, default_database, output):
    return create_app(options=site.options, site=site)


@pytest.fixture
async def lease(default_database, output):
    """The lease of a generation of 0.1 s, of which the first half can be heard."""
    await enqueue("rain", duration=0.1, model=MODEL, channels=1)
    lease = await claim_soon(default_database)
    await publish(output, lease)
    return lease


async def publish(output, lease):
    await open_output(output).publish_preview(lease.generation_id, lease.attempt, 0, PART)


def path_of(lease):
    return f"/v1/generations/{lease.generation_id}/preview"


async def complete(database, output, lease):
    place = open_output(output)
    stored = await place.publish(lease.generation_id, lease.attempt, "wav", DATA)
    told = {"file_size_bytes": stored.size_bytes, "sha256": stored.sha256}
    async with database.session() as session:
        await queue.complete(session, [completion_of(lease, file_path=stored.path, **told)])


async def test_a_running_generation_is_heard_to_its_end(app, lease, default_database, output):
    async with Stream(app, path_of(lease)) as stream:
        assert (stream.status, stream.headers["content-type"]) == (200, "audio/wav")
        heard = [await stream.part(), await stream.part()]
        await complete(default_database, output, lease)
        heard += [await stream.part(), await stream.part()]
    assert (heard[1], heard[3]) == (PART, b"")
    assert soundfile.read(io.BytesIO(b"".join(heard)))[0].shape == (3_200,)


async def test_an_answer_ends_before_the_next_attempt(app, lease, default_database, output):
    async with Stream(app, path_of(lease)) as stream:
        heard = [await stream.part(), await stream.part()]
        async with default_database.session() as session:
            await queue.release(session, [lease])
        await publish(output, await claim_soon(default_database))
        assert await stream.part() == b""
    assert len(b"".join(heard)) == HEADER_BYTES + len(PART)


@pytest.mark.parametrize("retry_in_seconds", [None, 600.0])
async def test_an_answer_ends_if_its_attempt_fails(app, lease, default_database, retry_in_seconds):
    async with Stream(app, path_of(lease)) as stream:
        await stream.part(), await stream.part()
        async with default_database.session() as session:
            await queue.fail(session, lease, "no luck", retry_in_seconds=retry_in_seconds)
        assert await stream.part() == b""


async def test_a_slow_client_gets_the_end(app, lease, default_database, output, monkeypatch):
    monkeypatch.setattr(preview, "_END_SECONDS", 0.0)
    async with Stream(app, path_of(lease), room=1) as stream:
        await stream.part(), await stream.part()
        await complete(default_database, output, lease)
        with anyio.fail_after(PATIENCE):
            while not stream.is_full:
                await anyio.sleep(0.01)
        assert [len(await stream.part()), await stream.part()] == [1_600 * 2, b""]


async def test_no_other_file_is_sent(app, lease, default_database, output, tmp_path):
    foreign = LocalArtifacts(tmp_path / "elsewhere")
    stored = await foreign.publish("other", 1, "wav", DATA)
    told = {"file_size_bytes": stored.size_bytes, "sha256": stored.sha256}
    async with Stream(app, path_of(lease)) as stream:
        await stream.part(), await stream.part()
        async with default_database.session() as session:
            await queue.complete(session, [completion_of(lease, file_path=stored.path, **told)])
        assert await stream.part() == b""


async def test_a_generation_that_waits_or_failed_has_no_preview(client, default_database):
    generation = await enqueue("rain", duration=0.1, model=MODEL)
    path = f"/v1/generations/{generation.id}/preview"
    waiting = await client.get(path)
    await fail_next(default_database, "no luck")
    failed = await client.get(path)
    assert [answer.status_code for answer in (waiting, failed)] == [409, 409]
    assert "is pending and has no audio yet" in waiting.json()["detail"]


async def test_a_finished_generation_is_sent_as_a_whole(client, default_database, output):
    await enqueue("rain", duration=0.1, model=MODEL, channels=1)
    lease = await complete_next(default_database, output)
    answer = await client.get(path_of(lease))
    heard, _ = soundfile.read(io.BytesIO(answer.content), dtype="int16")
    assert (heard == soundfile.read(io.BytesIO(DATA), dtype="int16")[0]).all()


async def test_only_so_many_listen_at_a_time(app, site, lease, client):
    site.listeners.total_tokens = 1
    async with Stream(app, path_of(lease)), Stream(app, path_of(lease)) as second:
        assert (second.status, (await second.body())["type"]) == (
            503,
            "urn:dgx-music:too-many-streams",
        )
    assert site.listeners.borrowed_tokens == 0


async def test_a_row_that_runs_links_to_its_preview(client, lease, default_database, output):
    row = (await client.get(f"/v1/generations/{lease.generation_id}")).json()
    assert row["urls"]["preview"] == path_of(lease)
    await complete(default_database, output, lease)
    row = (await client.get(f"/v1/generations/{lease.generation_id}")).json()
    assert row["urls"]["preview"] is None


async def test_a_server_that_stops_ends_the_stream(app, site, lease):
    async with Stream(app, path_of(lease)) as stream:
        await stream.part(), await stream.part()
        site.stops.stop()
        assert await stream.part() == b""
