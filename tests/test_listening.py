"""Generations that are heard while they are made: real database, files and worker."""

from contextlib import aclosing, asynccontextmanager

import anyio
import numpy as np
import pytest

from dgx_music import cancel_generation, enqueue, watch_audio
from dgx_music.artifacts import LocalArtifacts
from dgx_music.audio.samples import Audio
from dgx_music.config import load_settings
from dgx_music.errors import (
    ArtifactError,
    EngineCrashedError,
    GenerationNotFoundError,
    NoAudioError,
)
from dgx_music.storage.queue import Lease
from dgx_music.worker.preview import Preview
from dgx_music.worker.worker import Worker
from tests.factories import MODEL
from tests.fakes import FakeEngine
from tests.patience import PATIENCE

pytestmark = pytest.mark.any_driver

RATE = 32_000


@pytest.fixture
def engine():
    return FakeEngine(slots=4)


@pytest.fixture
def place(tmp_path):
    return LocalArtifacts(tmp_path / "audio")


@pytest.fixture
def worker(default_database, engine, place):
    settings = load_settings(heartbeat_seconds=0.05, poll_seconds=0.1, backoff_base_seconds=0.01)
    return Worker(default_database, engine, place, settings)


@asynccontextmanager
async def at_work(worker):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(worker.run)
        yield
        worker.stop()
        worker.stop()


def music(seconds, channels=1):
    """Return quiet noise: the finished file is louder."""
    rng = np.random.default_rng(7)
    return rng.uniform(-0.1, 0.1, (channels, round(seconds * RATE))).astype(np.float32)


def hand_out(engine, prompt, samples, seconds):
    """Let the engine hand out the first seconds, and make all of it."""
    heard = round(seconds * RATE)
    first = samples[:, : heard // 2], samples[:, heard // 2 : heard]
    engine.parts[prompt] = [(Audio(first[0], RATE), 0), (Audio(first[1], RATE), heard // 2)]
    engine.made[prompt] = samples


async def add(prompt, **options):
    return (await enqueue(prompt, model=MODEL, **{"duration": 2, "channels": 1} | options)).id


async def hear_all(worker, place, generation, let_go):
    """Return all parts; the engine may go on once the first one was heard."""
    parts = []
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            async for part in watch_audio(generation, artifacts=place):
                parts.append(part)
                let_go.set()
    return parts


def samples_of(parts):
    data = b"".join(part.pcm for part in parts)
    return np.frombuffer(data, "<i2").reshape(-1, parts[0].channels).T / 2**15


def parts_in(place):
    return [*place.root.glob("previews/*/*")]


@pytest.mark.parametrize("channels", [1, 2])
async def test_what_was_heard_is_the_whole_audio(worker, engine, place, channels):
    made = music(2, channels)
    hand_out(engine, "rain", made, seconds=1)
    let_go = engine.hold("rain")
    generation = await add("rain", channels=channels)
    parts = await hear_all(worker, place, generation, let_go)
    assert [part.start for part in parts] == [0, RATE]
    assert samples_of(parts) == pytest.approx(made, abs=3e-4)
    assert parts_in(place) == []


async def test_a_listener_who_comes_late_hears_the_finished_audio(worker, engine, place):
    generation = await add("rain", duration=0.08)
    await worker.run(drain=True)
    parts = [part async for part in watch_audio(generation, artifacts=place)]
    assert [(part.attempt, part.start, len(part.pcm)) for part in parts] == [(1, 0, 2 * 2_560)]


async def test_a_preview_has_the_rate_that_was_asked_for(worker, engine, place):
    made = np.sin(np.arange(2 * RATE) * 2 * np.pi * 440 / RATE, dtype=np.float32)[None] / 10
    hand_out(engine, "rain", made, seconds=1)
    let_go = engine.hold("rain")
    generation = await add("rain", sample_rate=16_000)
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            parts = []
            async for part in watch_audio(generation, artifacts=place):
                parts.append(part)
                let_go.set()
    assert samples_of(parts)[:, 200:-200] == pytest.approx(made[:, ::2][:, 200:-200], abs=1e-3)


async def test_a_new_attempt_begins_again_and_says_so(worker, engine, place):
    hand_out(engine, "rain", music(2), seconds=1)
    crash, let_go = anyio.Event(), engine.hold("second")
    is_first = True

    async def act(what):
        nonlocal is_first
        if is_first:
            is_first = False
            await crash.wait()
            raise EngineCrashedError("the process died")
        await let_go.wait()

    engine._act = act
    generation = await add("rain")
    parts = []
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            async for part in watch_audio(generation, artifacts=place):
                parts.append(part)
                (let_go if part.attempt == 2 else crash).set()
    assert [(part.attempt, part.start) for part in parts] == [(1, 0), (2, 0), (2, RATE)]
    assert parts_in(place) == []


async def test_a_listener_is_told_if_the_generation_is_cancelled(worker, engine, place):
    hand_out(engine, "rain", music(2), seconds=1)
    engine.hold("rain")
    generation = await add("rain")
    async with at_work(worker):
        with anyio.fail_after(PATIENCE):
            parts = watch_audio(generation, artifacts=place)
            await anext(parts)
            await cancel_generation(generation)
            with pytest.raises(NoAudioError, match="is cancelled"):
                await anext(parts)
    assert parts_in(place) == []


async def test_a_worker_that_stops_leaves_no_preview(worker, engine, place):
    hand_out(engine, "rain", music(2), seconds=1)
    engine.hold("rain")
    generation = await add("rain")
    async with at_work(worker), aclosing(watch_audio(generation, artifacts=place)) as parts:
        with anyio.fail_after(PATIENCE):
            await anext(parts)
            assert len(parts_in(place)) == 1
    assert parts_in(place) == []


async def test_a_preview_that_cannot_be_stored_costs_no_generation(
    worker, engine, place, monkeypatch
):
    async def refuse(*_):
        raise ArtifactError("The disk is full.")

    monkeypatch.setattr(place, "publish_preview", refuse)
    hand_out(engine, "rain", music(2), seconds=1)
    generation = await add("rain")
    await worker.run(drain=True)
    parts = [part async for part in watch_audio(generation, artifacts=place)]
    assert [part.start for part in parts] == [0]


async def test_a_preview_that_cannot_be_stored_keeps_no_audio(place, monkeypatch):
    async def refuse(*_):
        raise ArtifactError("The disk is full.")

    monkeypatch.setattr(place, "publish_preview", refuse)
    preview = Preview(place, Lease("rain", 1), sample_rate=RATE, channels=1)
    preview.hear(Audio(music(1), RATE), 0)
    await preview.publish()
    preview.hear(Audio(music(1), RATE), RATE)
    assert preview._waiting == []


async def test_audio_that_an_engine_makes_again_is_heard_once(worker, engine, place):
    made = music(2)
    hand_out(engine, "rain", made, seconds=1)
    engine.parts["rain"] += engine.parts["rain"]
    let_go = engine.hold("rain")
    generation = await add("rain")
    parts = await hear_all(worker, place, generation, let_go)
    assert samples_of(parts) == pytest.approx(made, abs=3e-4)


async def test_twenty_generations_are_heard_and_none_leaves_a_preview(worker, engine, place):
    prompts = [f"rain {number}" for number in range(20)]
    for prompt in prompts:
        hand_out(engine, prompt, music(2), seconds=1)
    for prompt in prompts[:5]:
        engine.script[prompt] = [EngineCrashedError("the process died"), None]
    for prompt in prompts[5:8]:
        engine.hold(prompt)
    generations = [await add(prompt) for prompt in prompts]
    ends = {}

    async def listen(generation, is_cancelled):
        try:
            if is_cancelled:
                await engine.started[prompts[generations.index(generation)]].wait()
                await cancel_generation(generation)
            parts = [part async for part in watch_audio(generation, artifacts=place)]
            ends[generation] = samples_of([p for p in parts if p.attempt == parts[-1].attempt])
        except NoAudioError as error:
            ends[generation] = error

    with anyio.fail_after(PATIENCE):
        async with at_work(worker), anyio.create_task_group() as tasks:
            for number, generation in enumerate(generations):
                tasks.start_soon(listen, generation, 5 <= number < 8)
    whole = [each for each in ends.values() if not isinstance(each, NoAudioError)]
    assert [each.shape for each in whole] == [(1, 2 * RATE)] * 17
    assert parts_in(place) == []


@pytest.mark.usefixtures("default_database")
async def test_a_generation_that_does_not_exist_is_refused(place):
    with pytest.raises(GenerationNotFoundError):
        await anext(watch_audio("nothing", artifacts=place))
