"""The decoding loop where memory runs out: fewer slots, and who pays for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.errors import EngineReplacedError
from dgx_music.inference.loop import DecodingLoop
from tests.inference.factories import QuietRun

STRIDE = 4
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAdvice for programmers.")


class FakeRow:
    """As much of a ``Row`` as the loop looks at."""

    def __init__(self, step_count: int = 8) -> None:
        self.step_count = step_count
        self.position = 0

    @property
    def is_done(self) -> bool:
        return self.position >= self.step_count


class Memory:
    """Room for so many slots, admitted rows and rows in a step; makes the slots that live in it."""

    def __init__(self, slots: int = 99, admitted: int = 99, stepped: int = 99) -> None:
        self.slots, self.admitted, self.stepped = slots, admitted, stepped
        self.made: list[int] = []

    def make_slots(self, slot_count: int) -> Any:
        if slot_count > self.slots:
            raise NO_MEMORY
        self.made.append(slot_count)
        return FakeSlots(slot_count, self)


class FakeSlots:
    """Advances every row by ``STRIDE`` positions at a time, past its end too, as a graph of several steps does."""

    def __init__(self, slot_count: int, memory: Memory) -> None:
        self.rows: list[FakeRow] = []
        self.slot_count = slot_count
        self._memory = memory

    @property
    def has_room(self) -> bool:
        return len(self.rows) < self.slot_count

    def admit(self, row: FakeRow) -> None:
        if len(self.rows) >= self._memory.admitted:
            raise NO_MEMORY
        self.rows.append(row)

    def step(self) -> None:
        if len(self.rows) > self._memory.stepped:
            raise NO_MEMORY
        for row in self.rows:
            row.position += STRIDE

    def codes(self, row: FakeRow) -> Tensor:
        return torch.zeros(1, row.step_count)

    def retire(self, row: FakeRow) -> None:
        self.rows.remove(row)


class HeldRun(QuietRun):
    """Waits, after its first steps, for the event."""

    def __init__(self, go_on: threading.Event) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self._go_on = go_on

    def report_progress(self, progress: float) -> None:
        super().report_progress(progress)
        self.has_begun.set()
        assert self._go_on.wait(20)


Decode = Callable[..., "Future[Tensor]"]


@pytest.fixture
def decode() -> Iterator[Decode]:
    """Decodes a row in a thread of its own."""
    with ThreadPoolExecutor(8) as pool:

        def submit(loop: DecodingLoop, run: QuietRun | None = None, step_count: int = 8) -> Future[Tensor]:
            row: Any = FakeRow(step_count)
            return pool.submit(loop.decode, row, run or QuietRun())

        yield submit


def make_loop(memory: Memory, slot_count: int = 8) -> tuple[DecodingLoop, list[int]]:
    told: list[int] = []
    return DecodingLoop(memory.make_slots, slot_count, told.append), told


def step_together(loop: DecodingLoop, decode: Decode, count: int) -> list[Future[Tensor]]:
    """Return the calls of so many rows that are in the slots at the same time."""
    go_on = threading.Event()
    first = HeldRun(go_on)
    calls = [decode(loop, first, step_count=40)]
    assert first.has_begun.wait(20)
    calls += [decode(loop) for _ in range(count - 1)]
    while len(loop._waiting) < count - 1:
        pass
    go_on.set()
    return calls


def test_progress_of_a_device_that_is_ahead_stays_within_one(decode: Decode) -> None:
    run = QuietRun()
    decode(make_loop(Memory())[0], run, step_count=2).result(20)
    assert run.progress == [1.0]


def test_slots_that_do_not_fit_are_halved_until_they_do() -> None:
    memory = Memory(slots=3)
    loop, told = make_loop(memory)
    assert (told, memory.made, loop.slot_count) == ([4, 2], [2], 2)


def test_not_one_slot_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        make_loop(Memory(slots=0))


def test_a_step_without_memory_gives_its_rows_back_and_goes_on_with_half_the_slots(decode: Decode) -> None:
    memory = Memory(stepped=2)
    loop, told = make_loop(memory)
    for call in step_together(loop, decode, 3):
        with pytest.raises(
            EngineReplacedError, match=r"at a time \(OutOfMemoryError: CUDA out of memory\. [^\n]*\)\.$"
        ):
            call.result(20)
    decode(loop).result(20)
    assert (told, memory.made) == ([4], [8, 4])


def test_a_row_that_does_not_fit_is_given_back_and_the_others_go_on(decode: Decode) -> None:
    memory = Memory(admitted=2)
    loop, told = make_loop(memory)
    first, second, third = step_together(loop, decode, 3)
    with pytest.raises(EngineReplacedError):
        third.result(20)
    assert first.result(20) is not None
    assert second.result(20) is not None
    decode(loop).result(20)
    assert (told, memory.made) == ([2], [8, 2])


def test_slots_that_have_become_too_many_are_emptied_before_fewer_are_made(decode: Decode) -> None:
    memory = Memory(admitted=2)
    loop, _ = make_loop(memory)
    calls = step_together(loop, decode, 4)
    assert sum(isinstance(call.exception(20), EngineReplacedError) for call in calls) == 1
    assert memory.made == [8, 2]


def test_a_first_row_that_does_not_fit_gets_the_room_of_some_slots(decode: Decode) -> None:
    memory = Memory()

    def make_slots(slot_count: int) -> Any:
        memory.admitted = 99 if slot_count <= 2 else 0
        return memory.make_slots(slot_count)

    loop = DecodingLoop(make_slots, 8, lambda count: None)
    decode(loop).result(20)
    assert (memory.made, loop.slot_count) == ([8, 4, 2], 2)


@pytest.mark.parametrize("memory", [Memory(stepped=0), Memory(admitted=0)])
def test_what_does_not_fit_in_the_last_slot_fails_by_itself(decode: Decode, memory: Memory) -> None:
    loop, told = make_loop(memory, slot_count=1)
    with pytest.raises(torch.OutOfMemoryError):
        decode(loop).result(20)
    memory.stepped = memory.admitted = 1
    decode(loop).result(20)
    assert (told, loop.slot_count) == ([], 1)


def test_idle_engines_give_way_before_slots_do(decode: Decode) -> None:
    memory = Memory(stepped=0)
    loop, told = make_loop(memory)
    with pytest.raises(EngineReplacedError):
        decode(loop, QuietRun(idle_engines=1)).result(20)
    memory.stepped, memory.admitted = 99, 0

    class RoomyRun(QuietRun):
        def make_room(self) -> bool:
            memory.admitted = 99
            return True

    decode(loop, RoomyRun()).result(20)
    assert (told, loop.slot_count) == ([], 8)


def test_the_hosts_memory_counts_as_well(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told = make_loop(Memory())
    broken = [MemoryError()]
    step = FakeSlots.step

    def steps(slots: FakeSlots) -> None:
        if broken:
            raise broken.pop()
        step(slots)

    monkeypatch.setattr(FakeSlots, "step", steps)
    with pytest.raises(EngineReplacedError):
        decode(loop).result(20)
    assert told == [4]


def test_a_device_that_is_lost_is_told_as_it_is(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(slots: FakeSlots) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(FakeSlots, "step", step)
    loop, told = make_loop(Memory())
    with pytest.raises(RuntimeError, match=r"^CUDA error: an illegal"):
        decode(loop).result(20)
    assert told == []


def test_slots_given_up_hold_no_memory(decode: Decode) -> None:
    memory = Memory(stepped=0)
    loop, _ = make_loop(memory, slot_count=1)
    error = decode(loop).exception(20)
    assert loop._slots is None
    frames = []
    trace = error.__traceback__ if error else None
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert not any(isinstance(value, FakeSlots) for frame in frames for value in frame.f_locals.values())
