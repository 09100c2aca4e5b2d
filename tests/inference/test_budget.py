"""What an engine takes of the memory is known beforehand, and what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dgx_music.catalog import MAX_DURATION_SECONDS, MODELS
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference.engine import EngineSettings
from dgx_music.inference.musicgen import budget, devices, inventory
from dgx_music.inference.musicgen import engine as musicgen
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.budget import Budget, budget_of
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.shapes import published_config
from dgx_music.inference.musicgen.tiny import build_tiny, build_tiny_melody
from dgx_music.inference.residents import Residents
from dgx_music.sampling import Sampling
from tests.inference.test_musicgen import TINY, load

SETTINGS = EngineSettings(engine="musicgen", model=TINY, device="cpu")
MODELS_OF_TINY = {"mono": build_tiny, "stereo": lambda: build_tiny(2), "melody": build_tiny_melody}


@pytest.fixture(scope="module", params=MODELS_OF_TINY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for part in MODELS_OF_TINY[request.param]():
        part.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mono")
    for part in build_tiny():
        part.save_pretrained(root)
    return root


def with_free(patch: pytest.MonkeyPatch, free: int | None) -> None:
    patch.setattr(budget, "free_bytes", lambda _device: free)


@pytest.mark.parametrize("weights", ["full", "int8", "int4"])
def test_the_plan_is_what_the_engine_then_takes(
    folder: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether it tolerates 8 bits takes seconds to find out.
    monkeypatch.setattr(musicgen, "trial_requests", lambda *_, **__: [])
    monkeypatch.setattr(musicgen, "measure_change", lambda _, __, change: change() or 0.0)
    engine = load(folder, weights=weights)
    settings = EngineSettings(
        engine="musicgen",
        model=str(folder),
        device="cpu",
        dtype="float32",
        slots=1,
        weights=weights,
    )
    plan = inventory.plan_memory(settings)
    needs = engine._budget
    assert plan.weights_bytes == pytest.approx(needs.weights, rel=0.001)
    assert (plan.slot_bytes, plan.codec_bytes, plan.steps_bytes) == (
        needs.slot,
        needs.codec,
        needs.steps,
    )


@pytest.mark.parametrize(
    ("name", "weights", "cache"),
    [
        ("musicgen-small", 0.84, 0.30),
        ("musicgen-stereo-medium", 3.72, 0.89),
        ("musicgen-large", 6.53, 1.18),
        ("musicgen-melody", 2.77, 1.33),
    ],
)
def test_a_published_model_has_its_known_size(name: str, weights: float, cache: float) -> None:
    config = published_config(MODELS[name])
    plan = budget.plan(config, torch.bfloat16, SETTINGS, "cuda")
    text_encoder_and_codec = 0.666
    assert plan.weights / 1e9 == pytest.approx(weights + text_encoder_and_codec, rel=0.02)
    assert cache - 0.01 < plan.slot / 1e9 < cache + 0.1
    on_the_host = budget.plan(config, torch.bfloat16, SETTINGS, "cpu")
    seconds, channels, four_bytes = MAX_DURATION_SECONDS, config.decoder.audio_channels, 4
    assert on_the_host.slot - plan.slot == seconds * 32_000 * channels * four_bytes


@pytest.mark.parametrize(
    ("kind", "free", "models", "slots"),
    [
        ("cpu", 0, 1, 1),
        ("cpu", 100, 1, 3),
        ("cpu", 100, 3, 1),
        ("cpu", 10_000, 3, 8),
        ("cuda", 100, 1, 7),
        ("cuda", 10_000, 1, 64),
    ],
)
def test_auto_slots_are_as_many_as_fit_beside_the_work_into_a_share_of_the_memory(
    kind: str, free: int, models: int, slots: int
) -> None:
    needs = Budget(weights=1, slot=10, codec=1, steps=1)
    assert devices.slots_for(needs, kind, free, models) == slots


def test_one_slot_is_tried_if_nobody_knows_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, None)
    monkeypatch.setattr(devices, "free_bytes", lambda _device: None)
    assert load(slots=None).slots == 1


def test_slots_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = load()._budget
    with_free(monkeypatch, needs.work + 3 * needs.slot)
    assert load(slots=8).slots == 2


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    mono: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dgx_music.inference.musicgen.weights._read_tensors", lambda _files: pytest.fail("read")
    )
    with_free(monkeypatch, 1_000_000)
    residents = Residents(musicgen.load, lambda _settings: 1, lambda: 10**9, lambda _model: None)
    settings = EngineSettings(engine="musicgen", model=str(mono), device="cpu", slots=1)
    words = r"does not fit into memory .* needs 0\.\d\d GB of memory, and 0\.00 GB is free.*smaller"
    with pytest.raises(EngineUnavailableError, match=words), residents.load(settings):
        pass


def test_a_text_for_which_there_is_no_room_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(slots=2)
    slots = engine._loop._supply.get()
    text = torch.zeros(2, 2, 2, 300, 32)  # [L, 2, H, X, D]
    row = Row(
        uniforms=torch.rand(11, 4), frame_count=8, text=text, sampling=Sampling(guidance_scale=1.0)
    )
    with_free(monkeypatch, 1_000)
    with pytest.raises(MemoryError, match="room for a text of 320 tokens needs"):
        slots.admit(row)
    assert slots.rows == []
    with_free(monkeypatch, 10**9)
    slots.admit(row)
    assert slots.rows == [row]


def test_on_a_gpu_what_torch_holds_unused_is_free_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 100)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 20)
    assert budget.available_bytes(torch.device("cuda")) == 130
    assert budget.available_bytes(torch.device("cpu")) == 100


@pytest.mark.parametrize(
    ("kind", "channels", "windows"), [("cpu", 1, 1), ("cpu", 2, 1), ("cuda", 1, 8), ("cuda", 2, 16)]
)
def test_the_codec_may_do_as_many_windows_at_a_time_as_are_reserved(
    kind: str, channels: int, windows: int
) -> None:
    """On a GPU eight clips go together, with all their channels."""
    model, _ = build_tiny(channels)
    own = Decoder(model.decoder, model.enc_to_dec_proj, 10)
    config = model.config.audio_encoder
    one = 30 * config.sampling_rate * config.num_filters * 4
    assert budget_of(model, own, kind).codec == windows * one
