"""The decoding loop if memory runs out: fewer slots, and which rows lose their place."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.errors import EngineError, EngineReplacedError, GenerationCancelledError
from dgx_music.inference.musicgen.loop import DecodingLoop
from dgx_music.inference.trouble import has_lost_the_device
from tests.inference.factories import QuietRun
from tests.patience import PATIENCE

STRIDE = 4
NO_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB.\nAdvice for programmers."
)


class FakeRow:
    """The part of a ``Row`` that the loop uses."""

    def __init__(self, step_count: int = 8) -> None:
        self.step_count = self.frame_count = step_count
        self.position = 0

    @property
    def is_done(self) -> bool:
        return self.position >= self.step_count


class Memory:
    """Memory for so many slots, admitted rows and rows in a step; makes slots that use it."""

    def __init__(self, slots: int = 99, admitted: int = 99, stepped: int = 99) -> None:
        self.slots, self.admitted, self.stepped = slots, admitted, stepped
        self.made: list[int] = []
        self.closed: list[int] = []

    def make_slots(self, slot_count: int) -> Any:
        if slot_count > self.slots:
            raise NO_MEMORY
        self.made.append(slot_count)
        return FakeSlots(slot_count, self)


class FakeReading:
    """Codes that are there at once."""

    is_there = True

    def __init__(self, codes: list[Tensor]) -> None:
        self._codes = codes

    def codes(self) -> list[Tensor]:
        return self._codes


class FakeSlots:
    """Advances every row by ``STRIDE`` positions at a time, past its end too, as a GPU does."""

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

    def read(self, parts: Sequence[tuple[FakeRow, int, int]]) -> FakeReading:
        return FakeReading([torch.zeros(1, row.step_count) for row, _, _ in parts])

    def retire(self, row: FakeRow) -> None:
        self.rows.remove(row)

    def close(self) -> None:
        self._memory.closed.append(self.slot_count)


class HeldRun(QuietRun):
    """Waits, after its first steps, for the event."""

    def __init__(self, go_on: threading.Event) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self.go_on = go_on

    def report_progress(self, progress: float) -> None:
        super().report_progress(progress)
        self.has_begun.set()
        assert self.go_on.wait(PATIENCE)


Decode = Callable[..., "Future[Tensor]"]
Endless = Callable[[DecodingLoop], AbstractContextManager[HeldRun]]


@pytest.fixture
def decode() -> Iterator[Decode]:
    """Decodes a row in a thread of its own."""
    with ThreadPoolExecutor(8) as pool:

        def submit(
            loop: DecodingLoop, run: QuietRun | None = None, step_count: int = 8
        ) -> Future[Tensor]:
            row: Any = FakeRow(step_count)
            return pool.submit(loop.decode, row, run or QuietRun())

        yield submit


@pytest.fixture
def endless(decode: Decode) -> Endless:
    """Keeps a row in a slot for the block: it waits for its ``go_on``, and is cancelled at the end."""

    @contextmanager
    def hold(loop: DecodingLoop) -> Iterator[HeldRun]:
        run = HeldRun(threading.Event())
        call = decode(loop, run, step_count=10**9)
        assert run.has_begun.wait(PATIENCE)
        try:
            yield run
        finally:
            run.is_cancelled = True
            run.go_on.set()
        assert isinstance(call.exception(20), GenerationCancelledError)

    return hold


def make_loop(memory: Memory, slot_count: int = 8) -> DecodingLoop:
    return DecodingLoop(memory.make_slots, slot_count)


def step_together(loop: DecodingLoop, decode: Decode, count: int) -> list[Future[Tensor]]:
    """Return the calls of so many rows that are in the slots at the same time."""
    go_on = threading.Event()
    first = HeldRun(go_on)
    calls = [decode(loop, first, step_count=40)]
    assert first.has_begun.wait(PATIENCE)
    calls += [decode_next(loop, decode) for _ in range(count - 1)]
    go_on.set()
    return calls


def decode_next(loop: DecodingLoop, decode: Decode, run: QuietRun | None = None) -> Future[Tensor]:
    """Return the call of a row that waits last in the queue; the loop must stand still."""
    count = len(loop._waiting)
    call = decode(loop, run)
    while len(loop._waiting) == count:
        pass
    return call


def test_progress_of_a_device_that_is_ahead_stays_within_one(decode: Decode) -> None:
    run = QuietRun()
    decode(make_loop(Memory()), run, step_count=2).result(PATIENCE)
    assert run.progress == [1.0]


def test_slots_that_do_not_fit_are_halved_until_they_do() -> None:
    memory = Memory(slots=3)
    loop = make_loop(memory)
    assert (memory.made, loop.slot_count) == ([2], 2)


def test_no_room_for_a_single_slot_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        make_loop(Memory(slots=0))


def test_a_step_without_memory_gives_its_rows_back_and_goes_on_with_half_the_slots(
    decode: Decode,
) -> None:
    memory = Memory(stepped=2)
    loop = make_loop(memory)
    for call in step_together(loop, decode, 3):
        with pytest.raises(
            EngineReplacedError,
            match=r"at a time \(OutOfMemoryError: CUDA out of memory\. [^\n]*\)\.$",
        ):
            call.result(PATIENCE)
    decode(loop).result(PATIENCE)
    assert (memory.made, memory.closed, loop.slot_count) == ([8, 4], [8], 4)


def test_a_row_that_does_not_fit_is_given_back_and_the_others_go_on(decode: Decode) -> None:
    memory = Memory(admitted=2)
    loop = make_loop(memory)
    first, second, third = step_together(loop, decode, 3)
    with pytest.raises(EngineReplacedError):
        third.result(PATIENCE)
    assert first.result(PATIENCE) is not None
    assert second.result(PATIENCE) is not None
    decode(loop).result(PATIENCE)
    assert (memory.made, memory.closed, loop.slot_count) == ([8, 2], [8], 2)


def test_rows_that_wait_for_slots_that_are_gone_are_given_back(decode: Decode) -> None:
    memory = Memory(admitted=2)
    calls = step_together(make_loop(memory), decode, 5)
    errors = [call.exception(20) for call in calls]
    assert [type(error) for error in errors] == [type(None)] * 2 + [EngineReplacedError] * 3
    assert len(set(map(id, errors[2:]))) == 3


def test_rows_that_wait_for_a_step_without_memory_are_given_back_but_for_half_the_slots(
    decode: Decode,
) -> None:
    memory = Memory(stepped=3)
    calls = step_together(make_loop(memory, slot_count=4), decode, 8)
    errors = [call.exception(20) for call in calls]
    assert [type(error) for error in errors] == [EngineReplacedError] * 4 + [type(None)] * 2 + [
        EngineReplacedError
    ] * 2


def test_rows_that_wait_for_fresh_slots_are_given_back_but_for_as_many_as_fit(
    decode: Decode,
) -> None:
    memory = Memory(stepped=1)
    loop = make_loop(memory, slot_count=4)
    memory.slots = 1
    calls = step_together(loop, decode, 6)
    errors = [call.exception(20) for call in calls]
    assert [type(error) for error in errors] == [EngineReplacedError] * 4 + [type(None)] + [
        EngineReplacedError
    ]


def test_slots_that_have_become_too_many_go_on_being_used_until_they_are_empty(
    endless: Endless, decode: Decode
) -> None:
    memory = Memory(admitted=2)
    loop = make_loop(memory)
    with endless(loop) as long:
        second, third = decode_next(loop, decode), decode_next(loop, decode)
        long.go_on.set()
        assert isinstance(third.exception(5), EngineReplacedError)
        assert second.result(PATIENCE) is not None
        assert decode(loop).result(PATIENCE) is not None
        assert (memory.made, memory.closed) == ([8], [])
    decode(loop).result(PATIENCE)
    assert (memory.made, memory.closed) == ([8, 2], [8])


def test_a_row_that_is_cancelled_while_it_waits_does_not_wait_for_a_slot(
    endless: Endless, decode: Decode
) -> None:
    loop, cancelled = make_loop(Memory(), slot_count=1), QuietRun()
    with endless(loop) as long:
        doomed, other = decode_next(loop, decode, cancelled), decode_next(loop, decode)
        long.go_on.set()
        cancelled.is_cancelled = True
        assert isinstance(doomed.exception(5), GenerationCancelledError)
        assert not other.done()
    assert other.result(PATIENCE) is not None


def test_a_first_row_that_does_not_fit_gets_the_room_of_some_slots(decode: Decode) -> None:
    memory = Memory()

    def make_slots(slot_count: int) -> Any:
        memory.admitted = 99 if slot_count <= 2 else 0
        return memory.make_slots(slot_count)

    loop = DecodingLoop(make_slots, 8)
    decode(loop).result(PATIENCE)
    assert (memory.made, loop.slot_count) == ([8, 4, 2], 2)


@pytest.mark.parametrize("memory", [Memory(stepped=0), Memory(admitted=0)])
def test_a_row_that_does_not_fit_into_the_last_slot_fails(decode: Decode, memory: Memory) -> None:
    loop = make_loop(memory, slot_count=1)
    with pytest.raises(torch.OutOfMemoryError):
        decode(loop).result(PATIENCE)
    memory.stepped = memory.admitted = 1
    decode(loop).result(PATIENCE)
    assert (loop.slot_count, memory.closed) == (1, [1])


def test_idle_engines_give_way_before_slots_do(decode: Decode) -> None:
    memory = Memory(stepped=0)
    loop = make_loop(memory)
    with pytest.raises(EngineReplacedError):
        decode(loop, QuietRun(idle_engines=1)).result(PATIENCE)
    memory.stepped, memory.admitted = 99, 0

    class RoomyRun(QuietRun):
        def make_room(self) -> bool:
            memory.admitted = 99
            return True

    decode(loop, RoomyRun()).result(PATIENCE)
    assert loop.slot_count == 8


class OrphanedRun(HeldRun):
    def make_room(self) -> bool:
        raise ConnectionError("the parent is gone")


def test_rows_of_a_step_without_memory_are_answered_even_if_no_room_can_be_asked_for(
    decode: Decode,
) -> None:
    loop, run = make_loop(Memory(stepped=1)), OrphanedRun(threading.Event())
    first = decode(loop, run, step_count=40)
    assert run.has_begun.wait(PATIENCE)
    both = [first, decode_next(loop, decode)]
    run.go_on.set()
    for row in both:
        with pytest.raises(EngineError, match="the parent is gone"):
            row.result(PATIENCE)


def test_the_hosts_memory_counts_as_well(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(Memory())
    broken = [MemoryError()]
    step = FakeSlots.step

    def steps(slots: FakeSlots) -> None:
        if broken:
            raise broken.pop()
        step(slots)

    monkeypatch.setattr(FakeSlots, "step", steps)
    with pytest.raises(EngineReplacedError):
        decode(loop).result(PATIENCE)
    assert loop.slot_count == 4


def test_each_row_of_a_lost_device_has_an_error_of_its_own_that_says_so(
    decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(slots: FakeSlots) -> None:
        if slots.rows[0].position or len(slots.rows) > 1:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nAdvice.")
        slots.rows[0].position = STRIDE

    monkeypatch.setattr(FakeSlots, "step", fail)
    monkeypatch.setattr(FakeSlots, "close", fail)
    loop = make_loop(Memory())
    errors = [call.exception(20) for call in step_together(loop, decode, 2)]
    assert loop.slot_count == 8
    assert errors[0] is not errors[1]
    for error in errors:
        assert str(error).endswith(
            "failed (RuntimeError: CUDA error: an illegal memory access was encountered)."
        )
        assert isinstance(error, EngineError)
        assert has_lost_the_device(error)


def test_slots_given_up_hold_no_memory(decode: Decode) -> None:
    memory = Memory(stepped=0)
    loop = make_loop(memory, slot_count=1)
    error = decode(loop).exception(20)
    assert loop._supply.slots is None
    frames = []
    trace = error.__traceback__ if error else None
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    assert not any(
        isinstance(value, FakeSlots) for frame in frames for value in frame.f_locals.values()
    )
