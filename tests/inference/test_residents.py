"""Engines side by side in one process, and which one gives way."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest

from dgx_music.errors import EngineReplacedError, EngineUnavailableError
from dgx_music.inference import residents as residents_module
from dgx_music.inference.engine import Engine, EngineSettings
from dgx_music.inference.residents import Residents, free_bytes
from tests.inference.factories import make_settings

SIZES = {"small": 2, "medium": 4, "large": 8}


class FakeWeights:
    """Bytes that refer to themselves, as a graph's do: only the garbage collector frees them."""

    def __init__(self, memory: FakeMemory, model: str, size: int) -> None:
        self.itself = self
        memory.held[key := (model, len(memory.loads))] = size
        weakref.finalize(self, memory.held.pop, key)


class FakeEngine:
    def __init__(self, memory: FakeMemory, model: str, slots: int) -> None:
        self.slots = slots
        self.memory_bytes = SIZES[model] + slots * memory.bytes_per_slot
        self._weights = FakeWeights(memory, model, self.memory_bytes)

    def close(self) -> None:
        del self._weights


class FakeMemory:
    """So many bytes, which engines fill until they are closed and collected.

    Loading an engine that does not fit fails as it does in torch.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes_per_slot = 0
        self.held: dict[tuple[str, int], int] = {}
        self.loads: list[str] = []
        self.unloaded: list[str] = []
        self.is_known = True
        self.estimates = dict(SIZES)

    @property
    def engines(self) -> list[str]:
        return [model for model, _ in self.held]

    def load(self, settings: EngineSettings) -> Engine:
        """Return an engine with as many slots as fit."""
        if settings.model == "missing":
            raise EngineUnavailableError("missing is not here.")
        self.loads.append(settings.model)
        free = self.size - sum(self.held.values()) - SIZES[settings.model]
        slots = settings.slots or 1
        if self.bytes_per_slot:
            slots = min(slots, free // self.bytes_per_slot)
        if free < 0 or slots < 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return FakeEngine(self, settings.model, slots)  # type: ignore[return-value]

    def estimate(self, settings: EngineSettings) -> int | None:
        return self.estimates.get(settings.model)

    def free(self) -> int | None:
        return self.size - sum(self.held.values()) if self.is_known else None


def make(size: int) -> tuple[Residents, FakeMemory]:
    memory = FakeMemory(size)
    return Residents(memory.load, memory.estimate, memory.free, memory.unloaded.append), memory


def load(residents: Residents, *models: str) -> None:
    for model in models:
        with residents.load(make_settings(model=model)):
            pass


def test_engines_stay_while_there_is_room() -> None:
    residents, memory = make(14)
    load(residents, "small", "medium", "large", "small")
    assert (memory.engines, memory.unloaded) == (["small", "medium", "large"], [])


def test_the_least_recently_used_gives_way_and_no_more_than_needed() -> None:
    residents, memory = make(12)
    load(residents, "small", "medium", "small")
    with residents.use("small"):
        pass
    load(residents, "large")
    assert (memory.engines, memory.unloaded) == (["small", "large"], ["medium"])


def test_an_engine_in_use_is_never_unloaded() -> None:
    residents, memory = make(11)
    load(residents, "medium", "small")
    with residents.use("medium"):
        with pytest.raises(
            EngineUnavailableError,
            match=r"The model large does not fit into memory \(RuntimeError: CUDA",
        ):
            load(residents, "large")
        assert memory.engines == ["medium"]
    load(residents, "large")
    assert memory.engines == ["large"]


def test_an_engine_that_loads_is_not_unloaded_before_its_block_ends() -> None:
    residents, _ = make(4)
    with residents.load(make_settings(model="small")):
        assert not residents.unload_idle()
    assert residents.unload_idle()


def test_where_free_memory_is_not_known_only_one_engine_stays() -> None:
    residents, memory = make(99)
    memory.is_known = False
    load(residents, "small", "medium")
    assert memory.engines == ["medium"]


def test_an_engine_of_unknown_size_is_taken_for_as_large_as_the_largest() -> None:
    residents, memory = make(7)
    memory.estimates.clear()
    load(residents, "medium", "small")
    assert (memory.engines, memory.unloaded) == (["small"], ["medium"])


def test_memory_that_runs_out_in_spite_of_the_estimate_unloads_idle_engines() -> None:
    residents, memory = make(8)
    load(residents, "medium")
    memory.estimates["large"] = 0
    load(residents, "large")
    assert memory.engines == ["large"]


def test_an_engine_that_cannot_be_loaded_leaves_the_others() -> None:
    residents, memory = make(99)
    load(residents, "small")
    memory.estimates["missing"] = 0
    with pytest.raises(EngineUnavailableError, match=r"missing is not here\."):
        load(residents, "missing")
    assert memory.engines == ["small"]


def test_idle_engines_give_way_before_one_makes_do_with_fewer_slots_than_were_asked_for() -> None:
    residents, memory = make(9)
    memory.bytes_per_slot = 1
    with (
        residents.load(make_settings(model="small", slots=2)),
        residents.load(make_settings(model="medium", slots=4)) as engine,
    ):
        assert engine.slots == 1  # what runs does not give way
    with residents.load(make_settings(model="small", slots=2)) as engine:
        residents.unload_idle()
    with residents.load(make_settings(model="medium", slots=4)) as engine:
        assert (engine.slots, memory.engines) == (4, ["medium"])


def test_a_load_that_finds_no_memory_holds_none_afterwards() -> None:
    residents, memory = make(9)
    load(residents, "small")

    def fail(settings: EngineSettings) -> Engine:
        weights = FakeWeights(memory, settings.model, 1)
        raise MemoryError(weights.itself is weights)

    residents._load = fail
    with pytest.raises(EngineUnavailableError):
        load(residents, "medium")
    assert memory.engines == []


def test_how_large_an_engine_was_is_remembered() -> None:
    residents, memory = make(11)
    memory.bytes_per_slot = 1
    for model in ("medium", "small", "medium"):
        with residents.load(make_settings(model=model, slots=4)) as engine:
            assert engine.slots == 4
    assert memory.loads == ["medium", "small", "small", "medium"]


def test_what_is_not_resident_cannot_be_used() -> None:
    residents, _ = make(99)
    load(residents, "small")
    residents.unload_idle()
    with pytest.raises(EngineReplacedError, match="small was unloaded"), residents.use("small"):
        pass


def test_an_engine_is_known_to_be_unloaded_only_when_nobody_can_get_it() -> None:
    residents, memory = make(99)
    load(residents, "small")
    seen: list[bool] = []
    residents._on_unload = lambda model: seen.append(model in residents._engines)
    assert residents.unload_idle()
    assert (seen, memory.engines) == ([False], [])


def test_the_hosts_free_memory_is_what_the_kernel_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:       8127452 kB\nMemFree:         513836 kB\nMemAvailable:    2000000 kB\n"
    )
    assert residents_module._free_host_bytes(meminfo) == 2_048_000_000
    assert residents_module._free_host_bytes(tmp_path / "nothing") is None
    assert (free_bytes("cpu") or 0) > 0


def test_the_device_that_engines_are_on_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    asked: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: asked.append(device) or (5, 9))
    assert [free_bytes(device) for device in ("auto", "cuda", "cuda:1")] == [5, 5, 5]
    assert asked == [None, None, "cuda:1"]
    assert free_bytes("cpu") != 5
