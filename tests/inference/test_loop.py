"""The decoding thread: admitting rows, retiring them, and failures."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dgx_music.errors import EngineError, GenerationCancelledError
from dgx_music.inference.musicgen.loop import DecodingLoop
from dgx_music.inference.musicgen.slots import Slots
from tests.inference.factories import QuietRun
from tests.inference.test_conditions import make_codes
from tests.inference.test_slots import PROMPTS, decode, make_row, make_slots
from tests.patience import PATIENCE


class SignallingRun(QuietRun):
    """Says when its row has made its first step; the next step waits for the given event."""

    def __init__(self, go_on: threading.Event | None = None) -> None:
        super().__init__()
        self.has_begun = threading.Event()
        self._go_on = go_on

    def report_progress(self, progress: float) -> None:
        super().report_progress(progress)
        self.has_begun.set()
        if self._go_on is not None:
            assert self._go_on.wait(PATIENCE)


class BrokenRun(QuietRun):
    def report_progress(self, progress: float) -> None:
        raise ConnectionError("the parent is gone")


@pytest.fixture
def loop() -> DecodingLoop:
    return make_loop()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def make_loop(slot_count: int = 3) -> DecodingLoop:
    return DecodingLoop(make_slots, slot_count)


def break_steps(monkeypatch: pytest.MonkeyPatch, is_broken: Callable[[Slots], bool]) -> None:
    """Make every step raise if ``is_broken`` says so of the slots."""
    step = Slots.step

    def broken(slots: Slots) -> None:
        if is_broken(slots):
            raise RuntimeError("shapes differ")
        step(slots)

    monkeypatch.setattr(Slots, "step", broken)


def test_rows_of_many_threads_have_the_tokens_they_have_alone(pool: ThreadPoolExecutor) -> None:
    loop = make_loop(slot_count=3)
    wanted: list[dict[str, Any]] = [
        {"prompt": PROMPTS[number % 4], "frames": 5 + 7 * number % 31, "seed": number}
        for number in range(8)
    ]
    rows = [make_row(**fields) for fields in wanted]
    answers = list(pool.map(lambda row: loop.decode(row, QuietRun()), rows))
    for fields, codes in zip(wanted, answers, strict=True):
        assert torch.equal(codes, decode([make_row(**fields)])[0])


def test_a_row_joins_in_mid_flight_and_does_not_wait_for_longer_ones(
    loop: DecodingLoop, pool: ThreadPoolExecutor
) -> None:
    go_on = threading.Event()
    long_run, short_run = SignallingRun(go_on), QuietRun()
    long = pool.submit(loop.decode, make_row(frames=70), long_run)
    assert long_run.has_begun.wait(PATIENCE)
    short = pool.submit(loop.decode, make_row(frames=4), short_run)
    go_on.set()
    short.result(PATIENCE)
    assert len(long_run.progress) < 70
    long.result(PATIENCE)


class Heard:
    """Keeps a row's windows of codes."""

    def __init__(self, frames: int) -> None:
        self._frames = frames
        self.windows: list[Tensor] = []

    @property
    def next_start(self) -> int:
        return self._frames * len(self.windows)

    @property
    def next_end(self) -> int:
        return self.next_start + self._frames

    def push(self, codes: Tensor) -> None:
        self.windows.append(codes)


def test_codes_that_are_due_together_are_read_together(
    loop: DecodingLoop, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reading takes the device and the host some time, however short it is."""
    readings, read = [], Slots.read

    def note(slots: Slots, parts: Any) -> Any:
        readings.append([end - start for _, start, end in parts])
        return read(slots, parts)

    monkeypatch.setattr(Slots, "read", note)
    monkeypatch.setattr(loop, "_admit", partial(admit_pair, loop, loop._admit))
    heard = [Heard(4), Heard(4)]
    calls = [
        pool.submit(loop.decode, make_row(frames=10, seed=seed), QuietRun(), own)
        for seed, own in enumerate(heard)
    ]
    codes = sorted((call.result(PATIENCE) for call in calls), key=lambda each: each.tolist())
    windows = sorted((torch.cat(own.windows, 1) for own in heard), key=lambda each: each.tolist())
    for ours, all_codes in zip(windows, codes, strict=True):
        assert torch.equal(ours, all_codes[:, :8])
    assert [each for each in readings if each] == [[4, 4], [4, 4], [10, 10]]


class Late:
    """Codes that arrive when ``is_there`` says so, as a device's do; until then, a wait for them."""

    def __init__(
        self, slots: Slots, parts: Any, reading: Any, is_there: Callable[[Late], bool]
    ) -> None:
        self.slots = slots
        self.spans = [(start, end) for _, start, end in parts]
        self.was_waited_for = False
        self._reading = reading
        self._find_out = is_there
        self._is_there = False

    @property
    def is_there(self) -> bool:
        self._is_there = self._find_out(self)
        return self._is_there

    def codes(self) -> Any:
        self.was_waited_for |= not self._is_there
        return self._reading.codes()


def delay_readings(monkeypatch: pytest.MonkeyPatch, is_there: Callable[[Late], bool]) -> list[Late]:
    """Have codes arrive when ``is_there`` says so of them; return what is read."""
    readings, read = [], Slots.read

    def late(slots: Slots, parts: Any) -> Late:
        readings.append(Late(slots, parts, read(slots, parts), is_there))
        return readings[-1]

    monkeypatch.setattr(Slots, "read", late)
    return readings


def after_steps(count: int) -> Callable[[Late], bool]:
    """Return an answer that is yes every so many times it is asked: once before each step."""
    asked = iter(range(10_000))
    return lambda _late: next(asked) % count == count - 1


@pytest.mark.parametrize("steps_late", [1, 2, 3, 9])
def test_steps_go_on_while_codes_are_on_their_way(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch, steps_late: int
) -> None:
    readings = delay_readings(monkeypatch, after_steps(steps_late))
    run, heard = QuietRun(), Heard(4)
    codes = loop.decode(make_row(frames=30), run, heard)
    assert torch.equal(codes, decode([make_row(frames=30)])[0])
    assert torch.equal(torch.cat(heard.windows, dim=1), codes[:, : 4 * len(heard.windows)])
    spans = [span for reading in readings for span in reading.spans]
    windows, whole = spans[:-1], spans[-1]
    assert whole == (0, 30)
    assert [start % 4 for start, _ in windows] == [0] * len(windows)
    assert len(set(windows)) == len(windows) >= 2
    assert len(run.progress) == 33  # no step was lost, none was made twice


def test_windows_that_became_whole_meanwhile_are_read_together(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = delay_readings(monkeypatch, after_steps(9))
    heard = Heard(4)
    loop.decode(make_row(frames=30), QuietRun(), heard)
    spans = [span for reading in readings for span in reading.spans]
    assert spans == [(0, 4), (4, 13), (12, 22), (0, 30)]
    assert [window.shape[1] for window in heard.windows] == [4] * 5


def test_a_row_that_has_ended_frees_its_slot_before_its_codes_arrive(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, go_on = make_loop(slot_count=1), threading.Event()
    first_run, next_run = SignallingRun(go_on), SignallingRun()
    expected = [decode([make_row(frames=4)])[0], decode([make_row(frames=9, seed=1)])[0]]
    readings = delay_readings(monkeypatch, lambda _late: next_run.has_begun.is_set())
    first = pool.submit(loop.decode, make_row(frames=4), first_run)
    assert first_run.has_begun.wait(PATIENCE)
    following = pool.submit(loop.decode, make_row(frames=9, seed=1), next_run)
    late = time.monotonic() + PATIENCE
    while not loop._waiting and time.monotonic() < late:  # it is about to wait for the slot
        time.sleep(0.001)
    go_on.set()
    assert torch.equal(first.result(PATIENCE), expected[0])
    assert torch.equal(following.result(PATIENCE), expected[1])
    assert [reading.spans for reading in readings] == [[(0, 4)], [(0, 9)]]
    assert not readings[0].was_waited_for


def test_a_row_that_is_cancelled_while_its_codes_are_on_their_way_hears_no_more(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, heard = QuietRun(), Heard(4)

    def cancel(late: Late) -> bool:
        run.is_cancelled = True
        return not late.slots.rows

    delay_readings(monkeypatch, cancel)
    with pytest.raises(GenerationCancelledError):
        loop.decode(make_row(frames=30), run, heard)
    assert torch.equal(loop.decode(make_row(), QuietRun()), decode([make_row()])[0])
    assert heard.windows == []


def test_a_row_that_has_ended_has_its_codes_though_a_later_step_fails(
    pool: ThreadPoolExecutor,
    loop: DecodingLoop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (expected,) = decode([make_row(frames=4)])
    monkeypatch.setattr(loop, "_admit", partial(admit_pair, loop, loop._admit))
    readings = delay_readings(monkeypatch, lambda _late: False)
    break_steps(monkeypatch, lambda slots: bool(readings))
    with caplog.at_level(logging.CRITICAL):
        short, long = (
            pool.submit(loop.decode, make_row(frames=frames), QuietRun()) for frames in (4, 30)
        )
        with pytest.raises(EngineError, match="step of 1 generations failed"):
            long.result(PATIENCE)
    assert torch.equal(short.result(PATIENCE), expected)


class Refusing(Heard):
    """Raises instead of taking a window."""

    def push(self, codes: Tensor) -> None:
        raise EngineError("the codec has failed")


def test_all_rows_of_a_reading_are_answered_though_one_of_them_cannot_be_retired(
    pool: ThreadPoolExecutor,
    loop: DecodingLoop,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (expected,) = decode([make_row(frames=8)])
    retire = Slots.retire

    def lose(slots: Slots, row: Any) -> None:
        if row.frame_count == 30:
            raise RuntimeError("CUDA error: an illegal memory access")
        retire(slots, row)

    monkeypatch.setattr(loop, "_admit", partial(admit_in_order, loop, loop._admit))
    monkeypatch.setattr(Slots, "retire", lose)
    with caplog.at_level(logging.CRITICAL):
        # Its only window arrives with all that the other row has.
        listened = pool.submit(loop.decode, make_row(frames=30), QuietRun(), Refusing(11))
        short = pool.submit(loop.decode, make_row(frames=8), QuietRun())
        with pytest.raises(EngineError, match="the codec has failed"):
            listened.result(PATIENCE)
        assert short.exception(PATIENCE) or torch.equal(short.result(), expected)


def admit_in_order(loop: DecodingLoop, admit: Callable[[], None]) -> None:
    """Admit the two rows when both are there, the longer one first."""
    if len(loop._waiting) == 2:
        ordered = sorted(loop._waiting, key=lambda ticket: -ticket.row.frame_count)
        loop._waiting.clear()
        loop._waiting.extend(ordered)
        admit()


def test_what_is_on_its_way_arrives_though_no_row_is_left(
    pool: ThreadPoolExecutor, loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row ends at the first window that it hands out, while other codes are on their way."""
    (expected,) = decode([make_row(frames=8)])
    monkeypatch.setattr(loop, "_admit", partial(admit_in_order, loop, loop._admit))

    def is_there(late: Late) -> bool:
        return late.spans == [(0, 4)] and late.slots.rows[0].position > 12

    readings = delay_readings(monkeypatch, is_there)
    listened = pool.submit(loop.decode, make_row(frames=30), QuietRun(), Refusing(4))
    short = pool.submit(loop.decode, make_row(frames=8), QuietRun())
    with pytest.raises(EngineError, match="the codec has failed"):
        listened.result(PATIENCE)
    assert torch.equal(short.result(PATIENCE), expected)
    assert [reading.spans for reading in readings] == [[(0, 4)], [(0, 8)]]


class Lost:
    """Codes that never arrive."""

    def __init__(self, *, is_there: bool) -> None:
        self.is_there = is_there

    def codes(self) -> Any:
        raise RuntimeError("the copy failed")


def test_rows_are_answered_though_their_codes_fail_after_a_step(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(Slots, "read", lambda _slots, _parts: Lost(is_there=False))
        break_steps(patch, lambda slots: slots.rows[0].position == 12)
        with pytest.raises(EngineError, match="shapes differ"):
            loop.decode(make_row(frames=30), QuietRun(), Heard(4))
    assert torch.equal(loop.decode(make_row(), QuietRun()), decode([make_row()])[0])


def test_codes_that_arrive_at_the_second_try_fail_nobody(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (expected,) = decode([make_row()])
    read, tries = Slots.read, iter([torch.OutOfMemoryError("CUDA out of memory"), None])

    class Hesitant:
        is_there = True

        def __init__(self, reading: Any) -> None:
            self._reading = reading

        def codes(self) -> Any:
            if (error := next(tries)) is not None:
                raise error
            return self._reading.codes()

    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(Slots, "read", lambda slots, parts: Hesitant(read(slots, parts)))
        assert torch.equal(loop.decode(make_row(), QuietRun()), expected)
    assert torch.equal(loop.decode(make_row(), QuietRun()), expected)


def test_codes_that_do_not_arrive_fail_their_row_and_the_next_one_is_made(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(Slots, "read", lambda _slots, _parts: Lost(is_there=True))
        with pytest.raises(EngineError, match="the copy failed"):
            loop.decode(make_row(), QuietRun())
    assert torch.equal(loop.decode(make_row(), QuietRun()), decode([make_row()])[0])


def test_what_a_clip_was_given_is_heard_before_the_first_step(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, step = Heard(4), Slots.step
    heard_before: list[int] = []

    def note(slots: Slots) -> None:
        heard_before.append(len(heard.windows))
        step(slots)

    monkeypatch.setattr(Slots, "step", note)
    codes = loop.decode(make_row(frames=30, given=make_codes(26)), QuietRun(), heard)
    assert heard_before[0] == 5
    assert torch.equal(torch.cat(heard.windows, dim=1), codes[:, :28])


def test_a_row_that_somebody_listens_to_fails_at_the_window_that_is_not_finite(
    loop: DecodingLoop,
) -> None:
    row, heard = make_row(frames=30), Heard(4)
    row.text = torch.full_like(row.text, torch.nan)
    run = QuietRun()
    with pytest.raises(EngineError, match="not finite"):
        loop.decode(row, run, heard)
    assert heard.windows == []
    assert max(run.progress) < 0.5


def admit_pair(loop: DecodingLoop, admit: Callable[[], None]) -> None:
    """Admit rows when there are two."""
    if len(loop._waiting) == 2:
        admit()


def test_progress_rises_with_every_step_and_leaves_one_for_the_audio(loop: DecodingLoop) -> None:
    run = QuietRun()
    loop.decode(make_row(frames=4), run)
    assert run.progress == pytest.approx([step / 8 for step in range(1, 8)])


def test_a_cancelled_row_ends_alone(loop: DecodingLoop, pool: ThreadPoolExecutor) -> None:
    go_on = threading.Event()
    other, cancelled = SignallingRun(go_on), QuietRun(is_cancelled=True)
    healthy = pool.submit(loop.decode, make_row(frames=30, seed=1), other)
    assert other.has_begun.wait(PATIENCE)
    doomed = pool.submit(loop.decode, make_row(frames=30), cancelled)
    go_on.set()
    with pytest.raises(GenerationCancelledError):
        doomed.result(PATIENCE)
    assert torch.equal(healthy.result(PATIENCE), decode([make_row(frames=30, seed=1)])[0])


def test_a_row_whose_caller_is_gone_ends_alone(
    loop: DecodingLoop, pool: ThreadPoolExecutor
) -> None:
    healthy = pool.submit(loop.decode, make_row(seed=1), QuietRun())
    with pytest.raises(ConnectionError):
        loop.decode(make_row(), BrokenRun())
    assert torch.equal(healthy.result(PATIENCE), decode([make_row(seed=1)])[0])


def test_a_row_that_cannot_be_admitted_fails_alone(
    loop: DecodingLoop, pool: ThreadPoolExecutor
) -> None:
    go_on = threading.Event()
    other = SignallingRun(go_on)
    healthy = pool.submit(loop.decode, make_row(frames=20, seed=1), other)
    assert other.has_begun.wait(PATIENCE)
    misfit = make_row()
    misfit.text = misfit.text[:, :, :, :, :5]
    doomed = pool.submit(loop.decode, misfit, QuietRun())
    go_on.set()
    with pytest.raises(RuntimeError):
        doomed.result(PATIENCE)
    assert torch.equal(healthy.result(PATIENCE), decode([make_row(frames=20, seed=1)])[0])


def test_a_failed_step_fails_its_rows_and_the_next_one_has_fresh_slots(
    loop: DecodingLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = loop._supply.slots
    break_steps(monkeypatch, lambda slots: slots is first and slots.rows[0].position == 3)
    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(EngineError, match=r"step of 1 .*RuntimeError: shapes differ"),
    ):
        loop.decode(make_row(), QuietRun())
    assert torch.equal(loop.decode(make_row(), QuietRun()), decode([make_row()])[0])
    assert loop._supply.slots is not first


def test_all_rows_of_a_failed_step_get_an_error(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = make_loop(slot_count=2)
    break_steps(monkeypatch, lambda slots: len(slots.rows) == 2)
    with caplog.at_level(logging.CRITICAL):
        doomed = [pool.submit(loop.decode, make_row(frames=70), QuietRun()) for _ in range(2)]
        for call in doomed:
            with pytest.raises(EngineError, match="step of 2 generations failed"):
                call.result(PATIENCE)


def test_slots_that_cannot_be_made_again_fail_the_row_that_wanted_one() -> None:
    made = iter([make_slots(1), ValueError("no slots today"), make_slots(1)])

    def make(count: int) -> Slots:
        if isinstance(slots := next(made), ValueError):
            raise slots
        return slots

    loop = DecodingLoop(make, 1)
    loop._supply.slots = None
    with pytest.raises(ValueError, match="no slots today"):
        loop.decode(make_row(), QuietRun())
    assert torch.equal(loop.decode(make_row(), QuietRun()), decode([make_row()])[0])


def test_an_idle_loop_has_no_thread(loop: DecodingLoop) -> None:
    loop.decode(make_row(), QuietRun())
    for thread in threading.enumerate():
        if thread.name == "decoding":
            thread.join(PATIENCE)
    assert not loop._is_running
