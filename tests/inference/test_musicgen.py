from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib
import json
import logging
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from dgx_music.audio.samples import Audio
from dgx_music.catalog import MODELS, UNTRAINED_NOTICE
from dgx_music.errors import EngineError, EngineUnavailableError, GenerationCancelledError
from dgx_music.inference import checkpoint
from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.musicgen import engine as musicgen
from dgx_music.inference.musicgen import weights
from dgx_music.inference.musicgen.batch import Row
from dgx_music.inference.musicgen.codec import Codec
from dgx_music.inference.musicgen.engine import MusicGenEngine
from dgx_music.inference.musicgen.tiny import build_tiny
from dgx_music.inference.process import EngineProcess
from dgx_music.sampling import Sampling
from tests.inference.factories import ignore
from tests.patience import PATIENCE
from tests.test_sampling import GIVEN

TINY = "musicgen-tiny-untrained"
COMMIT = MODELS["musicgen-small"].revision


@dataclass
class FakeRun:
    cancel_at: int | None = None
    progress: list[float] = field(default_factory=list)
    parts: list[tuple[int, Any]] = field(default_factory=list)
    freed_at: int | None = None

    def report_progress(self, progress: float) -> None:
        self.progress.append(progress)

    def check_cancelled(self) -> None:
        if self.cancel_at is not None and len(self.progress) >= self.cancel_at:
            raise GenerationCancelledError("cancelled")

    def free_slot(self) -> None:
        self.freed_at = len(self.progress)

    def hand_out(self, audio: Audio, start: int) -> None:
        self.parts.append((start, audio.samples))

    def make_room(self) -> bool:
        return False


def load(model: str | Path = TINY, **settings: Any) -> MusicGenEngine:
    fields = {
        "engine": "musicgen",
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "slots": 1,
        **settings,
    }
    return musicgen.load(EngineSettings(**fields))


def generate(engine: MusicGenEngine, run: FakeRun | None = None, **fields: Any) -> Audio:
    asked = {
        "generation_id": "g",
        "prompt": "lo-fi piano",
        "duration": 0.2,
        "model": TINY,
        "seed": 7,
        **fields,
    }
    return engine.generate(GenerationRequest(**asked), run or FakeRun())


@pytest.fixture(scope="session")
def mono() -> MusicGenEngine:
    return load()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The toy model as folders on disk, by its number of channels."""
    root = tmp_path_factory.mktemp("models")
    for channels in (1, 2):
        for part in build_tiny(channels):
            part.save_pretrained(root / str(channels))
    return {channels: root / str(channels) for channels in (1, 2)}


@pytest.fixture(scope="session")
def stereo(folders: dict[int, Path]) -> MusicGenEngine:
    return load(folders[2])


@pytest.fixture
def folder(folders: dict[int, Path], tmp_path: Path) -> Path:
    """A copy of the mono model's folder to damage."""
    for file in folders[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache on a machine that is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("duration", [0.08, 0.1, 1.0, 1.23])
@pytest.mark.parametrize(("name", "channels"), [("mono", 1), ("stereo", 2)])
def test_audio_is_exactly_as_long_as_asked(
    name: str, channels: int, duration: float, request: pytest.FixtureRequest
) -> None:
    audio = generate(request.getfixturevalue(name), duration=duration)
    assert audio.samples.shape == (channels, round(duration * 32_000))
    assert audio.samples.dtype == np.float32


@pytest.mark.parametrize("channels", [1, 2])
def test_transformers_turns_n_tokens_into_n_minus_3_frames(channels: int) -> None:
    model, tokenizer = build_tiny(channels)
    audio = model.generate(
        **tokenizer("lo-fi piano", return_tensors="pt"), do_sample=False, max_new_tokens=13
    )
    assert audio.shape == (1, channels, 10 * 640)


@pytest.mark.parametrize("name", ["mono", "stereo"])
def test_untrained_audio_is_audible_noise(name: str, request: pytest.FixtureRequest) -> None:
    samples = generate(request.getfixturevalue(name), duration=1.0).samples
    power = np.abs(np.fft.rfft(samples[0])) ** 2  # one bin for each Hz
    assert 0.05 < samples.std() < 0.2
    assert 0.2 < np.abs(samples).max() < 1
    assert power[0] < 1e-3 * power.mean()
    assert power.max() < 0.05 * power.sum()


def test_a_seed_gives_the_same_audio_whatever_ran_before(mono: MusicGenEngine) -> None:
    first = generate(mono, seed=1)
    generate(mono, seed=2, duration=0.5)
    assert np.array_equal(generate(mono, seed=1).samples, first.samples)


def test_without_a_seed_the_audio_follows_from_the_id(mono: MusicGenEngine) -> None:
    ids = ("a", "a", "b")
    a, again, b = (generate(mono, seed=None, generation_id=name).samples for name in ids)
    assert np.array_equal(a, again)
    assert not np.array_equal(a, b)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"prompt": "heavy metal"},
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.5},
        {"temperature": 0.9},
        {"top_k": 50},
        {"top_p": 0.5},
    ],
    ids=str,
)
def test_every_option_reaches_the_model(mono: MusicGenEngine, change: dict[str, Any]) -> None:
    assert not np.array_equal(generate(mono, **change).samples, generate(mono).samples)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(GIVEN, GIVEN), ({"prompt": "", "guidance_scale": 4.0}, {"guidance_scale": 1.0})],
    ids=str,
)
def test_a_row_has_each_sampling_field_of_its_request(
    mono: MusicGenEngine,
    asked: dict[str, Any],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[Row] = []
    decode = mono._loop.decode
    monkeypatch.setattr(
        mono._loop, "decode", lambda row, *rest: rows.append(row) or decode(row, *rest)
    )
    generate(mono, **{"seed": 7, **asked})
    assert [row.sampling for row in rows] == [Sampling(**{"seed": 7, **expected})]


def test_top_k_0_takes_all_tokens(mono: MusicGenEngine) -> None:
    all_tokens, largest, default = (
        generate(mono, top_k=k, temperature=5).samples for k in (0, 2_048, 250)
    )
    assert np.array_equal(all_tokens, largest)
    assert not np.array_equal(all_tokens, default)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_audio_is_that_of_a_plain_call(
    channels: int, guidance_scale: float, request: pytest.FixtureRequest
) -> None:
    model, tokenizer = build_tiny(channels)
    config = GenerationConfig(
        do_sample=False,
        guidance_scale=guidance_scale,
        max_new_tokens=13,
        decoder_start_token_id=2048,
    )
    plain = model.generate(
        **tokenizer("lo-fi piano", return_tensors="pt"), generation_config=config
    )
    engine = request.getfixturevalue("mono" if channels == 1 else "stereo")
    audio = generate(engine, temperature=0, guidance_scale=guidance_scale)
    assert np.array_equal(audio.samples, plain[0].numpy())


def test_greedy_ignores_the_seed(mono: MusicGenEngine) -> None:
    assert np.array_equal(
        generate(mono, temperature=0, seed=1).samples, generate(mono, temperature=0, seed=2).samples
    )


@pytest.mark.parametrize(
    "cold", [{"top_k": 1}, {"temperature": 1e-5}, {"temperature": 1e-300}], ids=str
)
def test_the_coldest_sampling_is_greedy(mono: MusicGenEngine, cold: dict[str, Any]) -> None:
    assert np.array_equal(generate(mono, **cold).samples, generate(mono, temperature=0).samples)


def test_progress_rises_at_every_step_and_ends_at_1(mono: MusicGenEngine) -> None:
    run = FakeRun()
    generate(mono, run, duration=0.2)
    assert run.progress == pytest.approx([step / 14 for step in range(1, 15)])
    assert run.progress[-1] == 1


@pytest.mark.parametrize("step", [0, 5])
def test_a_cancel_stops_at_the_next_step_and_spares_the_next_generation(
    mono: MusicGenEngine, step: int
) -> None:
    before = generate(mono)
    run = FakeRun(cancel_at=step)
    with pytest.raises(GenerationCancelledError):
        generate(mono, run, duration=30)
    assert len(run.progress) == step
    assert np.array_equal(generate(mono).samples, before.samples)


def test_generations_in_slots_have_the_audio_they_have_alone(mono: MusicGenEngine) -> None:
    engine = load(slots=3)
    wanted = [
        {"prompt": f"song {n}", "duration": 0.2 + 0.1 * n, "seed": n, "guidance_scale": 1 + n % 3}
        for n in range(6)
    ]
    with ThreadPoolExecutor(engine.slots) as pool:
        together = list(pool.map(lambda fields: generate(engine, **fields), wanted))
    assert engine.slots == 3
    for fields, audio in zip(wanted, together, strict=True):
        assert np.array_equal(audio.samples, generate(mono, **fields).samples)


def test_a_text_that_cannot_be_read_fails_alone(
    mono: MusicGenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(mono)
    with monkeypatch.context() as patch:
        patch.setattr(
            mono._conditioner._text_encoder, "forward", Mock(side_effect=RuntimeError("no text"))
        )
        with pytest.raises(RuntimeError, match="no text"):
            generate(mono)
    assert np.array_equal(generate(mono).samples, expected.samples)


def test_the_codecs_thread_does_as_many_windows_together_as_the_codec_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Codec, "most_together", 3)
    assert load()._codec_thread._most_together == 3


def test_a_cancelled_generation_does_not_wait_for_its_audio() -> None:
    class LateCancelRun(FakeRun):
        def check_cancelled(self) -> None:
            if self.progress and threading.current_thread().name != "decoding":
                raise GenerationCancelledError("cancelled")

    engine, is_over, run = load(), threading.Event(), LateCancelRun()
    engine._codec_thread.start(Mock(left=0, step=lambda: [is_over.wait(20)]))
    with pytest.raises(GenerationCancelledError):
        generate(engine, run)
    assert len(run.progress) == 13
    is_over.set()


async def test_the_slots_of_the_process_are_those_of_the_settings() -> None:
    settings = EngineSettings(engine="musicgen", model=TINY, device="cpu", slots=2)
    requests = [
        GenerationRequest(generation_id=str(n), prompt="choir", duration=0.2, model=TINY)
        for n in range(3)
    ]
    async with EngineProcess(settings) as process:
        assert (await process.start()).slots == 2
        clips = await asyncio.gather(*(process.generate(request, ignore) for request in requests))
    assert [clip.samples.shape for clip in clips] == [(1, 6_400)] * 3


async def test_parts_of_the_audio_arrive_from_the_engines_process_before_the_whole() -> None:
    parts: list[tuple[int, Audio]] = []
    settings = EngineSettings(engine="musicgen", model=TINY, device="cpu", dtype="float32", slots=1)
    request = GenerationRequest(generation_id="g", prompt="rain", duration=1.5, model=TINY)
    async with EngineProcess(settings) as process:
        await process.start()
        whole = await process.generate(
            request, ignore, on_part=lambda audio, start: parts.append((start, audio))
        )
    assert parts[0][0] == 0
    heard = np.concatenate([audio.samples for _, audio in parts], axis=1)
    assert np.array_equal(heard, whole.samples)


def test_facts_tell_how_the_audio_was_made(mono: MusicGenEngine) -> None:
    facts = dict(generate(mono, seed=7).facts)
    assert facts.pop("device_seconds") > 0
    assert facts.pop("kernels") in ("c", "torch")
    assert facts == {
        "engine": "musicgen",
        "seed": 7,
        "device": "cpu",
        "dtype": "float32",
        "is_untrained": True,
    }


def test_the_untrained_model_says_so(mono: MusicGenEngine) -> None:
    assert (mono.notice, mono.model_version, mono.device, mono.slots) == (
        UNTRAINED_NOTICE,
        "untrained",
        "cpu",
        1,
    )


def test_another_process_makes_the_same_audio_and_prints_nothing(
    mono: MusicGenEngine, folders: dict[int, Path]
) -> None:
    code = """
import hashlib, sys; from tests.inference.test_musicgen import generate, load
for model in sys.argv[1:]: print(hashlib.sha256(generate(load(model)).samples.tobytes()).hexdigest())"""
    command = [sys.executable, "-W", "error", "-c", code, TINY, str(folders[1])]
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout.split() == 2 * [
        hashlib.sha256(generate(mono).samples.tobytes()).hexdigest()
    ]
    assert other.stderr == ""


def test_building_the_untrained_model_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_tiny()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_only_the_language_model_is_in_16_bit(folders: dict[int, Path], dtype: str) -> None:
    engine = load(folders[1], dtype=dtype)
    audio = generate(engine)
    assert np.isfinite(audio.samples).all()
    assert audio.facts["dtype"] == dtype
    assert {engine._conditioner._text_encoder.dtype, engine._codec._model.dtype} == {torch.float32}


def test_the_untrained_model_can_be_in_16_bit() -> None:
    assert generate(load(dtype="bfloat16")).facts["dtype"] == "bfloat16"


def test_a_local_folder_gives_the_audio_of_the_model_saved_there(
    mono: MusicGenEngine, folders: dict[int, Path]
) -> None:
    engine = load(folders[1])
    audio = generate(engine)
    assert np.array_equal(audio.samples, generate(mono).samples)
    assert (engine.model_version, engine.notice, audio.facts["is_untrained"]) == (
        "local",
        None,
        False,
    )


def test_a_local_folder_sets_its_own_sample_rate(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["audio_encoder"] |= {"sampling_rate": 16_000, "target_bandwidths": [1.1]}
    (folder / "config.json").write_text(json.dumps(config))
    run = FakeRun()
    audio = generate(load(folder), run, duration=0.08)  # 2 frames at 25 Hz, delayed by up to 3
    assert (audio.sample_rate, audio.samples.shape) == (16_000, (1, 1_280))
    assert len(run.progress) == 2 + 3 + 1


def test_a_local_folders_own_generation_options_do_not_leak_in(
    mono: MusicGenEngine, folder: Path
) -> None:
    GenerationConfig(
        max_length=20, repetition_penalty=5.0, do_sample=True, top_k=3
    ).save_pretrained(folder)
    assert np.array_equal(generate(load(folder)).samples, generate(mono).samples)


def _drop_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.lm_heads.1.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "holds none of model.safetensors, ",
        ),
        (_drop_a_weight, "lack decoder.lm_heads.1.weight"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"junk" * 99), "header"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer has no vocabulary"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "not that of a MusicGen model",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    folder: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    damage(folder)
    with pytest.raises(EngineUnavailableError, match=complaint) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="absent"):
        load(tmp_path / "absent")


@pytest.mark.usefixtures("hub_cache")
def test_an_absent_model_offline_is_refused_with_the_remedies() -> None:
    with pytest.raises(EngineUnavailableError) as caught:
        load("musicgen-small")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("facebook/musicgen-small", COMMIT, "internet", "DGX_MUSIC_MODEL", TINY):
        assert part in message


def test_a_cached_model_is_loaded_offline_at_its_pinned_commit(
    folders: dict[int, Path], hub_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = hub_cache / "models--facebook--musicgen-small" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / COMMIT).symlink_to(folders[1])
    engine = load("musicgen-small")
    assert engine.model_version == COMMIT
    assert "CC-BY-NC 4.0" in (engine.notice or "")
    assert caplog.text == ""


def test_the_licence_is_shown_before_the_first_download(
    folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def download(_repository: str, *, local_files_only: bool = False, **_options: Any) -> str:
        if local_files_only:
            raise FileNotFoundError
        assert "CC-BY-NC 4.0" in caplog.text
        return str(folders[1])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(checkpoint, "list_files", lambda *_asked: ["model.safetensors"])
    with caplog.at_level(logging.WARNING):
        assert load("musicgen-medium").model_version == folders[1].name


def test_a_revision_that_is_set_replaces_the_pinned_one(
    folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda _name, *, revision, **_options: asked.append(revision) or folders[1],
    )
    load("musicgen-small", revision="refs/pr/7")
    assert asked == ["refs/pr/7"]


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(EngineUnavailableError, match="neither in the catalogue"):
        load("musicgen-huge")


def test_a_closed_engine_holds_nothing() -> None:
    engine = load()
    decoder = weakref.ref(engine._decoder)
    generate(engine)
    engine.close()
    gc.collect()
    assert decoder() is None


@pytest.mark.usefixtures("hub_cache")
def test_what_an_engine_will_take_is_known_where_its_weights_are_here(
    folders: dict[int, Path],
) -> None:
    size = (folders[1] / "model.safetensors").stat().st_size
    assert musicgen.estimate_bytes(EngineSettings(engine="musicgen", model=str(folders[1]))) == size
    assert (
        musicgen.estimate_bytes(EngineSettings(engine="musicgen", model="musicgen-small")) is None
    )
    assert musicgen.estimate_bytes(EngineSettings(engine="musicgen", model=TINY)) is None


def test_an_engine_says_what_it_holds(mono: MusicGenEngine) -> None:
    model, _ = build_tiny()
    weights = sum(weight.nbytes for weight in model.parameters())
    # positions are in it as well
    assert weights < mono.memory_bytes - mono._decoder.slot_bytes < 1.3 * weights


@pytest.mark.parametrize(
    "weight", ["decoder.lm_heads.0.weight", "audio_encoder.decoder.layers.0.conv.bias"]
)
def test_numbers_that_are_not_finite_are_an_error(
    folder: Path, weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_is_finite", lambda _weight: True)
    tensors = load_file(folder / "model.safetensors")
    tensors[weight].fill_(torch.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    engine = load(folder)
    with pytest.raises(EngineError, match="not finite"):
        generate(engine)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "dgx_music.inference.musicgen.engine")
    with pytest.raises(EngineUnavailableError, match=r"pip install '\.\[musicgen\]'"):
        importlib.import_module("dgx_music.inference.musicgen.engine")


@pytest.mark.parametrize("duration", [0.5, 2.0, 2.5])
@pytest.mark.parametrize("name", ["mono", "stereo"])
def test_the_parts_that_are_handed_out_are_the_audio(
    name: str, duration: float, request: pytest.FixtureRequest
) -> None:
    run = FakeRun()
    audio = generate(request.getfixturevalue(name), run, duration=duration)
    lengths = [samples.shape[1] for _, samples in run.parts]
    assert [start for start, _ in run.parts] == [sum(lengths[:n]) for n in range(len(lengths))]
    assert np.array_equal(np.concatenate([samples for _, samples in run.parts], 1), audio.samples)


def test_the_first_second_is_handed_out_while_the_rest_is_decoded(mono: MusicGenEngine) -> None:
    class Listener(FakeRun):
        def hand_out(self, audio: Audio, start: int) -> None:
            super().hand_out(audio, start)
            is_heard.set()

        def report_progress(self, progress: float) -> None:
            super().report_progress(progress)
            if 0.4 < progress < 0.5:  # two seconds of five
                assert is_heard.wait(PATIENCE)

    is_heard = threading.Event()
    generate(mono, Listener(), duration=5.0)


def test_a_clip_is_handed_out_from_its_beginning_over_the_edges_of_windows(
    mono: MusicGenEngine,
) -> None:
    clip = Audio(np.full((1, 40_000), 0.1, dtype=np.float32), 32_000)
    run = FakeRun()
    audio = generate(mono, run, duration=32.0, continuation=clip, guidance_scale=1.0)
    assert np.array_equal(np.concatenate([samples for _, samples in run.parts], 1), audio.samples)
    assert len(run.parts) == 32
