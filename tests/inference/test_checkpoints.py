from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dgx_music.catalog import MODELS, find_model
from dgx_music.errors import EngineUnavailableError
from dgx_music.inference import checkpoint, integrity
from dgx_music.inference.engine import EngineSettings, GenerationRequest
from dgx_music.inference.musicgen import engine as musicgen
from dgx_music.inference.musicgen import inventory, weights
from dgx_music.inference.musicgen.live_clip import LiveClip
from dgx_music.inference.musicgen.tiny import build_tiny
from tests.inference.factories import QuietRun
from tests.inference.repositories import LAYOUTS, fill_cache, write_plainly, write_repository

SMALL = MODELS["musicgen-small"]
HUB_SOURCES = Path(checkpoint.__file__).parent


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache on a machine that is offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a repository's files, written once."""
    root = tmp_path_factory.mktemp("repositories")
    return lambda name: (
        root / name if (root / name).is_dir() else write_repository(name, root / name)
    )


Repositories = Callable[[str], Path]


@pytest.fixture
def folder(repositories: Repositories, tmp_path: Path) -> Path:
    """A copy of musicgen-medium's repository, which holds pickled weights only, to damage."""
    copy = tmp_path / "medium"
    copy.mkdir()
    for file in repositories("musicgen-medium").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def settings(model: str | Path, **fields: Any) -> EngineSettings:
    return EngineSettings(
        **{
            "engine": "musicgen",
            "model": str(model),
            "device": "cpu",
            "dtype": "float32",
            "slots": 1,
            "kernels": "off",
        }
        | fields
    )


def greedy_codes(model: str | Path, **fields: Any) -> Tensor:
    """Return the tokens of a prompt, decoded greedily."""
    engine: Any = musicgen.load(settings(model, **fields))
    try:
        asked = {
            "generation_id": "g",
            "prompt": "lo-fi piano",
            "duration": 0.2,
            "temperature": 0.0,
            "seed": 7,
        }
        live = LiveClip(engine._codec, engine._codec_thread, 10, 6_400, QuietRun())
        codes: Tensor = engine._decode(GenerationRequest(**asked), live, QuietRun())
        return codes
    finally:
        engine.close()


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_repository_loads_as_the_model_saved_plainly(
    name: str, repositories: Repositories, hub: Path, tmp_path: Path
) -> None:
    fill_cache(MODELS[name], repositories(name), hub)
    expected = greedy_codes(write_plainly(name, tmp_path / "plain"))
    assert len(expected.unique()) > 5
    assert torch.equal(greedy_codes(name), expected)
    assert torch.equal(greedy_codes(repositories(name)), expected)


@pytest.mark.parametrize(("name", "layout"), LAYOUTS.items())
def test_only_what_is_loaded_is_counted(
    name: str, layout: Any, repositories: Repositories, hub: Path
) -> None:
    snapshot = fill_cache(MODELS[name], repositories(name), hub)
    file, shards = layout.weights[0]
    stem, suffix = file.split(".")
    used = (
        [file]
        if shards == 1
        else [f"{stem}-{n:05}-of-{shards:05}.{suffix}" for n in range(1, shards + 1)]
    )
    size = sum((snapshot / each).stat().st_size for each in used)
    assert musicgen.estimate_bytes(settings(name)) == size
    assert inventory.has_weights(MODELS[name], None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_is_said_against_a_model_that_loads(
    name: str, repositories: Repositories, hub: Path, tmp_path: Path
) -> None:
    info = MODELS[name]
    fill_cache(info, repositories(name), hub)
    assert inventory.find_damage_of(info, None) is None
    assert checkpoint.find_damage(repositories(name)) is None
    assert checkpoint.find_damage(write_plainly(name, tmp_path / "plain")) is None


def test_nothing_is_said_against_the_toy_with_its_tokenizer_of_bytes(tmp_path: Path) -> None:
    for part in build_tiny():
        part.save_pretrained(tmp_path)
    assert checkpoint.find_damage(tmp_path) is None


def of_safetensors(header: object, rest: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


WHOLE = {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
DAMAGES: dict[str, tuple[str, bytes | None, str]] = {
    "config without a type": ("config.json", b"{}", "config.json is not that of a MusicGen model"),
    "config of another model": (
        "config.json",
        b'{"model_type": "t5"}',
        "config.json is not that of a MusicGen",
    ),
    "config that is a list": ("config.json", b"[]", "config.json holds no JSON object"),
    "config that is junk": ("config.json", b"\xff\0", "config.json holds no JSON object"),
    "no config": ("config.json", None, "config.json cannot be read (no such file or directory)"),
    "tokenizer that is junk": ("tokenizer.json", b"junk", "tokenizer.json holds no JSON object"),
    "safetensors that are junk": (
        "model.safetensors",
        b"junk" * 100,
        "model.safetensors is cut short",
    ),
    "no bytes": ("model.safetensors", b"", "model.safetensors is cut short"),
    "no tensors": (
        "model.safetensors",
        of_safetensors({}, b"1234"),
        "model.safetensors is cut short",
    ),
    "header cut short": (
        "model.safetensors",
        of_safetensors(WHOLE)[:-9],
        "model.safetensors is cut short",
    ),
    "tensors cut short": (
        "model.safetensors",
        of_safetensors(WHOLE, b"123"),
        "model.safetensors is cut short",
    ),
    "header that is a list": (
        "model.safetensors",
        of_safetensors([1], b"1234"),
        "model.safetensors is cut short",
    ),
    "pickle that is junk": ("pytorch_model.bin", b"junk" * 100, "pytorch_model.bin is cut short"),
    "zip cut short": ("pytorch_model.bin", b"PK\3\4" + bytes(99), "pytorch_model.bin is cut short"),
}


@pytest.mark.parametrize(("name", "content", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_what_damage_costs_nothing_to_see_is_seen(
    name: str, content: bytes | None, damage: str, folder: Path
) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    assert str(checkpoint.find_damage(folder)).startswith(damage)
    with pytest.raises(EngineUnavailableError):  # the worker's opinion
        musicgen.load(settings(folder))


def test_a_folder_without_a_tokenizer_is_damaged(folder: Path) -> None:
    for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    assert str(checkpoint.find_damage(folder)).startswith("it holds no tokenizer")


def test_a_tokenizer_without_its_vocabulary_is_damage(folder: Path) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        (folder / name).unlink(missing_ok=True)
    assert checkpoint.find_damage(folder) == "its tokenizer has no vocabulary"
    with pytest.raises(EngineUnavailableError, match="its tokenizer has no vocabulary"):
        musicgen.load(settings(folder))


def test_a_pickle_as_torch_once_wrote_it_is_no_damage(folder: Path) -> None:
    file = folder / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    assert checkpoint.find_damage(folder) is None


def test_every_model_of_the_hub_is_pinned_and_has_a_fixture() -> None:
    pinned = {name: info.revision for name, info in MODELS.items() if info.repository}
    assert pinned.keys() == LAYOUTS.keys()
    assert all(re.fullmatch("[0-9a-f]{40}", str(commit)) for commit in pinned.values())


def test_safetensors_are_loaded_where_both_are_there(repositories: Repositories) -> None:
    assert [file.name for file in checkpoint.find_weights(repositories("musicgen-small"))] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize(
    "name", ["config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"]
)
def test_a_cache_that_lacks_a_file_has_no_weights(
    name: str, repositories: Repositories, hub: Path
) -> None:
    info = MODELS["musicgen-stereo-large"]
    (fill_cache(info, repositories(info.name), hub) / name).unlink()
    assert not inventory.has_weights(info, None)
    assert musicgen.estimate_bytes(settings(info.name)) is None


def test_a_branch_in_the_cache_is_found_offline(repositories: Repositories, hub: Path) -> None:
    snapshot = fill_cache(SMALL, repositories(SMALL.name), hub)
    assert checkpoint.obtain(SMALL, "main") == snapshot


@pytest.mark.parametrize("names", [{"a": "../secret.bin"}, ["a"], {"a": 7}, None])
def test_an_index_that_names_no_files_beside_it_is_no_weights(names: object, folder: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder.parent / "secret.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert not inventory.holds_weights(folder)


# ------------------------------------------------------------------------------------------------- pickled weights


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"decoder.lm_heads.0.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(EngineUnavailableError, match="holds more than plain tensors"):
        greedy_codes(folder)
    assert not Path("evil").exists()


def _save_in_the_old_format(folder: Path) -> None:
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def test_torchs_old_format_is_read_too(folder: Path, repositories: Repositories) -> None:
    expected = greedy_codes(folder)
    _save_in_the_old_format(folder)
    assert torch.equal(greedy_codes(folder), expected)


def _cut(folder: Path) -> None:
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (_cut, "cut short, damaged, or"),
        (lambda folder: (_save_in_the_old_format(folder), _cut(folder)), "cut short, damaged, or"),
        (
            lambda folder: (folder / "pytorch_model.bin").write_bytes(b"junk" * 99),
            "cut short, damaged, or",
        ),
        (
            lambda folder: (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1})),
            "plain tensors",
        ),
        (
            lambda folder: torch.save({"best_state": {}}, folder / "pytorch_model.bin"),
            "no plain table of tensors",
        ),
        (
            lambda folder: torch.save([torch.zeros(1)], folder / "pytorch_model.bin"),
            "no plain table of tensors",
        ),
        (
            lambda folder: (folder / "pytorch_model.bin").rename(folder / "model.bin"),
            "holds none of model.safetensors",
        ),
    ],
)
def test_pickled_weights_that_cannot_be_read_are_refused(
    folder: Path, damage: Callable[[Path], object], complaint: str
) -> None:
    damage(folder)
    with pytest.raises(EngineUnavailableError, match=complaint) as caught:
        greedy_codes(folder)
    assert "\n" not in str(caught.value)


def test_a_model_of_code_in_its_folder_does_not_run_it(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "evil.py").write_text("import os\nos.mkdir('evil')\nclass Evil: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        auto = {
            "AutoConfig": "evil.Evil",
            "AutoModel": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        }
        (folder / name).write_text(json.dumps(content | {"auto_map": auto}))
    greedy_codes(folder)
    assert not Path("evil").exists()


def test_every_call_that_might_run_a_repositorys_code_says_that_it_may_not() -> None:
    calls = re.compile(r"(?:from_pretrained|from_config)\((?:[^()]|\([^()]*\))*\)")
    found = [call for file in HUB_SOURCES.rglob("*.py") for call in calls.findall(file.read_text())]
    assert len(found) >= 3
    assert [call for call in found if "trust_remote_code=False" not in call] == []
    loads = [
        line
        for file in HUB_SOURCES.rglob("*.py")
        for line in file.read_text().splitlines()
        if "torch.load(" in line
    ]
    assert loads
    assert all("weights_only=True" in line for line in loads)


# ------------------------------------------------------------------------------------------------- doubtful weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    for part in build_tiny():
        part.save_pretrained(root)
    return root


@pytest.fixture
def change(tiny: Path, tmp_path: Path) -> Callable[[dict[str, Tensor | None]], Path]:
    """Returns a copy of the toy's folder in which some weights are others, or are not there."""

    def write(changes: dict[str, Tensor | None]) -> Path:
        for file in tiny.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tiny / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return tmp_path

    return write


HEAD = "decoder.lm_heads.0.weight"
BIAS = "audio_encoder.decoder.layers.0.conv.bias"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"decoder.model.decoder.layers.2.fc1.weight": torch.zeros(2)},
            "no use for, decoder.model.decoder.layers.2.fc1",
        ),
        (
            {"text_encoder.encoder.block.9.layer.0.x": torch.zeros(2)},
            "no use for, text_encoder.encoder.block.9",
        ),
        (
            {"audio_encoder.decoder.layers.99.x": torch.zeros(2)},
            "no use for, audio_encoder.decoder.layers.99.x",
        ),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "no use for, a and 1 more"),
        ({HEAD: None}, f"lack {HEAD}"),
        (
            {HEAD: torch.zeros(128, 64)},
            rf"{HEAD} has the shape \[128, 64\] instead of \[2048, 64\]",
        ),
        ({BIAS: torch.zeros(3)}, rf"{BIAS} has the shape \[3\] instead of \[64\]"),
        ({HEAD: torch.full((2048, 64), torch.nan)}, f"{HEAD} holds NaN or infinite"),
        (
            {BIAS: torch.zeros(64).index_fill(0, torch.tensor(63), torch.inf)},
            f"{BIAS} holds NaN or infinite",
        ),
        (
            {BIAS: torch.zeros(64).index_fill(0, torch.tensor(7), -torch.inf)},
            f"{BIAS} holds NaN or infinite",
        ),
        (
            {"audio_encoder.quantizer.layers.1.codebook.embed": torch.full((2048, 32), torch.nan)},
            "codebook.embed holds",
        ),
        (
            {"text_encoder.encoder.embed_tokens.weight": torch.zeros(259, 32)},
            "which are one table, differ",
        ),
        ({HEAD: torch.ones(2048, 64, dtype=torch.int8)}, f"{HEAD} holds numbers of torch.int8"),
    ],
)
def test_a_doubtful_weight_is_refused_by_name(
    change: Any, changes: dict[str, Tensor | None], complaint: str
) -> None:
    with pytest.raises(EngineUnavailableError, match=complaint) as caught:
        weights.load_weights(find_model(str(change(changes))), None, torch.float32)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "above" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_that_is_infinite_in_16_bit_is_found_there(
    change: Any, dtype: torch.dtype
) -> None:
    info = find_model(str(change({HEAD: torch.full((2048, 64), 70_000.0)})))
    assert info is not None
    if dtype is torch.bfloat16:
        weights.load_weights(info, None, dtype)
    else:
        with pytest.raises(EngineUnavailableError, match=r"infinite numbers in torch\.float16"):
            weights.load_weights(info, None, dtype)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.model.decoder.embed_positions.weights",
        "decoder.model.decoder.embed_positions._float_tensor",
        "text_encoder.embeddings.position_ids",
        "text_encoder.decoder.block.0.layer.0.SelfAttention.q.weight",
    ],
)
def test_what_older_versions_stored_besides_does_no_harm(change: Any, name: str) -> None:
    assert weights.load_weights(
        find_model(str(change({name: torch.zeros(2)}))), None, torch.float32
    )  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- damaged downloads


def flip_a_bit(file: Path) -> None:
    """Change one bit, and leave the file's size and its time of change as they were."""
    found, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "spiece.model"]
)
def test_a_flipped_bit_in_a_downloaded_file_is_noticed(
    name: str, repositories: Repositories, hub: Path
) -> None:
    snapshot = fill_cache(SMALL, repositories(SMALL.name), hub)
    greedy_codes(SMALL.name)
    blob = (snapshot / name).resolve()
    flip_a_bit(blob)
    with pytest.raises(EngineUnavailableError, match=f"{blob} is damaged"):
        greedy_codes(SMALL.name)


def test_a_file_that_is_not_loaded_may_be_damaged(repositories: Repositories, hub: Path) -> None:
    snapshot = fill_cache(SMALL, repositories(SMALL.name), hub)
    before = greedy_codes(SMALL.name)
    flip_a_bit(snapshot / "pytorch_model.bin")
    assert torch.equal(greedy_codes(SMALL.name), before)


def test_a_file_is_read_once_and_believed_until_it_changes(
    repositories: Repositories, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = checkpoint.find_weights(fill_cache(SMALL, repositories(SMALL.name), hub))
    read: list[Path] = []
    monkeypatch.setattr(integrity, "_is_as_recorded", lambda blob: read.append(blob) or True)
    integrity.check_integrity(files)
    integrity.check_integrity(files)
    os.utime(files[0])
    integrity.check_integrity(files)
    assert read == [files[0].resolve()] * 2


@pytest.mark.parametrize("notes", ["{", "[]", '{"x": 1}'])
def test_notes_that_cannot_be_read_are_written_anew(
    notes: str, repositories: Repositories, hub: Path
) -> None:
    files = checkpoint.find_weights(fill_cache(SMALL, repositories(SMALL.name), hub))
    integrity._notes_file().write_text(notes)
    integrity.check_integrity(files)
    assert list(integrity._read_notes()) == [str(files[0].resolve())]
    assert [file.name for file in hub.parent.glob("dgx-music*")] == ["dgx-music-checked.json"]


def test_a_home_that_cannot_be_written_does_no_harm(
    repositories: Repositories,
    hub: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    files = checkpoint.find_weights(fill_cache(SMALL, repositories(SMALL.name), hub))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(hub / "absent"))
    with caplog.at_level(logging.WARNING):
        integrity.check_integrity(files)
    assert caplog.text == ""


def test_a_mirrors_plain_sha_1_is_a_record_too(repositories: Repositories, hub: Path) -> None:
    config = fill_cache(SMALL, repositories(SMALL.name), hub) / "config.json"
    plain = config.resolve().with_name(integrity._sha1(config.read_bytes()))
    config.resolve().rename(plain)
    integrity.check_integrity([plain])
