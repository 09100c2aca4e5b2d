import base64
import hashlib
import re
import socket
import threading
import urllib.request
from functools import partial
from pathlib import Path

import anyio
import obstore
import pytest
from obstore.store import from_url

from dgx_music.artifacts import LocalArtifacts, objects, open_output, open_place_of
from dgx_music.artifacts.interface import LONGEST_LINK_SECONDS, Artifact
from dgx_music.cli.audio_copy import copy_audio
from dgx_music.cli.examination import examine
from dgx_music.config import load_settings
from dgx_music.errors import ArtifactError, ConfigurationError, InvalidRequestError
from dgx_music.worker.worker import Worker
from tests.factories import MODEL, add_generation, completed, read
from tests.fakes import FakeEngine
from tests.object_store import (  # noqa: F401 - fixtures
    CUT,
    HANG,
    LOSE_REPLY,
    LOSE_REQUEST,
    proxy_fixture,
    s3_fixture,
    s3_port_fixture,
    skip_waits,
    use_port,
)
from tests.patience import PATIENCE

DATA = b"RIFF" + bytes(100_000)
ALWAYS = 1_000


@pytest.fixture
def store(s3):
    return open_output(s3)


@pytest.fixture
def flaky(proxy, s3):
    """The same store by way of the proxy."""
    return open_output(s3)


def keys(s3):
    return {entry["path"] for page in obstore.list(from_url(s3)) for entry in page}


async def content(place, path):
    return b"".join([chunk async for chunk in place.stream(path)])


# Publication


async def test_the_row_gets_the_url(store, s3):
    assert (await store.publish("song", 2, "wav", DATA)).path == f"{s3}/song-2.wav"


async def test_a_put_is_conditional_and_carries_its_checksum(flaky, proxy):
    await flaky.publish("song", 1, "wav", DATA)

    (put,) = [seen.headers for seen in proxy.seen if seen.method == "PUT"]
    assert put["if-none-match"] == "*"
    assert put["x-amz-checksum-sha256"] == base64.b64encode(hashlib.sha256(DATA).digest()).decode()


FAULTS = [
    [500],
    [503, 502],
    [409],
    [HANG],
    [LOSE_REPLY],
    [LOSE_REQUEST],
    [LOSE_REPLY, HANG],
    [503, LOSE_REPLY, 500],
]


@pytest.mark.parametrize("faults", FAULTS, ids=str)
async def test_a_publication_outlives_trouble_that_passes(flaky, proxy, faults):
    proxy.fail("PUT", *faults)

    artifact = await flaky.publish("song", 1, "wav", DATA)

    assert proxy.count("PUT") == len(faults) + 1
    assert await content(flaky, artifact.path) == DATA


async def test_other_audio_is_found_out_after_a_lost_reply_too(flaky, proxy):
    artifact = await flaky.publish("song", 1, "wav", DATA)
    proxy.fail("PUT", LOSE_REQUEST)

    with pytest.raises(ArtifactError, match=r"song-1\.wav already holds other audio"):
        await flaky.publish("song", 1, "wav", b"other")
    assert await content(flaky, artifact.path) == DATA


async def test_the_look_at_a_taken_name_outlives_trouble_too(flaky, proxy):
    proxy.fail("PUT", LOSE_REPLY)
    proxy.fail("GET", 503, CUT)

    assert (await flaky.publish("song", 1, "wav", DATA)).size_bytes == len(DATA)


@pytest.mark.parametrize(
    ("fault", "puts", "why"),
    [
        (503, 9, "503 Service Unavailable"),
        (HANG, 3, "operation timed out|error sending request"),
        (403, 1, "access is denied; check the credentials in the environment"),
        (404, 1, "there is no such bucket"),
    ],
)
async def test_trouble_that_stays_is_one_sentence_after_a_bounded_number_of_puts(
    flaky, proxy, s3, fault, puts, why
):
    proxy.fail("PUT", *[fault] * ALWAYS)

    with pytest.raises(
        ArtifactError, match=f"^Audio cannot be stored in {s3}: [^\n]*({why})[^\n]*\\.$"
    ):
        await flaky.publish("song", 1, "wav", DATA)
    assert proxy.count("PUT") == puts


@pytest.fixture
def refused(s3, monkeypatch):
    """A place in a store that refuses every connection, and the waits that were made for it."""
    monkeypatch.setattr("dgx_music.artifacts.objects.RETRY", {"max_retries": 0})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # bound and not listening
        use_port(silent.getsockname()[1], monkeypatch)
        yield open_output(s3), skip_waits(monkeypatch)


@pytest.mark.parametrize("work", ["publish", "delete"])
async def test_a_store_that_refuses_connections_is_waited_for_about_a_minute(refused, work):
    store, waits = refused
    arguments = {"publish": ("song", 1, "wav", DATA), "delete": ("song", [1])}

    with pytest.raises(ArtifactError):
        await getattr(store, work)(*arguments[work])

    assert 50 <= sum(waits) <= 70  # each file that is deleted waits, on one clock


async def test_a_look_at_a_store_that_refuses_connections_takes_seconds(refused):
    store, waits = refused

    assert "Audio cannot be stored in" in await store.find_problem()
    assert sum(waits) <= 2


@pytest.mark.parametrize("work", ["publish", "delete"])
async def test_what_waits_for_a_store_ends_at_once_when_it_is_cancelled(s3, monkeypatch, work):
    monkeypatch.setattr("dgx_music.artifacts.objects.RETRY", {"max_retries": 0})
    arguments = {"publish": ("song", 1, "wav", DATA), "delete": ("song", [1])}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        use_port(silent.getsockname()[1], monkeypatch)
        store = open_output(s3)
        with anyio.fail_after(PATIENCE), anyio.move_on_after(0.3) as scope:
            await getattr(store, work)(*arguments[work])

    assert scope.cancelled_caught


async def test_a_cancelled_publication_ends_at_once(proxy, s3, monkeypatch):
    monkeypatch.setenv("AWS_TIMEOUT", "20 s")
    proxy.fail("PUT", *[HANG] * ALWAYS)

    with anyio.fail_after(PATIENCE):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(open_output(s3).publish, "song", 1, "wav", DATA)
            await anyio.to_thread.run_sync(proxy.arrived.wait)
            tasks.cancel_scope.cancel()

    assert proxy.count("PUT") == 1


async def test_what_arrives_after_its_publication_was_cancelled_is_deleted(store, s3, monkeypatch):
    """A deleted generation's worker may be in the middle of an upload: nothing may be left of it."""
    began, released, ended = threading.Event(), threading.Event(), threading.Event()
    run, put = objects._Write.run, obstore.put

    def put_late(*arguments, **options):
        began.set()
        released.wait(PATIENCE)
        put(*arguments, **options)

    def run_to_the_end(write):
        run(write)
        ended.set()

    monkeypatch.setattr(obstore, "put", put_late)
    monkeypatch.setattr(objects._Write, "run", run_to_the_end)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(store.publish, "song", 1, "wav", DATA)
        await anyio.to_thread.run_sync(began.wait, PATIENCE)
        tasks.cancel_scope.cancel()
    released.set()

    assert await anyio.to_thread.run_sync(ended.wait, PATIENCE)
    assert keys(s3) == set()


async def test_a_bucket_that_is_missing_is_said_to_be(s3):
    with pytest.raises(ArtifactError, match="there is no such bucket"):
        await open_output("s3://nowhere/audio").publish("song", 1, "wav", DATA)


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "endpoint", ["", "notaurl", "ftp://host", "http://", "http://a b", "https://host:99999"]
)
def test_an_endpoint_that_is_no_url_is_one_sentence(s3, monkeypatch, name, endpoint):
    monkeypatch.setenv(name, endpoint)

    with pytest.raises(ConfigurationError) as caught:
        open_output(s3)

    assert (
        str(caught.value)
        == f"{name} is not the URL of a store; use something like https://host:9000."
    )


async def test_plain_http_that_is_not_allowed_is_said_at_once(s3, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    waits = skip_waits(monkeypatch)

    with pytest.raises(
        ArtifactError, match=r"its endpoint is plain http://, which AWS_ALLOW_HTTP=true allows\.$"
    ):
        await open_output(s3).publish("song", 1, "wav", DATA)
    assert waits == []


# Deletion


@pytest.mark.parametrize("fault", [503, HANG, LOSE_REPLY, LOSE_REQUEST])
@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_a_deletion_outlives_trouble_that_passes(flaky, proxy, s3, method, fault):
    await flaky.publish("song", 1, "wav", DATA)
    proxy.fail(method, fault)

    assert await flaky.delete("song", [1]) == 1
    assert keys(s3) == set()


async def test_a_deletion_that_cannot_be_made_is_one_sentence(flaky, proxy, s3):
    await flaky.publish("song", 1, "wav", DATA)
    proxy.fail("POST", *[500] * ALWAYS)

    with pytest.raises(
        ArtifactError, match=f"^Audio cannot be removed from {s3}: [^\n]*500[^\n]*\\.$"
    ):
        await flaky.delete("song", [1])
    assert keys(s3) == {"song-1.wav"}


# Reading


@pytest.mark.parametrize("fault", [500, HANG, LOSE_REPLY, CUT])
async def test_a_stream_outlives_trouble_in_its_middle(flaky, proxy, monkeypatch, fault):
    monkeypatch.setattr("dgx_music.artifacts.objects.CHUNK_BYTES", 40_000)
    path = (await flaky.publish("song", 1, "wav", DATA)).path
    chunks = flaky.stream(path)
    first = await anext(chunks)
    proxy.fail("GET", fault)

    assert first + b"".join([chunk async for chunk in chunks]) == DATA
    assert proxy.count("GET") == 4


async def test_a_stream_whose_object_goes_away_says_so(flaky, monkeypatch):
    monkeypatch.setattr("dgx_music.artifacts.objects.CHUNK_BYTES", 40_000)
    chunks = flaky.stream((await flaky.publish("song", 1, "wav", DATA)).path)
    await anext(chunks)
    await flaky.delete("song", [1])

    with pytest.raises(ArtifactError, match=r"song-1\.wav cannot be read from .*no such object"):
        await anext(chunks)


async def test_a_link_is_for_anybody_and_ends(store):
    artifact = await store.publish("song", 1, "wav", DATA)

    link = await store.link(artifact.path, 90)

    assert "X-Amz-Expires=90&" in link
    assert await anyio.to_thread.run_sync(lambda: urllib.request.urlopen(link).read()) == DATA


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), LONGEST_LINK_SECONDS + 1])
async def test_a_link_for_no_length_of_time_is_refused(store, s3, seconds):
    with pytest.raises(InvalidRequestError, match=r"^seconds "):
        await store.link(f"{s3}/song-1.wav", seconds)


async def test_the_list_outlives_trouble_and_passes_over_what_is_not_ours(flaky, proxy, s3):
    for key in ("song-1.wav", "deeper/song-2.wav", "notes.txt"):
        await obstore.put_async(from_url(s3), key, DATA)
    await obstore.put_async(from_url(f"{s3}-sibling"), "song-3.wav", DATA)
    proxy.fail("GET", 503)

    assert [(file.path, file.attempt) async for file in flaky.list_files()] == [
        (f"{s3}/song-1.wav", 1)
    ]


async def test_a_list_that_cannot_be_had_is_one_sentence(flaky, proxy, s3):
    proxy.fail("GET", *[500] * ALWAYS)

    with pytest.raises(ArtifactError, match=f"^There is no listing of {s3}: [^\n]*500[^\n]*\\.$"):
        [file async for file in flaky.list_files()]


# Before a worker starts


async def test_a_look_at_the_place_leaves_no_trace(store, s3):
    assert await store.find_problem() is None
    assert keys(s3) == set()


@pytest.mark.parametrize("method", ["HEAD", "PUT", "POST"])
async def test_a_place_that_cannot_be_written_is_a_problem(flaky, proxy, s3, method):
    proxy.fail(method, *[403] * ALWAYS)

    assert await flaky.find_problem() == (
        f"Audio cannot be stored in {s3}: access is denied; check the credentials in the environment."
    )
    assert proxy.count("PUT") == (method != "HEAD")  # the right to list is looked at first


# What the setting says


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("audio", Path("audio")),
        ("/var/lib/a:/b", Path("/var/lib/a:/b")),
        ("s3://bucket", "s3://bucket"),
        ("S3://bucket/a/b-1/", "s3://bucket/a/b-1"),
        ("gs://bucket_1/day=1", "gs://bucket_1/day=1"),
        ("az://container/..a", "az://container/..a"),
    ],
)
def test_an_output_is_a_folder_or_a_bucket_and_a_prefix(text, place):
    assert load_settings(output=text).output == place


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ftp://host/audio", "begins with ftp://, which is not known; name a folder, or use s3://"),
        ("file:///audio", "begins with file://"),
        (
            "s3://",
            "is 's3://', which is not a bucket and a prefix; use something like s3://bucket/prefix",
        ),
        ("s3:///audio", "is 's3:///audio'"),
        (Path("s3://bucket/audio"), "is 's3:/bucket/audio'"),
        ("gs://bucket//audio", "is 'gs://bucket//audio'"),
        ("s3://bucket/a/../b", "is 's3://bucket/a/../b'"),
        ("s3://bucket/%2e", "is 's3://bucket/%2e'"),
        ("s3://bucket:80/a", "is 's3://bucket:80/a'"),
        ("s3://bucket/a\nb", "is 's3://bucket/a\\nb'"),
        (
            "s3://me:secret@bucket/a",
            "holds a user, a password or a query; use s3://bucket/prefix, and the environment",
        ),
        ("az://container/a?sig=secret", "holds a user, a password or a query"),
    ],
)
def test_an_output_that_is_neither_is_one_sentence_without_a_secret(text, problem):
    with pytest.raises(ConfigurationError) as caught:
        load_settings(output=text)
    assert str(caught.value).startswith(f"DGX_MUSIC_OUTPUT {problem}")
    assert "secret" not in str(caught.value)


def test_a_store_whose_package_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("dgx_music.artifacts.output.find_spec", lambda _name: None)

    with pytest.raises(
        ConfigurationError,
        match=r"obstore is not installed; run pip install '\.\[s3\]' in a checkout",
    ):
        open_output("s3://bucket/audio")
    assert isinstance(open_output("audio"), LocalArtifacts)


def test_a_store_that_lacks_a_variable_says_so(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)

    with pytest.raises(
        ConfigurationError,
        match=r"az://box/audio, which cannot be opened \(.*Account must be specified\)",
    ):
        open_output("az://box/audio")


@pytest.mark.parametrize("url", ["s3://bucket/a/song-1.wav", "gs://bucket/song-1.wav"])
def test_the_place_of_a_file_is_found_by_its_path(s3, url):
    assert str(open_place_of(url)) == url.rpartition("/")[0]


# With the worker and the command line


def worker_of(database, output):
    settings = load_settings(model=MODEL, output=output, poll_seconds=0.05)
    return Worker(database, FakeEngine(), open_output(settings.output), settings)


@pytest.mark.parametrize(
    "faults", [{"PUT": [503, 503]}, {"PUT": [LOSE_REPLY]}, {"HEAD": [HANG, 500], "PUT": [HANG]}]
)
async def test_a_short_outage_throws_no_audio_away(database, proxy, s3, faults):
    async with database.session() as session:
        generation = await add_generation(session, model_name=MODEL)
    proxy.plan_after("POST", faults)  # the first is of the worker's look at the place

    await worker_of(database, s3).run(drain=True)

    row = await read(database, generation.id)
    assert (row.status, row.attempt, row.file_path) == ("completed", 1, f"{s3}/{row.id}-1.wav")
    assert hashlib.sha256(await content(open_output(s3), row.file_path)).hexdigest() == row.sha256


async def test_a_long_outage_gives_the_generation_back_and_ends_the_worker(database, proxy, s3):
    async with database.session() as session:
        generation = await add_generation(session, model_name=MODEL)
    proxy.plan_after("POST", {"PUT": [503] * ALWAYS})

    with pytest.raises(ArtifactError, match="cannot be stored"):
        await worker_of(database, s3).run(drain=True)

    assert (await read(database, generation.id)).status == "pending"


@pytest.mark.parametrize(
    ("url", "subject", "verdict", "detail"),
    [
        (None, "output", "ok", "can be written"),
        ("s3://nowhere/audio", "output", "failed", "there is no such bucket"),
        ("az://box/audio", "settings", "failed", "cannot be opened"),
    ],
)
def test_doctor_looks_at_an_object_store(s3, tmp_path, monkeypatch, url, subject, verdict, detail):
    monkeypatch.chdir(tmp_path)

    found = {
        finding.subject: finding for finding in examine({"engine": "tone", "output": url or s3})
    }

    assert found[subject].verdict == verdict
    assert detail in found[subject].detail


def test_the_clients_own_coroutines_are_not_used():
    """They abort about one process in three that ends right after a reply."""
    assert re.findall(r"_async\b|async for", Path(objects.__file__).read_text()) == []


def test_audio_in_a_store_is_copied_out(store, tmp_path):
    artifact = anyio.run(partial(store.publish, "song", 1, "wav", DATA))

    copy_audio(completed(artifact), tmp_path / "rain.wav", force=False)

    assert (tmp_path / "rain.wav").read_bytes() == DATA


def test_a_copy_of_what_is_not_there_overwrites_nothing(s3, tmp_path):
    out = tmp_path / "rain.wav"
    out.write_text("mine")

    with pytest.raises(ArtifactError, match="no such object"):
        copy_audio(completed(Artifact(f"{s3}/song-1.wav", 4, "0" * 64)), out, force=True)
    assert out.read_text() == "mine"


def test_a_copy_that_breaks_off_leaves_no_half_file(flaky, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("dgx_music.artifacts.objects.CHUNK_BYTES", 40_000)
    artifact = anyio.run(partial(flaky.publish, "song", 1, "wav", DATA))
    proxy.plan_after("GET", {"GET": [500] * ALWAYS})

    with pytest.raises(ArtifactError, match=r"song-1\.wav cannot be read"):
        copy_audio(completed(artifact), tmp_path / "rain.wav", force=False)
    assert list(tmp_path.glob("rain*")) == []
