"""The routes that answer with the audio's bytes: for ``elevenlabs``, itself, and for vLLM-Omni."""

from __future__ import annotations

import asyncio
import io
from functools import partial

import httpx
import pytest
import soundfile
from elevenlabs import AsyncElevenLabs
from elevenlabs.core import ApiError
from elevenlabs.errors import UnprocessableEntityError
from elevenlabs.types import MusicPrompt
from sqlalchemy import select
from starlette.requests import Request

from dgx_music import cancel_generation, enqueue
from dgx_music.storage.models import Generation
from dgx_music.web import WebOptions, create_app
from dgx_music.web.compat import holding
from dgx_music.web.site import Site
from tests.factories import SQLITE, audio_file, on, read, read_all
from tests.web.conftest import HOST
from tests.web.working import DATA, claim_soon, complete_next, fail_next

pytestmark = pytest.mark.any_driver


def client_of(app=None, key="dgx_none"):
    app = app or create_app(options=WebOptions(is_open=True))
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return AsyncElevenLabs(base_url=HOST, api_key=key, httpx_client=client)


@pytest.fixture
def ours(default_database, output):
    """A client of an application that is open to everybody."""
    return client_of()


@pytest.fixture
def complete(default_database, output):
    return partial(complete_next, default_database, output)


@pytest.fixture
def impatient(monkeypatch):
    """Answers do not wait for anything."""
    monkeypatch.setattr(holding, "HELD_SECONDS", 0)


async def joined(chunks):
    return b"".join([chunk async for chunk in chunks])


async def refusal(chunks):
    with pytest.raises(ApiError) as caught:
        await joined(chunks)
    return caught.value


def music(client, **fields):
    return client.music.compose(**{"prompt": "lofi rain"} | fields)


@pytest.mark.parametrize("route", ["compose", "stream", "convert"])
async def test_the_answer_is_the_audio_once_it_is_finished(ours, complete, route):
    chunks = (
        ours.text_to_sound_effects.convert(text="rain", output_format="wav_32000")
        if route == "convert"
        else getattr(ours.music, route)(prompt="rain", output_format="wav_32000")
    )
    answer = asyncio.create_task(joined(chunks))
    await complete()

    expected, _ = soundfile.read(io.BytesIO(DATA), dtype="int16")
    found, rate = soundfile.read(io.BytesIO(await answer), dtype="int16")
    assert (rate, found.tolist()) == (32_000, expected.tolist())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"prompt": "lofi rain", "duration_seconds": 10.0, "model_name": "musicgen-small"}),
        ({"music_length_ms": 4_500}, {"duration_seconds": 4.5}),
        ({"seed": 42, "model_id": "music_v1", "force_instrumental": True}, {"seed": 42}),
        ({"model_id": "musicgen-medium"}, {"model_name": "musicgen-medium"}),
        ({"model_id": "facebook/musicgen-medium"}, {"model_name": "musicgen-medium"}),
    ],
)
@on(SQLITE)
async def test_each_field_of_music_is_the_option_that_it_means(
    ours, default_database, impatient, fields, expected
):
    assert (await refusal(music(ours, **fields))).status_code == 504

    (row,) = await read_all(default_database, select(Generation))
    found = {**row.to_dict(), **row.sampling}
    assert {name: found[name] for name in expected} == expected


@on(SQLITE)
@pytest.mark.parametrize(("influence", "scale"), [(0.0, 1.0), (0.3, 3.0), (None, 3.0)])
async def test_a_sound_follows_its_text_as_closely_as_asked(
    ours, default_database, impatient, influence, scale
):
    asked = {} if influence is None else {"prompt_influence": influence}
    await refusal(ours.text_to_sound_effects.convert(text="rain", duration_seconds=2.5, **asked))

    (row,) = await read_all(default_database, select(Generation))
    assert (row.prompt, row.duration_seconds) == ("rain", 2.5)
    assert row.sampling["guidance_scale"] == scale


PLAN = MusicPrompt(positive_global_styles=["lofi"], negative_global_styles=[], sections=[])


@on(SQLITE)
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"music_length_ms": 400_000}, "music_length_ms is 400000; use a whole number from 80 to"),
        ({"prompt": " "}, "prompt"),
        ({"seed": -1}, "seed is -1; use a whole number"),
        ({"model_id": "other"}, "model_id 'other' is not known; use musicgen-small,"),
        ({"model_id": "a/b/c"}, "model_id 'a/b/c' is not known; use musicgen-small,"),
        ({"finetune_id": "x"}, "finetune_id is not known here; leave it out."),
        ({"sign_with_c_2_pa": True}, "sign_with_c2pa cannot be done here; leave it out."),
        ({"enable_logging": False}, "enable_logging is false, and each generation is kept"),
        ({"output_format": "aac_44100"}, "output_format is 'aac_44100'; use one of auto, mp3_"),
    ],
)
async def test_what_cannot_be_done_is_refused_in_the_clients_own_words(ours, fields, sentence):
    error = await refusal(music(ours, **fields))

    assert isinstance(error, UnprocessableEntityError)
    assert error.body["detail"].startswith(sentence)


@on(SQLITE)
async def test_a_plan_of_sections_is_refused(ours):
    error = await refusal(ours.music.compose(composition_plan=PLAN))

    assert error.body["detail"] == (
        "composition_plan cannot be followed: there are no lyrics and no sections here; leave it out."
    )


@on(SQLITE)
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"loop": True}, "loop cannot be made here; leave it out."),
        ({"duration_seconds": 400}, "duration_seconds is 400 s; use 0.08 to 300 seconds."),
        ({"prompt_influence": 2}, "prompt_influence is 2; use a number from 0 to 1."),
        ({"text": " "}, "text"),
    ],
)
async def test_a_sound_that_cannot_be_made_is_refused(ours, fields, sentence):
    error = await refusal(ours.text_to_sound_effects.convert(**{"text": "rain"} | fields))

    assert error.body["detail"].startswith(sentence)


async def test_what_is_not_finished_in_time_goes_on(ours, client, default_database, impatient):
    error = await refusal(music(ours))

    assert (error.status_code, error.body["type"]) == (504, "urn:dgx-music:not-finished")
    row = (await client.get(error.headers["location"])).json()
    assert row["status"] == "pending"
    assert row["id"] in error.body["detail"]


async def test_a_failure_is_told(ours, default_database):
    answer = asyncio.create_task(refusal(music(ours)))
    await fail_next(default_database, "the engine ran out of memory")

    error = await answer
    assert (error.status_code, error.body["title"]) == (502, "The generation has failed.")
    assert error.body["detail"].endswith("has failed: the engine ran out of memory")


async def test_what_is_cancelled_meanwhile_is_no_audio(ours, default_database):
    answer = asyncio.create_task(refusal(music(ours)))
    while not (rows := await read_all(default_database, select(Generation))):
        await asyncio.sleep(0.01)
    await cancel_generation(rows[0].id)

    error = await answer
    assert (error.status_code, error.body["detail"]) == (
        409,
        f"Generation {rows[0].id} was cancelled.",
    )


@on(SQLITE)
async def test_a_client_that_hangs_up_leaves_the_row(default_database):
    row, hung_up = await enqueue("lofi rain"), asyncio.Event()

    async def receive():
        await hung_up.wait()
        return {"type": "http.disconnect"}

    scope = {"type": "http", "state": {"music_site": Site(None, WebOptions())}}
    held = asyncio.create_task(holding.hold(Request(scope, receive), row, 1_000.0))
    lease = await claim_soon(default_database)
    hung_up.set()

    await held
    found = await read(default_database, row.id)
    assert (found.status, found.attempt) == ("processing", lease.attempt)


async def test_a_token_is_needed_and_its_role_counts(holding, default_database):
    keys = [
        (await holding(role)).headers["authorization"].removeprefix("Bearer ")
        for role in ("read", "enqueue")
    ]
    app = create_app()

    unknown, reading = [await refusal(music(client_of(app, key))) for key in ("x", keys[0])]
    invalid = await refusal(music(client_of(app, keys[1]), seed=-1))

    assert (unknown.status_code, unknown.body["status"]) == (401, 401)
    assert (reading.status_code, invalid.status_code) == (403, 422)


async def generate(client, **fields):
    return await client.post("/v1/audio/generate", json={"input": "a cat purring"} | fields)


@pytest.mark.parametrize(
    ("fields", "extension", "kind"),
    [
        ({}, "wav", "audio/wav"),
        ({"response_format": "flac"}, "flac", "audio/flac"),
        ({"response_format": "mp3", "seed": 42, "speed": 1.0}, "mp3", "audio/mpeg"),
    ],
)
async def test_the_bytes_are_those_that_are_stored(
    client, default_database, complete, fields, extension, kind
):
    data = audio_file(0.1, kind=extension.upper())
    answering = asyncio.create_task(generate(client, **fields))
    lease = await complete(data, extension)

    answer = await answering
    row = await read(default_database, lease.generation_id)
    assert (answer.status_code, answer.content) == (200, data)
    assert answer.headers["content-type"] == kind
    assert answer.headers["content-location"] == f"/v1/generations/{row.id}/audio"
    assert (row.prompt, row.audio_format) == ("a cat purring", extension)


@on(SQLITE)
@pytest.mark.parametrize(
    ("response_format", "kind", "start"),
    [("pcm", "audio/pcm;rate=32000;channels=1", DATA[44:48]), ("opus", "audio/opus", b"OggS")],
)
async def test_another_encoding_is_made_of_what_is_stored(
    client, complete, response_format, kind, start
):
    answering = asyncio.create_task(generate(client, response_format=response_format))
    await complete()

    answer = await answering
    assert (answer.headers["content-type"], answer.content[:4]) == (kind, start)


@on(SQLITE)
async def test_its_fields_are_the_options_that_they_mean(client, default_database, impatient):
    answer = await generate(
        client,
        audio_length=15,
        negative_prompt="noise",
        guidance_scale=7,
        seed=42,
        num_inference_steps=100,
        model="facebook/musicgen-medium",
        audio_start=0.0,
    )

    (row,) = await read_all(default_database, select(Generation))
    assert answer.status_code == 504
    assert (row.duration_seconds, row.model_name) == (15.0, "musicgen-medium")
    assert row.sampling["negative_prompt"] == "noise"
    assert (row.sampling["guidance_scale"], row.sampling["seed"]) == (7.0, 42)


@on(SQLITE)
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"input": None}, "input is missing; add it."),
        ({"input": " "}, "input"),
        ({"audio_length": 400}, "audio_length is 400 s; use 0.08 to 300 seconds."),
        ({"response_format": "aac"}, "response_format is 'aac'; use one of wav, pcm, flac, mp3, o"),
        ({"speed": 2}, "speed is 2, which cannot be done here; leave it out."),
        ({"audio_start": 1.5}, "audio_start is 1.5, which cannot be done here; leave it out."),
        ({"stream_format": "sse"}, "stream_format is 'sse'; use one of audio."),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; use a whole number from 1 to"),
        ({"voice": "x"}, "voice is not a field here; use input, model,"),
    ],
)
async def test_what_it_cannot_do_is_refused(client, fields, sentence):
    answer = await generate(client, **fields)

    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)
