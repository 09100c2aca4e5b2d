"""The routes for Replicate's clients, called by the ``replicate`` package itself."""

from __future__ import annotations

import asyncio
import base64
import io
from functools import partial

import httpx
import pytest
from fastapi import FastAPI
from replicate import Client
from replicate.exceptions import ModelError, ReplicateError
from replicate.helpers import FileOutput
from sqlalchemy import select

from dgx_music.storage import queue
from dgx_music.storage.models import Clip, Generation, Upload
from dgx_music.web import Access, WebOptions, create_app, music_router
from dgx_music.web.compat import outputs
from dgx_music.web.compat.replicate import held_seconds
from tests.factories import SQLITE, audio_file, on, read, read_all
from tests.web.conftest import HOST
from tests.web.working import DATA, claim_soon, complete_next, fail_next

pytestmark = pytest.mark.any_driver

ANY = "meta/musicgen"
HOSTED = "671ac645ce5e552cc63a54a2bbff63fcf798043055d2dac5fc9e36a837eedcfb"
HTTPS = HOST.replace("http:", "https:")
ASKED = {"prompt": "lofi rain"}


def client_of(app=None, base_url=HOST, token="dgx_none"):
    app = app or create_app(options=WebOptions(is_open=True))
    return Client(token, base_url=base_url, transport=httpx.ASGITransport(app))


@pytest.fixture
def ours(default_database, output):
    """A client of an application that is open to everybody."""
    return client_of()


@pytest.fixture
def complete(default_database, output):
    return partial(complete_next, default_database, output)


async def predict(client, **fields):
    return await client.models.predictions.async_create(ANY, ASKED | fields)


async def refusal(client, **fields):
    with pytest.raises(ReplicateError) as caught:
        await predict(client, **fields)
    return caught.value


def data_uri(content):
    return f"data:audio/wav;base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize("base_url", [HOST, HTTPS])
async def test_run_returns_the_file(ours, complete, base_url):
    running = asyncio.create_task(client_of(base_url=base_url).async_run(ANY, ASKED))
    await complete()

    output = await running

    assert isinstance(output, FileOutput)
    assert output.url.startswith("data:audio/wav;" if base_url == HOST else f"{HTTPS}/v1/")
    assert await output.aread() == DATA


async def test_a_file_is_fetched_with_the_clients_token(holding, complete):
    secret = (await holding("enqueue")).headers["authorization"].removeprefix("Bearer ")
    client = client_of(create_app(), HTTPS, secret)
    running = asyncio.create_task(client.async_run(f"{ANY}:{HOSTED}", ASKED))
    await complete()

    assert await (await running).aread() == DATA


async def test_who_does_not_wait_gets_the_address_of_the_audio(ours, client, complete):
    prediction = await predict(ours)
    await complete()
    await prediction.async_wait()

    assert (prediction.status, prediction.progress.percentage) == ("succeeded", 1.0)
    assert prediction.output == f"{HOST}/v1/generations/{prediction.id}/audio"
    assert (await client.get(prediction.output)).content == DATA


@on(SQLITE)
async def test_long_audio_is_not_sent_inside_an_answer(ours, complete, monkeypatch):
    monkeypatch.setattr(outputs, "_MOST_INLINE_BYTES", 10)
    running = asyncio.create_task(ours.async_run(ANY, ASKED))
    await complete()

    assert (await running).startswith(f"{HOST}/v1/generations/")


async def test_an_answer_that_was_held_says_starting_even_if_it_runs(ours, default_database):
    held = asyncio.create_task(ours.models.predictions.async_create(ANY, ASKED, wait=1))
    lease = await claim_soon(default_database)
    async with default_database.session() as session:
        await queue.renew(session, {lease: 0.42}, lease_seconds=30.0)

    prediction = await held
    later = await ours.predictions.async_get(prediction.id)

    assert (prediction.status, prediction.output) == ("starting", None)
    assert later.status == "processing"
    assert vars(later.progress) == {"percentage": 0.42, "current": 168, "total": 400}


async def test_a_failure_is_the_models_error(ours, default_database):
    running = asyncio.create_task(ours.async_run(ANY, ASKED))
    await fail_next(default_database, "the clip is damaged")

    with pytest.raises(ModelError, match="the clip is damaged"):
        await running


async def test_a_failure_that_is_tried_again_is_no_error_yet(ours, default_database):
    prediction = await predict(ours)
    lease = await claim_soon(default_database)
    async with default_database.session() as session:
        await queue.fail(session, lease, "out of memory", retry_in_seconds=60.0)

    await prediction.async_reload()

    assert (prediction.status, prediction.error) == ("starting", None)


async def test_a_prediction_is_cancelled_before_and_while_it_runs(ours, default_database):
    running = await predict(ours)
    await claim_soon(default_database)
    waiting = await predict(ours)

    for each in (waiting, running):
        await each.async_cancel()

    assert (waiting.status, running.status) == ("canceled", "canceled")
    assert (await read(default_database, running.id)).cancel_requested
    assert (await read(default_database, waiting.id)).status == "cancelled"


async def test_what_has_finished_stays_as_it_is_when_it_is_cancelled(ours, complete):
    prediction = await predict(ours)
    await complete()

    await prediction.async_cancel()

    assert prediction.status == "succeeded"


async def test_predictions_are_listed_by_pages(ours, client):
    await client.post("/v1/generations/batch", json={"requests": ["a"] * 101})
    newest = await predict(ours)

    page = await ours.predictions.async_list()
    rest = await ours.predictions.async_list(page.next)

    assert (len(page), page[0].id, page[0].model) == (100, newest.id, ANY)
    assert (len(rest), rest.next, rest[0].model) == (2, None, "facebook/musicgen-small")


INPUTS = [
    ({}, {"prompt": "lofi rain", "duration_seconds": 8.0, "audio_format": "wav"}),
    ({"duration": 30, "output_format": "mp3"}, {"duration_seconds": 30.0, "audio_format": "mp3"}),
    ({"model_version": "stereo-large"}, {"model_name": "musicgen-stereo-large", "channels": 2}),
    ({"model_version": "musicgen-medium"}, {"model_name": "musicgen-medium"}),
    ({"seed": 42}, {"seed": 42}),
    ({"seed": -1}, {"seed": None}),
    ({"seed": None, "input_audio": None, "top_p": None}, {"seed": None, "top_p": None}),
    ({"top_k": 100, "top_p": 0}, {"top_k": 100, "top_p": None}),
    ({"top_k": 100, "top_p": 0.9}, {"top_k": 0, "top_p": 0.9}),
    ({"temperature": 0.8, "classifier_free_guidance": 5}, {"temperature": 0.8}),
    ({"classifier_free_guidance": 5}, {"guidance_scale": 5.0}),
    ({"normalization_strategy": "peak", "multi_band_diffusion": False}, {}),
    ({"continuation": False, "continuation_start": 0, "continuation_end": -1}, {}),
]


@on(SQLITE)
@pytest.mark.parametrize(("fields", "expected"), INPUTS)
async def test_each_input_is_the_option_that_it_means(ours, default_database, fields, expected):
    prediction = await predict(ours, **fields)

    row = await read(default_database, prediction.id)
    found = {**row.to_dict(), **row.sampling}
    assert {name: found[name] for name in expected} == expected
    assert prediction.input["prompt"] == "lofi rain"


REFUSED = [
    ({"duration": 400}, "duration is 400 s; use 0.08 to 300 seconds."),
    ({"classifier_free_guidance": 0}, "classifier_free_guidance is 0; use a number from 1 to 20."),
    ({"output_format": "aac"}, "output_format is 'aac'; use wav, flac, mp3 or ogg."),
    ({"model_version": "encode-decode"}, "model_version 'encode-decode' is not known; use one"),
    ({"multi_band_diffusion": True}, "multi_band_diffusion cannot be done here; leave it out."),
    ({"normalization_strategy": "x"}, "normalization_strategy is 'x'; use one of loudness, clip"),
    ({"continuation": "yes"}, "continuation is 'yes'; use true or false."),
    ({"continuation": True}, "continuation needs input_audio; add it, or leave this out."),
    ({"lyrics": "la"}, "lyrics is not a field here; use prompt,"),
    ({"prompt": 7}, "prompt"),
    ({"top_p": "x"}, "top_p is 'x'; use a number"),
    ({"input_audio": "https://evil.example/a.wav"}, "input_audio is neither a file that was sent"),
    ({"input_audio": f"ftp://a/v1/files/up_{'x' * 32}"}, "input_audio is neither a file that was"),
    ({"input_audio": "file:///etc/passwd"}, "input_audio is neither a file that was sent"),
    ({"input_audio": "/etc/passwd"}, "input_audio is neither a file that was sent"),
    ({"input_audio": {"path": "x"}}, "input_audio is neither a file that was sent"),
    ({"input_audio": "data:audio/wav;base64,%%"}, "input_audio has base64 that cannot be decoded"),
    ({"input_audio": data_uri(b"no")}, "input_audio is not audio that can be read"),
    ({"input_audio": f"{HOST}/v1/files/up_{'x' * 32}"}, "input_audio is no file that is here"),
]


@on(SQLITE)
@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
async def test_what_cannot_be_done_is_refused_in_the_inputs_own_words(ours, fields, sentence):
    error = await refusal(ours, **fields)

    assert error.status in (404, 422)
    assert error.detail.startswith(sentence)
    assert error.title


@on(SQLITE)
async def test_nobody_is_called_back(ours):
    with pytest.raises(ReplicateError, match="webhook cannot be called from here; leave it out"):
        await ours.predictions.async_create(ANY, ASKED, webhook="https://evil.example")


@pytest.mark.parametrize("strategy", ["url", "base64"])
@pytest.mark.parametrize("continuation", [True, False])
async def test_a_file_is_where_the_music_starts_or_its_melody(
    ours, default_database, continuation, strategy
):
    file = io.BytesIO(audio_file(2.0))
    prediction = await ours.predictions.async_create(
        ANY,
        ASKED | {"model_version": "melody", "input_audio": file, "continuation": continuation},
        file_encoding_strategy=strategy,
    )

    row = await read(default_database, prediction.id)
    found = row.continuation_sha256 is not None, row.melody_sha256 is not None
    assert found == (continuation, not continuation)


async def test_a_part_of_a_file_is_cut_out(ours, default_database):
    whole = audio_file(3.0, hertz=500)
    part = await predict(
        ours,
        input_audio=data_uri(whole),
        continuation=True,
        continuation_start=1,
        continuation_end=2,
    )
    direct = await predict(ours, input_audio=data_uri(cut(whole)), continuation=True)

    rows = [await read(default_database, each.id) for each in (part, direct)]
    assert rows[0].continuation_sha256 == rows[1].continuation_sha256


async def test_a_part_of_a_melody_may_be_long_and_late(ours, default_database):
    part = {"continuation_start": 20, "continuation_end": 55}
    file = await ours.files.async_create(io.BytesIO(audio_file(60.0, channels=2)))
    made = await predict(ours, model_version="melody", input_audio=file.urls["get"], **part)

    row = await read(default_database, made.id)
    lengths = {
        each.sha256: each.duration_seconds
        for each in await read_all(default_database, select(Clip))
    }
    assert lengths[row.melody_sha256] == 35


def cut(wav):
    """Return the second second of a WAV of one channel at 32 kHz."""
    second = 64_000
    header = audio_file(1.0)[:44]
    return header + wav[44 + second : 44 + 2 * second]


@on(SQLITE)
@pytest.mark.parametrize(
    ("seconds", "part", "sentence"),
    [
        (2.0, {"continuation_start": 3}, "continuation_start is 3; use a number from 0 to 2."),
        (2.0, {"continuation_end": 3}, "continuation_end is 3; use a number from 0 to 2."),
        (2.0, {"continuation_start": 1, "continuation_end": 1}, "continuation_start is 1, and the"),
        (31.0, {"continuation_start": 1}, "continuation_end is not given, and the part from 1 s "),
        (
            31.0,
            {"continuation_start": 0.5, "continuation_end": 31},
            "continuation_end is 31, and only the first 30 s of a",
        ),
        (31.0, {}, "input_audio is 31 s long; use a clip of 0.08 to 30 seconds."),
    ],
)
async def test_a_part_lies_within_what_is_kept(ours, seconds, part, sentence):
    file = await ours.files.async_create(io.BytesIO(audio_file(seconds, 8_000)))

    error = await refusal(
        ours, input_audio=file.urls["get"], continuation=True, duration=40, **part
    )

    assert error.detail.startswith(sentence)


async def test_a_file_says_what_is_kept_of_it(ours, default_database):
    made = await ours.files.async_create(io.BytesIO(audio_file(2.0)))
    found = await ours.files.async_get(made.id)

    (upload,) = await read_all(default_database, select(Upload))
    (clip,) = [
        each
        for each in await read_all(default_database, select(Clip))
        if each.sha256 == upload.mono_sha256
    ]
    assert found == made
    assert (made.id, made.size, made.content_type) == (upload.id, len(clip.data), "audio/flac")
    assert made.expires_at == upload.expires_at.isoformat()


async def test_another_tenants_files_and_predictions_are_not_found(holding, default_database):
    one, other = [
        client_of(
            create_app(), token=(await holding("enqueue", tenant)).headers["authorization"][7:]
        )
        for tenant in ("label-7", "label-8")
    ]
    file = await one.files.async_create(io.BytesIO(audio_file(2.0)))
    prediction = await predict(one)

    error = await refusal(other, input_audio=file.urls["get"])
    assert (error.status, error.detail[:27]) == (404, "input_audio is no file that")
    for ask in (
        lambda: other.files.async_get(file.id),
        lambda: other.predictions.async_get(prediction.id),
        lambda: other.predictions.async_cancel(prediction.id),
    ):
        with pytest.raises(ReplicateError, match="status: 404"):
            await ask()
    assert len(await other.predictions.async_list()) == 0
    assert (await read(default_database, prediction.id)).tenant == "label-7"


@on(SQLITE)
async def test_who_may_only_read_predicts_nothing(holding):
    secret = (await holding("read")).headers["authorization"].removeprefix("Bearer ")
    client = client_of(create_app(), token=secret)

    assert (await refusal(client)).status == 403
    assert len(await client.predictions.async_list()) == 0


@on(SQLITE)
async def test_models_and_versions_are_found(ours, client):
    names = [each.name for each in await ours.models.async_list()]
    small = await ours.models.async_get("facebook/musicgen-small")
    version = await ours.models.async_get(ANY)

    assert "musicgen-stereo-melody" in names
    assert (small.owner, small.visibility) == ("facebook", "public")
    listed = (await client.get("/v1/models")).json()
    assert [each["id"] for each in listed["data"]] == names
    schemas = version.latest_version.openapi_schema["components"]["schemas"]
    assert {"prompt", "input_audio", "seed"} <= schemas["Input"]["properties"].keys()


@on(SQLITE)
@pytest.mark.parametrize(
    ("version", "model", "echoed"),
    [
        (HOSTED, "musicgen-small", ANY),
        (f"{ANY}:{HOSTED}", "musicgen-small", ANY),
        ("facebook/musicgen-medium", "musicgen-medium", "facebook/musicgen-medium"),
        (None, "musicgen-medium", "facebook/musicgen-medium"),
    ],
)
async def test_a_version_means_its_model(ours, default_database, version, model, echoed):
    if version is None:
        version = (await ours.models.async_get("facebook/musicgen-medium")).latest_version.id

    prediction = await ours.predictions.async_create(version, ASKED)

    row = await read(default_database, prediction.id)
    assert (row.model_name, prediction.model) == (model, echoed)


@on(SQLITE)
async def test_an_unknown_model_or_version_is_refused(ours):
    with pytest.raises(ReplicateError, match="There is no model 'meta/other' here"):
        await ours.models.async_get("meta/other")
    with pytest.raises(ReplicateError, match="version 'meta/other' is not known; use the id"):
        await ours.predictions.async_create("meta/other", ASKED)
    small, any_model = [
        await ours.models.async_get(name) for name in ("facebook/musicgen-small", ANY)
    ]
    with pytest.raises(ReplicateError, match="The model musicgen has no version 'newest'"):
        await any_model.versions.async_get("newest")
    with pytest.raises(ReplicateError, match="The model musicgen-small has no version"):
        await small.versions.async_get(HOSTED)
    with pytest.raises(ReplicateError, match="model_version is 'large', and the model is"):
        await ours.models.predictions.async_create(
            "facebook/musicgen-small", ASKED | {"model_version": "large"}
        )


@on(SQLITE)
async def test_it_works_where_it_is_mounted(default_database, complete):
    app = FastAPI()
    app.include_router(music_router(lambda: Access("enqueue")), prefix="/music")
    client = client_of(app, f"{HTTPS}/music")
    running = asyncio.create_task(client.async_run(ANY, ASKED))
    await complete()

    output = await running

    assert output.url.startswith(f"{HTTPS}/music/v1/generations/")
    assert await output.aread() == DATA


@on(SQLITE)
async def test_a_repeated_request_makes_one_prediction(client, default_database):
    body, key = {"version": HOSTED, "input": ASKED}, {"Idempotency-Key": "order-4711"}

    answers = [await client.post("/v1/predictions", json=body, headers=key) for _ in range(2)]

    (row,) = await read_all(default_database, select(Generation))
    assert [(each.status_code, each.json()["id"]) for each in answers] == [(201, row.id)] * 2
    assert answers[0].headers["location"] == f"{HOST}/v1/predictions/{row.id}"


@on(SQLITE)
@pytest.mark.parametrize(("size", "status"), [(2**22, 422), (2**23, 413)])
async def test_a_body_may_have_audio_in_it_but_not_more(client, size, status):
    body = {"version": HOSTED, "input": {"prompt": "a", "input_audio": "x" * size}}

    assert (await client.post("/v1/predictions", json=body)).status_code == status


@on(SQLITE)
@pytest.mark.parametrize("body", [{}, {"input": {}}, {"version": HOSTED}, {"version": 7}, []])
async def test_a_body_without_the_needed_is_refused(client, body):
    answer = await client.post("/v1/predictions", json=body)

    assert (answer.status_code, answer.json()["status"]) == (422, 422)


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (None, 0),
        ("wait", 59),
        ("respond-async, wait", 59),
        ("wait=60", 59),
        ("wait=5", 4.5),
        ("await", 0),
        ("wait=0", 0),
    ],
)
def test_the_answer_comes_before_the_client_gives_up(prefer, seconds):
    assert held_seconds(prefer) == seconds
