"""What a GPU's launcher records, launches and waits for; torch's part of it is imitated."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from dgx_music.inference.musicgen import launches
from dgx_music.inference.musicgen.launches import GraphLauncher, Plan, Span, borrow_stream
from dgx_music.inference.trouble import RECORDING

PLAN = Plan(2, 2, 1, (Span(0, 2, 128, True),), (Span(0, 2, 32, True),), 256, steps=3)
OTHER = PLAN._replace(rows=1)


class FakeGpu:
    """Notes what a launcher does, in order; ``capture`` is called while something is recorded."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.capture: Callable[[], object] = lambda: None
        self.is_recording = False

    def advance(self, plan: Plan) -> None:
        assert plan.steps == 1
        if self.is_recording:
            self.capture()
        self.done.append("recorded" if self.is_recording else "as it is")

    def take(self) -> list[str]:
        done, self.done = self.done, []
        return done

    # torch's

    def make_graph(self) -> Any:
        return FakeGraph(self)

    def make_event(self, **options: Any) -> Any:
        return FakeEvent(self, **options)

    def synchronize(self) -> None:
        self.done.append("waited for all")


class FakeGraph:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu

    def capture_begin(self, **_options: Any) -> None:
        self._gpu.is_recording = True

    def capture_end(self) -> None:
        self._gpu.is_recording = False

    def replay(self) -> None:
        self._gpu.done.append("replayed")


class FakeEvent:
    def __init__(self, gpu: FakeGpu, blocking: bool) -> None:
        assert blocking  # else a host that waits keeps a core busy
        self._gpu = gpu

    def record(self, _stream: object) -> None:
        pass

    def synchronize(self) -> None:
        self._gpu.done.append("waited for one")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", gpu.make_graph)
    monkeypatch.setattr(torch.cuda, "Event", gpu.make_event)
    return gpu


@pytest.fixture
def launcher(gpu: FakeGpu) -> GraphLauncher:
    return GraphLauncher(gpu.advance, gpu)  # type: ignore[arg-type]


def test_a_plan_is_made_as_it_is_then_recorded_then_replayed(
    launcher: GraphLauncher, gpu: FakeGpu
) -> None:
    launcher.launch(PLAN)
    assert gpu.take() == ["as it is", "recorded", "replayed", "replayed"]
    launcher.launch(PLAN)
    assert gpu.take() == ["replayed"] * 3
    launcher.launch(OTHER)
    assert gpu.take()[1] == "as it is"


def test_a_plan_that_was_recorded_in_advance_is_only_replayed(
    launcher: GraphLauncher, gpu: FakeGpu
) -> None:
    launcher.record(PLAN)
    assert gpu.take() == ["as it is", "recorded", "replayed", "waited for all"]
    launcher.record(PLAN._replace(steps=8))
    launcher.launch(PLAN)
    assert gpu.take() == ["replayed"] * 3


def test_what_was_recorded_is_forgotten_when_addresses_change(
    launcher: GraphLauncher, gpu: FakeGpu
) -> None:
    launcher.record(PLAN)
    launcher.forget()
    gpu.take()
    launcher.launch(PLAN)
    assert gpu.take()[:2] == ["as it is", "recorded"]


def test_two_launches_are_under_way_at_most(launcher: GraphLauncher, gpu: FakeGpu) -> None:
    launcher.launch(PLAN)
    launcher.launch(PLAN)
    assert "waited for one" not in gpu.take()
    launcher.launch(PLAN)
    assert gpu.take() == ["waited for one", *["replayed"] * 3]


def test_nothing_else_is_recorded_meanwhile_and_no_memory_is_given_back(
    launcher: GraphLauncher, gpu: FakeGpu
) -> None:
    with ThreadPoolExecutor(1) as other_thread:

        def try_to_record() -> bool:
            has_lock = RECORDING.acquire(blocking=False)
            if has_lock:
                RECORDING.release()
            return has_lock

        free: list[bool] = []
        gpu.capture = lambda: free.append(other_thread.submit(try_to_record).result())
        launcher.record(PLAN)
        assert free == [False]
        assert other_thread.submit(try_to_record).result()


def test_a_plan_that_cannot_be_recorded_is_made_as_it_is(
    launcher: GraphLauncher, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    gpu.capture = refuse
    launcher.launch(PLAN)
    launcher.launch(PLAN)
    assert gpu.take() == ["as it is"] * 6
    assert caplog.text.count("no CUDA graph") == 1
    launcher.launch(OTHER)  # another one is tried
    assert caplog.text.count("no CUDA graph") == 2


@pytest.mark.parametrize("words", ["CUDA out of memory", "CUDA error: unspecified launch failure"])
def test_a_device_without_memory_or_lost_is_no_plan_without_a_recording(
    launcher: GraphLauncher, gpu: FakeGpu, words: str
) -> None:
    def fail() -> None:
        raise RuntimeError(words)

    gpu.capture = fail
    with pytest.raises(RuntimeError, match=words):
        launcher.record(PLAN)
    assert not gpu.is_recording


class Owner:
    """Somebody who borrows a stream."""


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The priorities of the streams that were made."""
    made: list[int] = []

    def make_stream(_device: torch.device, priority: int) -> object:
        made.append(priority)
        return object()

    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(launches, "_idle_streams", type(launches._idle_streams)(list))
    return made


def test_each_owner_has_a_stream_alone_and_leaves_it_to_the_next(streams: list[int]) -> None:
    cuda = torch.device("cuda")
    owners = [Owner() for _ in range(40)]  # torch itself has 32
    assert len({id(borrow_stream(owner, cuda)) for owner in owners}) == 40
    owners.clear()
    gc.collect()
    later = Owner(), Owner()
    assert borrow_stream(later[0], cuda) is not borrow_stream(later[1], cuda)
    assert streams == [0] * 40


def test_a_stream_of_another_priority_is_another_one(streams: list[int]) -> None:
    owner, cuda = Owner(), torch.device("cuda")
    assert borrow_stream(owner, cuda) is not borrow_stream(owner, cuda, priority=-1)
    assert streams == [0, -1]
    assert borrow_stream(owner, torch.device("cpu")) is None
