"""How the slots' steps reach the device: one by one on a CPU, as recorded CUDA graphs on a GPU.

A step of MusicGen is several hundred small kernels. To launch them one by one takes a host longer
than the GPU needs for them, so on a GPU a step is recorded once and replayed. A recording has fixed
shapes and addresses: `fit` rounds the rows' needs up to one of a few plans. The first step of a
plan runs as it is, which is also the warm-up that a recording needs; the second one is recorded.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dgx_music.inference.trouble import (
    RECORDING,
    first_line,
    has_lost_the_device,
    is_out_of_memory,
)

STEPS_PER_LAUNCH = 8
"""Of a GPU: the host then has a millisecond or more for its own work between launches."""
_CONTEXT_STEP = 128
"""The context length is rounded up to a multiple of this: twelve plans for a clip of 30 s.

With a kernel that finds each row's position on the device it is always the whole cache: one plan.
"""
TEXT_STEP = 32
"""A text's length is rounded up to a multiple of this, and the room for texts is at least this.

Each time the room grows, all recordings become useless.
"""
USUAL_TEXT = 64
"""Room for texts up to this length is never given back, and on a GPU it is there from the start.

Room for a longer text is given back after the last row: else one such text would cost all slots
memory for ever.
"""
_USUAL_TOP_K, _ALL_TOKENS = 256, 1 << 30
"""A launch samples from so many of the likeliest tokens."""
_ROW_COUNTS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64)
"""Steps are recorded for these numbers of rows; beyond them, for multiples of 64."""
_MAX_GRAPHS = 128
"""Each holds several hundred kernels. Past this number the least recently used one is dropped."""
_MAX_LAUNCHES_IN_FLIGHT = 2
"""Enough to keep the device busy, few enough for a quick cancel."""

logger = logging.getLogger(__name__)


class Span(NamedTuple):
    """Neighbouring rows with the same context length."""

    start: int
    stop: int
    length: int
    is_masked: bool
    """True if some of these rows have less than the whole length."""


class Plan(NamedTuple):
    """The shape of a launch; everything else about it is on the device."""

    rows: int
    passes: int
    """1 (conditional) or 2 (conditional, unconditional)."""
    text_passes: int
    """How many of the passes read a text."""
    context_spans: tuple[Span, ...]
    """How much of the cache the rows read."""
    text_spans: tuple[Span, ...]
    """How much of their texts the rows read."""
    max_top_k: int
    """At least the largest top_k of the rows."""
    steps: int


Advance = Callable[[Plan], None]


class Launcher(Protocol):
    """Makes steps on a device, on a stream of its own if the device has streams."""

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the plan to launch for the rows' needs: at least as much of everything."""

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps."""

    def record(self, plan: Plan) -> None:
        """Make the plan's step ready to be launched, if that takes anything, by making it twice."""

    def forget(self) -> None:
        """Drop all recordings: addresses have changed."""

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context whose work is in order with the steps.

        The borrowed tensors, which another stream made, stay valid until that work is done.
        """


_idle_streams: defaultdict[tuple[torch.device, int], list[torch.cuda.Stream]] = defaultdict(list)


def borrow_stream(
    owner: object, device: torch.device, priority: int = 0
) -> torch.cuda.Stream | None:
    """Return a stream for the owner alone, as long as it lives; ``None`` without streams.

    torch makes 32 of a kind and then hands out the first again, even if another engine still
    records on it. Of two priorities the lower number goes first.
    """
    if device.type != "cuda":
        return None
    idle = _idle_streams[device, priority]
    try:
        stream = idle.pop()
    except IndexError:
        stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]
    weakref.finalize(owner, idle.append, stream)
    return stream


def make_launcher(advance: Advance, stream: torch.cuda.Stream | None) -> Launcher:
    """Return the launcher that suits the device: only a GPU has a stream."""
    return EagerLauncher(advance) if stream is None else GraphLauncher(advance, stream)


class EagerLauncher:
    """One step at a time, in exactly the shapes that are needed."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the plan as it is."""
        return plan

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps."""
        self._advance(plan)

    def record(self, plan: Plan) -> None:
        """Do nothing: nothing is recorded."""

    def forget(self) -> None:
        """Do nothing: nothing is recorded."""

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return nullcontext()


class GraphLauncher:
    """CUDA graphs, one for each plan, on one stream and in one pool of memory."""

    def __init__(self, advance: Advance, stream: torch.cuda.Stream) -> None:
        self._advance = advance
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Plan, torch.cuda.CUDAGraph | None] = {}  # the least recently used first
        self._unrecordable: set[Plan] = set()
        self._in_flight: deque[torch.cuda.Event] = deque()

    def fit(self, plan: Plan, slot_count: int, max_positions: int) -> Plan:
        """Return the smallest recordable plan that is enough."""
        return bucket(plan, slot_count, max_positions)

    def launch(self, plan: Plan) -> None:
        """Make the plan's steps when few enough launches are in flight; wait for no result."""
        if len(self._in_flight) == _MAX_LAUNCHES_IN_FLIGHT:
            self._in_flight.popleft().synchronize()
        for _ in range(plan.steps):
            self._step(plan._replace(steps=1))
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(self._stream)
        self._in_flight.append(done)

    def record(self, plan: Plan) -> None:
        """Make the plan's step twice: as it is, and recorded. An error shows here."""
        step = plan._replace(steps=1)
        if step not in self._graphs:
            self._step(step)
            self._step(step)
            self._stream.synchronize()

    def _step(self, plan: Plan) -> None:
        is_warm = plan in self._graphs
        graph = self._graphs.pop(plan, None)
        if graph is None and is_warm and plan not in self._unrecordable:
            graph = self._record(plan)
        self._graphs[plan] = graph
        if len(self._graphs) > _MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        if graph is None:
            self._advance(plan)
        else:
            graph.replay()

    def _record(self, plan: Plan) -> torch.cuda.CUDAGraph | None:
        """Return the recorded step; ``None`` if that fails: then it runs as it is, slower."""
        graph = torch.cuda.CUDAGraph()
        try:
            with RECORDING:
                self._capture(graph, plan)
        except RuntimeError as error:
            if is_out_of_memory(error) or has_lost_the_device(error):
                raise
            logger.warning("no CUDA graph for %s: %s", plan, first_line(error))
            self._unrecordable.add(plan)
            self._pool = torch.cuda.graph_pool_handle()  # the old one may be stuck in its recording
            return None
        return graph

    def _capture(self, graph: torch.cuda.CUDAGraph, plan: Plan) -> None:
        """Record the step, on this stream alone.

        ``torch.cuda.graph`` would wait for the device, on which others record. Other threads
        allocate for the text and the codec meanwhile; ``thread_local`` permits that.
        """
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            self._advance(plan)
        finally:
            graph.capture_end()

    def forget(self) -> None:
        """Wait for all launches, then drop all recordings."""
        self._stream.synchronize()
        self._graphs.clear()
        self._unrecordable.clear()
        self._pool = torch.cuda.graph_pool_handle()  # a pool ends with its last recording
        self._in_flight.clear()

    def on_stream(self, *borrowed: Tensor | None) -> AbstractContextManager[object]:
        """Return a context for the steps' stream, after the work that made the borrowed tensors."""
        if borrowed:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        for tensor in borrowed:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def bucket(plan: Plan, slot_count: int, max_positions: int) -> Plan:
    """Return a plan of several steps with every number rounded up, so that few plans occur.

    Rows go up to one of a dozen numbers, the context length to a multiple of 128, a text's length
    to 32, 64, 128 and so on, top_k to 256 or all tokens; masks hide the surplus.
    """
    rows = min(_row_count(plan.rows), slot_count)
    context = max(span.length for span in plan.context_spans) + STEPS_PER_LAUNCH - 1
    context = min(round_up(context, _CONTEXT_STEP), max_positions)
    text = max((span.length for span in plan.text_spans), default=0)
    return plan._replace(
        rows=rows,
        context_spans=(Span(0, rows, context, is_masked=True),),
        text_spans=(Span(0, rows, text_room(text), is_masked=True),) if text else (),
        max_top_k=_USUAL_TOP_K if plan.max_top_k <= _USUAL_TOP_K else _ALL_TOKENS,
        steps=STEPS_PER_LAUNCH,
    )


def text_room(length: int) -> int:
    """Return the padded length for a text of so many tokens: 32, 64, 128 and so on."""
    return max(TEXT_STEP, _power_of_two(length)) if length else 0


def round_up(number: int, step: int) -> int:
    """Return the smallest multiple of the step that is at least the number."""
    return -(-number // step) * step


def _row_count(rows: int) -> int:
    return next((count for count in _ROW_COUNTS if count >= rows), round_up(rows, _ROW_COUNTS[-1]))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
